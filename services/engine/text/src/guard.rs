use std::borrow::Cow;

use domain::Invalid;

/// Keeps text that a client wrote from forming control tokens, also across the seams where a template joins pieces.
///
/// A mark, a character that occurs nowhere in the content, is put behind the first character of every place where a control token stands
/// or could begin. The template then renders the marked content; a control token in the result is one that the template itself wrote.
/// Afterwards the marks are taken out and the text between control tokens is encoded as ordinary text.
#[derive(Debug)]
pub(crate) struct Guard {
    /// The strings of all control tokens, sorted, without duplicates.
    control: Vec<String>,
}

/// A character that the content does not contain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark(char);

impl Guard {
    pub fn new(mut control: Vec<String>) -> Self {
        control.retain(|text| !text.is_empty());
        control.sort_unstable();
        control.dedup();
        Self { control }
    }

    /// The strings of all control tokens.
    pub fn control(&self) -> &[String] {
        &self.control
    }

    /// `text` with a mark inside of everything that is, or at the end of `text` could become, a control token.
    pub fn protect<'t>(&self, text: &'t str, mark: Mark) -> Cow<'t, str> {
        let mut protected = String::new();
        let mut copied = 0;
        for (index, char) in text.char_indices() {
            if self.begins(&text.as_bytes()[index..]) {
                let end = index + char.len_utf8();
                protected.push_str(&text[copied..end]);
                protected.push(mark.0);
                copied = end;
            }
        }
        if copied == 0 {
            return Cow::Borrowed(text);
        }
        protected.push_str(&text[copied..]);
        Cow::Owned(protected)
    }

    /// Whether `rest` (not empty) begins with a control token, or a control token begins with all of `rest`.
    fn begins(&self, rest: &[u8]) -> bool {
        let mut candidates = &self.control[..]; // the tokens that begin with rest[..depth]
        for (depth, &byte) in rest.iter().enumerate() {
            match candidates.first() {
                None => return false,
                Some(shortest) if shortest.len() == depth => return true,
                Some(_) => {}
            }
            let low = candidates.partition_point(|token| token.as_bytes()[depth] < byte);
            let high = candidates.partition_point(|token| token.as_bytes()[depth] <= byte);
            candidates = &candidates[low..high];
        }
        !candidates.is_empty()
    }
}

impl Mark {
    /// A mark for these texts: the first character reserved for internal use, or for private use, that none of them contains.
    pub fn absent_from<'t>(texts: impl Iterator<Item = &'t str> + Clone) -> Result<Self, Invalid> {
        let free = |mark: &char| !texts.clone().any(|text| text.contains(*mark));
        let mark = ('\u{FDD0}'..='\u{FDEF}').chain('\u{F0000}'..='\u{F00FF}').find(free);
        mark.map(Mark).ok_or_else(|| Invalid::new("chat.messages", "the text uses every character that is reserved for internal use"))
    }

    /// `text` without its marks.
    pub fn lift(self, text: &str) -> Cow<'_, str> {
        if text.contains(self.0) { Cow::Owned(text.replace(self.0, "")) } else { Cow::Borrowed(text) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_split_exactly_what_could_become_a_control_token() {
        let guard = Guard::new(["<|User|>", "<|U", "<image>"].map(String::from).to_vec());
        let mark = Mark('_');
        for (text, expected) in [
            ("plain < text", "plain < text"),
            ("a <|User|> b", "a <_|User|> b"),
            ("<<image>", "<<_image>"),
            ("</image>", "</image>"),
            ("x<im", "x<_im"),
            ("x<im ", "x<im "),
            ("<", "<_"),
            ("<|U<image", "<_|U<_image"),
        ] {
            assert_eq!(guard.protect(text, mark), expected);
            assert_eq!(mark.lift(expected), text);
        }
        assert_eq!(Guard::new(vec![]).protect("<|User|>", mark), "<|User|>");
    }

    #[test]
    fn a_mark_never_occurs_in_the_text() {
        let texts = ["a\u{FDD0}", "\u{FDD1}\u{FDD3}"];
        assert_eq!(Mark::absent_from(texts.into_iter()).map(|mark| mark.0), Ok('\u{FDD2}'));
        let all: String = ('\u{FDD0}'..='\u{FDEF}').chain('\u{F0000}'..='\u{F00FF}').collect();
        assert!(Mark::absent_from([all.as_str()].into_iter()).is_err());
    }
}
