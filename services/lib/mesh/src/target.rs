use std::fmt;
use std::sync::Arc;

/// What a call is for: one service for one model, or one shard of it.
///
/// Displayed as `tokenizer.tiny` or `experts.tiny.3`, with every part escaped so that it is one token of a NATS subject.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    pub service: String,
    pub model: String,
    pub shard: Option<String>,
}

impl Target {
    pub fn new(service: impl Into<String>, model: impl Into<String>) -> Self {
        Self { service: service.into(), model: model.into(), shard: None }
    }

    /// One shard of the service.
    pub fn shard(mut self, shard: impl Into<String>) -> Self {
        self.shard = Some(shard.into());
        self
    }

    /// The NATS subject that calls are opened on: `janua.<service>.<model>[.<shard>]`.
    pub fn subject(&self) -> String {
        format!("janua.{self}")
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", escape(&self.service), escape(&self.model))?;
        match &self.shard {
            Some(shard) => write!(f, ".{}", escape(shard)),
            None => Ok(()),
        }
    }
}

/// One running instance of a target, by the name that it goes by on the mesh. No other instance, here or elsewhere, now or
/// later, goes by the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceName(Arc<str>);

impl InstanceName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A name that was written down somewhere. Whether an instance goes by it shows when it is called.
impl From<&str> for InstanceName {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A target with its spelled-out name, shared by everything that a call needs it for.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub target: Arc<Target>,
    /// `tokenizer.tiny`
    pub name: Arc<str>,
    /// `janua.tokenizer.tiny`
    pub subject: Arc<str>,
}

impl Named {
    pub(crate) fn new(target: &Target) -> Self {
        Self { target: Arc::new(target.clone()), name: target.to_string().into(), subject: target.subject().into() }
    }
}

/// Spells `text` with the characters that one token of a NATS subject may hold: ASCII letters, digits, `-` and `_` stay, every
/// other byte becomes `=XX`. Two different texts never share a spelling; the empty text is a single `=`.
pub(crate) fn escape(text: &str) -> String {
    if text.is_empty() {
        return "=".to_owned();
    }
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("={byte:02X}"));
        }
    }
    escaped
}

/// What [`escape`] has spelled as `text`; `None` if it spells nothing so.
pub(crate) fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = if text == "=" { &[] } else { text.as_bytes() };
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'=' {
            bytes.push(*first);
            continue;
        }
        let code = std::str::from_utf8(tail.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(code, 16).ok()?);
        rest = &tail[2..];
    }
    // Many texts would read alike otherwise: `=41` and `A`, `=2e` and `=2E`.
    String::from_utf8(bytes).ok().filter(|read| escape(read) == text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Target, escape, unescape};

    #[test]
    fn every_part_is_one_subject_token() {
        for (target, subject) in [
            (Target::new("tokenizer", "tiny"), "janua.tokenizer.tiny"),
            (Target::new("language", "deepseek-ai/Janus-Pro_7B"), "janua.language.deepseek-ai=2FJanus-Pro_7B"),
            (Target::new("language", "v1.5 *>"), "janua.language.v1=2E5=20=2A=3E"),
            (Target::new("experts", "tiny").shard("3"), "janua.experts.tiny.3"),
            (Target::new("language", ""), "janua.language.="),
            (Target::new("language", "模"), "janua.language.=E6=A8=A1"),
        ] {
            assert_eq!(target.subject(), subject);
        }
    }

    #[test]
    fn what_escape_never_spells_is_not_read() {
        for text in ["", "a.b", "a/b", "=4", "=", "=41", "=2e", "=FF", "=+1", "a=", "模"] {
            assert_eq!(unescape(text), (text == "=").then(String::new), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_survives_its_spelling(text in any::<String>()) {
            let spelled = escape(&text);
            prop_assert!(spelled.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=".contains(&byte)));
            prop_assert_eq!(unescape(&spelled), Some(text));
        }
    }
}
