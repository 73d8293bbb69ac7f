//! Reads a section into a struct, keeping track of which key is being read so that an error can name it and its origin.

use std::collections::btree_map;
use std::fmt::{self, Display};
use std::str::FromStr;

use serde::de::value::{MapAccessDeserializer, SeqDeserializer, StrDeserializer};
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, Visitor};
use serde::forward_to_deserialize_any;

use crate::{ConfigError, Origin, Raw, Setting, error};

/// `settings` as a `T`.
pub(crate) fn section<T: DeserializeOwned>(name: &str, settings: &btree_map::BTreeMap<String, Setting>) -> Result<T, ConfigError> {
    let mut keys = Keys { rest: settings.iter(), current: None };
    T::deserialize(MapAccessDeserializer::new(&mut keys)).map_err(|problem| {
        let (key, origin) = keys.current.map_or(("", &Origin::Absent), |(key, setting)| (key, &setting.origin));
        match problem {
            Problem::Unknown { key, known } => ConfigError::UnknownKey {
                section: name.to_owned(),
                hint: error::hint(&key, known.iter().copied()),
                key,
                origin: origin.clone(),
            },
            Problem::Missing(key) => ConfigError::key(name, key, &Origin::Absent, "a value is needed"),
            Problem::Bad(reason) => ConfigError::key(name, key, origin, reason),
        }
    })
}

/// What can go wrong with one key.
#[derive(Debug)]
enum Problem {
    Unknown { key: String, known: &'static [&'static str] },
    Missing(&'static str),
    Bad(String),
}

impl Display for Problem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{self:?}")
    }
}

impl std::error::Error for Problem {}

impl de::Error for Problem {
    fn custom<T: Display>(message: T) -> Self {
        Self::Bad(message.to_string().trim().replace('\n', " "))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::Unknown { key: field.to_owned(), known: expected }
    }

    fn missing_field(field: &'static str) -> Self {
        Self::Missing(field)
    }
}

struct Keys<'a> {
    rest: btree_map::Iter<'a, String, Setting>,
    current: Option<(&'a str, &'a Setting)>,
}

impl<'de> MapAccess<'de> for &mut Keys<'_> {
    type Error = Problem;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Problem> {
        self.current = self.rest.next().map(|(key, setting)| (key.as_str(), setting));
        self.current.map(|(key, _)| seed.deserialize(StrDeserializer::new(key))).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Problem> {
        match self.current.map(|(_, setting)| &setting.value) {
            Some(Raw::Typed(value)) => seed.deserialize(value.clone()).map_err(|error| <Problem as de::Error>::custom(error.message())),
            Some(Raw::Text(text)) => seed.deserialize(Text(text)),
            None => Err(<Problem as de::Error>::custom("a value without a key")),
        }
    }
}

/// A value from the environment or a flag: the type of the field says how to read it.
struct Text<'a>(&'a str);

impl Text<'_> {
    fn parse<T: FromStr>(&self, expected: &str) -> Result<T, Problem> {
        self.0.trim().parse().map_err(|_| Problem::Bad(format!("{:?} is not {expected}", self.0)))
    }
}

impl<'de> Deserializer<'de> for Text<'_> {
    type Error = Problem;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_str(self.0)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_bool(self.parse("true or false")?)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_i64(self.parse("an integer")?)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_u64(self.parse("an integer of 0 or more")?)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_f64(self.parse("a number")?)
    }

    fn deserialize_i8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_i16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        // An empty variable is how a container turns a setting off.
        if self.0.is_empty() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_newtype_struct(self)
    }

    /// Entries separated by commas.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_seq(SeqDeserializer::new(self.0.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(Text)))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Problem> {
        visitor.visit_enum(StrDeserializer::new(self.0))
    }

    forward_to_deserialize_any! {
        i128 u128 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Problem> for Text<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}
