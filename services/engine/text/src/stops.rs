/// Looks for several strings in a text that arrives in pieces, in constant time per byte and string (Knuth, Morris and Pratt).
#[derive(Debug, Clone)]
pub(crate) struct Stops {
    patterns: Vec<Pattern>,
}

#[derive(Debug, Clone)]
struct Pattern {
    bytes: Vec<u8>,
    /// `border[n]`: length of the longest proper prefix of the first `n` bytes that is also their suffix.
    border: Vec<usize>,
    /// Length of the longest suffix of the text so far that is a prefix of `bytes`.
    matched: usize,
}

/// Where a string was found, in bytes from the start of the piece that completed it. It may begin in an earlier piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub end: usize,
    pub length: usize,
}

impl Stops {
    /// Empty strings are left out: they would stop everything.
    pub fn new(strings: Vec<String>) -> Self {
        let patterns = strings.into_iter().filter(|text| !text.is_empty()).map(|text| Pattern::new(text.into_bytes())).collect();
        Self { patterns }
    }

    /// Reads `piece` up to the first place where a string is complete. Of several that end there, the longest counts.
    pub fn advance(&mut self, piece: &[u8]) -> Option<Found> {
        if self.patterns.is_empty() {
            return None;
        }
        for (index, &byte) in piece.iter().enumerate() {
            let complete = self.patterns.iter_mut().filter_map(|pattern| pattern.step(byte)).max();
            if let Some(length) = complete {
                return Some(Found { end: index + 1, length });
            }
        }
        None
    }

    /// How many bytes at the end of the text may still turn out to be the beginning of a stop string.
    pub fn pending(&self) -> usize {
        self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0)
    }
}

impl Pattern {
    fn new(bytes: Vec<u8>) -> Self {
        let mut border = vec![0; bytes.len() + 1];
        let mut length = 0;
        for end in 1..bytes.len() {
            while length > 0 && bytes[end] != bytes[length] {
                length = border[length];
            }
            length += usize::from(bytes[end] == bytes[length]);
            border[end + 1] = length;
        }
        Self { bytes, border, matched: 0 }
    }

    /// The pattern's length when `byte` completes it.
    fn step(&mut self, byte: u8) -> Option<usize> {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.border[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        (self.matched == self.bytes.len()).then(|| {
            self.matched = self.border[self.matched];
            self.bytes.len()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(strings: &[&str], text: &str, expected: Option<(usize, usize)>) {
        let mut stops = Stops::new(strings.iter().map(|text| text.to_string()).collect());
        let found = stops.advance(text.as_bytes());
        assert_eq!(found.map(|found| (found.end, found.length)), expected, "{strings:?} in {text:?}");
    }

    #[test]
    fn the_string_that_is_complete_first_counts() {
        check(&[], "anything", None);
        check(&[""], "anything", None);
        check(&["abc"], "ababc", Some((5, 3)));
        check(&["aab"], "aaab", Some((4, 3)));
        check(&["abcd", "bc"], "abcd", Some((3, 2)));
        check(&["b", "ab"], "ab", Some((2, 2)));
        check(&["abab"], "abaabab", Some((7, 4)));
    }

    #[test]
    fn the_longest_possible_beginning_is_pending() {
        let mut stops = Stops::new(vec!["User:".into(), "\n\n".into(), "sUse".into()]);
        for (piece, pending) in [("x", 0), ("\n", 1), ("Us", 2), ("U", 2), ("sUs", 3), ("z", 0)] {
            assert_eq!(stops.advance(piece.as_bytes()), None);
            assert_eq!(stops.pending(), pending, "after {piece:?}");
        }
    }
}
