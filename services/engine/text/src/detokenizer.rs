use std::sync::Arc;

use crate::stops::Stops;
use crate::vocabulary::Vocabulary;

/// Turns a stream of token ids into text, byte for byte what decoding all ids at once would give.
///
/// Special tokens contribute nothing. Text is given out as soon as its characters are complete and cannot be part of a stop string any
/// more. Bytes that can never become a character are given out as U+FFFD, at once.
///
/// The text ends exactly before the stop string that is complete first; of several complete at the same byte, the longest counts. So the
/// result does not depend on how the ids are cut into pushes.
#[derive(Debug)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    stops: Stops,
    /// The beginning of a character whose other bytes have not come yet: at most 3 bytes.
    partial: Vec<u8>,
    /// Text that may be the beginning of a stop string.
    held: String,
    /// Bytes given out so far: the offset of `held` in the whole text.
    given: usize,
    stopped: bool,
}

/// What a push gives out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Detokenized {
    pub text: String,
    /// How many ids of this push come before the stop string: the ids in front of the first one that begins at or behind the stop
    /// string's first byte. An id whose bytes end with the beginning of the stop string is counted, since part of it is given out.
    /// Without a stop string all ids of the push; 0 once an earlier push has stopped or holds the stop string's beginning.
    pub accepted: usize,
    /// A stop string was found, now or earlier. Nothing more will be given out.
    pub stopped: bool,
}

impl Detokenizer {
    pub(crate) fn new(vocabulary: Arc<Vocabulary>, stop: Vec<String>) -> Self {
        Self { vocabulary, stops: Stops::new(stop), partial: Vec::new(), held: String::new(), given: 0, stopped: false }
    }

    /// Takes the next ids. Ids that the tokenizer does not know contribute nothing.
    pub fn push(&mut self, ids: &[u32]) -> Detokenized {
        if self.stopped {
            return Detokenized { stopped: true, ..Detokenized::default() };
        }
        let (start, carried) = (self.end(), !self.partial.is_empty());
        let vocabulary = self.vocabulary.clone();
        let mut begins = Vec::with_capacity(ids.len()); // (place in `ids`, offset in the text) of each id that has bytes
        for (place, &id) in ids.iter().enumerate() {
            let Some(bytes) = vocabulary.bytes(id, true).filter(|bytes| !bytes.is_empty()) else { continue };
            let (begin, stop) = self.append(bytes);
            begins.push((place, begin));
            if let Some(stop) = stop {
                let began_earlier = stop < start || (stop == start && carried);
                let first_behind = begins.iter().find(|(_, begin)| *begin >= stop).map_or(place + 1, |(place, _)| *place);
                let accepted = if began_earlier { 0 } else { first_behind };
                return Detokenized { text: self.stop_at(stop), accepted, stopped: true };
            }
        }
        Detokenized { text: self.give(), accepted: ids.len(), stopped: false }
    }

    /// No more ids follow: gives out what is held back, with U+FFFD for a character that never became complete. `accepted` is 0.
    pub fn finish(&mut self) -> Detokenized {
        let mut stop = None;
        if !self.stopped && !self.partial.is_empty() {
            self.partial.clear();
            stop = self.append_text("\u{FFFD}");
        }
        match stop {
            Some(stop) => Detokenized { text: self.stop_at(stop), accepted: 0, stopped: true },
            None => {
                self.given += self.held.len();
                Detokenized { text: std::mem::take(&mut self.held), accepted: 0, stopped: self.stopped }
            }
        }
    }

    /// Appends the bytes of one token. Returns the offset of the character to which its first byte belongs, and the offset of the stop
    /// string, if there is one now.
    fn append(&mut self, bytes: &[u8]) -> (usize, Option<usize>) {
        let begin = self.end();
        if self.partial.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            return (begin, self.append_text(text));
        }
        self.append_joined(begin, bytes)
    }

    /// The slow way of `append`: after an incomplete character, or with bytes that are not whole characters.
    fn append_joined(&mut self, mut begin: usize, bytes: &[u8]) -> (usize, Option<usize>) {
        let before = self.partial.len();
        let mut joined = std::mem::take(&mut self.partial);
        joined.extend_from_slice(bytes);
        let mut position = 0;
        for chunk in joined.utf8_chunks() {
            let mut stop = self.append_text(chunk.valid());
            position += chunk.valid().len() + chunk.invalid().len();
            if position == joined.len() && is_incomplete(chunk.invalid()) {
                self.partial.extend_from_slice(chunk.invalid());
            } else if !chunk.invalid().is_empty() {
                // One replacement for all bytes that together cannot begin a character, as in the lossy conversion of a whole text.
                stop = stop.or_else(|| self.append_text("\u{FFFD}"));
            }
            if position == before {
                begin = self.end(); // the token does not continue the character that was there before
            }
            if stop.is_some() {
                return (begin, stop);
            }
        }
        (begin, None)
    }

    /// Appends whole characters; the offset of the stop string that they complete, if any.
    fn append_text(&mut self, text: &str) -> Option<usize> {
        let end = self.end();
        self.held.push_str(text);
        self.stops.advance(text.as_bytes()).map(|found| end + found.end - found.length)
    }

    /// Bytes of text so far.
    fn end(&self) -> usize {
        self.given + self.held.len()
    }

    /// All text that can no longer be part of a stop string.
    fn give(&mut self) -> String {
        let pending = self.stops.pending();
        let rest = self.held.split_off(self.held.len() - pending); // stop strings begin at characters, so this is a boundary
        self.given += self.held.len();
        std::mem::replace(&mut self.held, rest)
    }

    /// The text before the stop string at offset `stop`; drops the rest.
    fn stop_at(&mut self, stop: usize) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.truncate(stop - self.given);
        self.partial.clear();
        self.stopped = true;
        text
    }
}

/// Whether more bytes could turn these into a character.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
