use std::fmt;
use std::path::{Path, PathBuf};

/// Where a setting came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    File(PathBuf),
    /// An environment variable.
    Variable(String),
    /// A command line flag.
    Flag(String),
    /// Nowhere: a key without which a section makes no sense.
    Absent,
}

impl fmt::Display for Origin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(out, "in {}", path.display()),
            Self::Variable(name) => write!(out, "from the variable {name}"),
            Self::Flag(flag) => write!(out, "from {flag}"),
            Self::Absent => write!(out, "in no file, variable or flag"),
        }
    }
}

/// Why the configuration cannot be used. One line that names the key and its origin.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}, line {line}: {reason}", path.display())]
    Syntax { path: PathBuf, line: usize, reason: String },
    #[error("{section}: unknown section ({origin}){hint}")]
    UnknownSection { section: String, origin: Origin, hint: Hint },
    #[error("{section}.{key}: unknown key ({origin}){hint}")]
    UnknownKey { section: String, key: String, origin: Origin, hint: Hint },
    /// `key` is `section.key`, or a section alone.
    #[error("{key}: {reason} ({origin})")]
    Value { key: String, reason: String, origin: Origin },
}

impl ConfigError {
    /// A value of the right type that the reader of the section cannot work with.
    pub fn invalid(section: &str, key: &str, reason: impl Into<String>) -> Self {
        Self::key(section, key, &Origin::Absent, reason)
    }

    pub(crate) fn key(section: &str, key: &str, origin: &Origin, reason: impl Into<String>) -> Self {
        let key = if key.is_empty() { section.to_owned() } else { format!("{section}.{key}") };
        Self::Value { key, reason: reason.into(), origin: origin.clone() }
    }

    pub(crate) fn syntax(path: &Path, text: &str, error: &toml::de::Error) -> Self {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let reason = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        Self::Syntax { path: path.to_owned(), line: before.matches('\n').count() + 1, reason }
    }
}

/// The name that was probably meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hint(Option<String>);

impl fmt::Display for Hint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |name| write!(out, "; did you mean {name}?"))
    }
}

/// The known name nearest to `word`, unless all are far off.
pub(crate) fn hint<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Hint {
    let nearest = known.into_iter().map(|name| (distance(word, name), name)).min();
    Hint(nearest.filter(|(edits, name)| *edits <= 1 + name.len() / 4).map(|(_, name)| name.to_owned()))
}

/// Insertions, deletions and replacements that make `b` out of `a` (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::{distance, hint};

    #[test]
    fn distances() {
        for (a, b, expected) in [("", "", 0), ("listn", "listen", 1), ("kitten", "sitting", 3), ("abc", "", 3)] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn only_near_names_are_suggested() {
        assert_eq!(hint("listn", ["listen", "grace_s"]).to_string(), "; did you mean listen?");
        assert_eq!(hint("colour", ["listen", "grace_s"]).to_string(), "");
    }
}
