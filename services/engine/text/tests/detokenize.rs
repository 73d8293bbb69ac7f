//! Streams of ids against decoding everything at once.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use text::{Detokenized, TextCodec};

fn fixture(kind: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures/tokenizers")).join(kind)
}

thread_local!(static CODEC: TextCodec = TextCodec::load_dir(&fixture("janus")).unwrap());

/// Ids of single bytes and of what else is asked for, by their bytes.
fn id_of(codec: &TextCodec, bytes: &[u8]) -> u32 {
    (0..codec.vocabulary_size() as u32).find(|id| codec.token_bytes(*id).as_deref() == Some(bytes)).unwrap()
}

/// Everything that comes out of these pushes: the text, the sum of `accepted`, and whether the stream stopped.
fn stream(codec: &TextCodec, stop: &[&str], pushes: &[&[u32]]) -> Detokenized {
    let mut detokenizer = codec.detokenizer(stop.iter().map(|text| text.to_string()).collect());
    let mut all = Detokenized::default();
    for ids in pushes {
        let step = detokenizer.push(ids);
        assert!(!all.stopped || (step.text.is_empty() && step.accepted == 0 && step.stopped), "nothing after a stop");
        assert!(step.stopped || step.accepted == ids.len());
        all = Detokenized { text: all.text + &step.text, accepted: all.accepted + step.accepted, stopped: step.stopped };
    }
    let last = detokenizer.finish();
    assert_eq!(last.accepted, 0);
    Detokenized { text: all.text + &last.text, accepted: all.accepted, stopped: last.stopped }
}

/// The text before the stop string that is complete first, found the slow way.
fn cut(text: &str, stop: &[&str]) -> Option<usize> {
    (1..=text.len()).find_map(|end| {
        let complete = stop.iter().filter(|stop| !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes()));
        complete.map(|stop| end - stop.len()).min()
    })
}

fn chunked<'a>(ids: &'a [u32], sizes: &[usize]) -> Vec<&'a [u32]> {
    let (mut rest, mut chunks) = (ids, Vec::new());
    for size in sizes.iter().cycle() {
        let (chunk, after) = rest.split_at((*size).min(rest.len()));
        chunks.push(chunk);
        rest = after;
        if rest.is_empty() {
            return chunks;
        }
    }
    chunks
}

#[test]
fn characters_wait_until_they_are_complete() {
    CODEC.with(|codec| {
        let byte = |byte: u8| id_of(codec, &[byte]);
        let mut stream = codec.detokenizer(vec![]);
        let llama = "🦙".as_bytes(); // four bytes
        let texts: Vec<String> = [b'a', llama[0], llama[1], llama[2], llama[3], b'b'].map(|b| stream.push(&[byte(b)]).text).to_vec();
        assert_eq!(texts, ["a", "", "", "", "🦙", "b"]);
        // Bytes that cannot become a character are not kept.
        let texts: Vec<String> = [0xFF, 0xE4, b'x', llama[0], llama[1]].map(|b| stream.push(&[byte(b)]).text).to_vec();
        assert_eq!(texts, ["\u{FFFD}", "", "\u{FFFD}x", "", ""]);
        assert_eq!(stream.finish().text, "\u{FFFD}");
        assert_eq!(stream.finish().text, "");
    });
}

/// Stop strings, the pushes, all text, and `accepted` of every push.
type Row<'a> = (&'a [&'a str], &'a [&'a [u32]], &'a str, &'a [usize]);

#[test]
fn accepted_counts_the_ids_before_the_stop_string() {
    CODEC.with(|codec| {
        let one = |char: &str| id_of(codec, char.as_bytes());
        let (a, b, c, special) = (one("a"), one("b"), one("c"), codec.token_id("<｜end▁of▁sentence｜>").unwrap());
        // A token of several characters that begins outside and ends inside the stop string.
        let in_ = id_of(codec, b"in");
        let accent = "é".as_bytes(); // two bytes, two ids
        let (e1, e2) = (id_of(codec, &accent[..1]), id_of(codec, &accent[1..]));
        let rows: &[Row] = &[
            (&[], &[&[a, b], &[c]], "abc", &[2, 1]),
            (&["b"], &[&[a, b, c]], "a", &[1]),
            (&["b"], &[&[b]], "", &[0]),
            (&["bc"], &[&[a, b], &[c, a]], "a", &[2, 0]),
            (&["bc"], &[&[a, b, c, a]], "a", &[1]),
            (&["nb"], &[&[in_, b]], "i", &[1]),
            (&["nb"], &[&[in_], &[b]], "i", &[1, 0]),
            (&["n"], &[&[a, in_, b]], "ai", &[2]),
            (&["b"], &[&[a, special, b]], "a", &[2]),
            (&["b"], &[&[special], &[special, b]], "", &[1, 1]),
            (&["bc"], &[&[b], &[special, c]], "", &[1, 0]),
            (&["é"], &[&[a, e1, e2]], "a", &[1]),
            (&["é"], &[&[a, e1], &[e2, b]], "a", &[2, 0]),
            (&["\u{FFFD}"], &[&[a, e1], &[b]], "a", &[2, 0]),
            (&["b"], &[&[e1], &[b]], "\u{FFFD}", &[1, 0]),
            (&["b"], &[&[e1, b]], "\u{FFFD}", &[1]),
        ];
        for (stop, pushes, text, accepted) in rows {
            let mut stream = codec.detokenizer(stop.iter().map(|text| text.to_string()).collect());
            let steps: Vec<Detokenized> = pushes.iter().map(|ids| stream.push(ids)).collect();
            let all: String = steps.iter().map(|step| step.text.as_str()).collect();
            assert_eq!(all + &stream.finish().text, *text, "{stop:?} {pushes:?}");
            assert_eq!(steps.iter().map(|step| step.accepted).collect::<Vec<_>>(), *accepted, "{stop:?} {pushes:?}");
            assert_eq!(steps.last().unwrap().stopped, !stop.is_empty(), "{stop:?} {pushes:?}");
        }
    });
}

#[test]
fn what_may_become_a_stop_string_is_held_back_and_given_out_later() {
    CODEC.with(|codec| {
        let mut stream = codec.detokenizer(vec!["User:".into(), "\n\n\n".into()]);
        let mut push = |text: &str| stream.push(&codec.encode(text, false)).text;
        assert_eq!([push("Us"), push("es"), push("\n"), push("\n"), push("x"), push("Use")], ["", "Uses", "", "", "\n\nx", ""]);
        let last = stream.finish();
        assert_eq!((last.text.as_str(), last.stopped), ("Use", false));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_ids_in_any_pieces_give_the_text_of_all_ids(ids in prop::collection::vec(0u32..500, 0..60), sizes in prop::collection::vec(1usize..6, 1..8)) {
        CODEC.with(|codec| {
            let whole = codec.decode(&ids, true);
            let streamed = stream(codec, &[], &chunked(&ids, &sizes));
            assert_eq!(streamed, Detokenized { text: whole, accepted: ids.len(), stopped: false });
        });
    }

    #[test]
    fn broken_characters_in_any_pieces_give_the_text_of_all_ids(bytes in prop::collection::vec(prop::sample::select(vec![b'a', 0x80, 0xBF, 0xC3, 0xE4, 0xBD, 0xA0, 0xED, 0xF0, 0x9F, 0x98, 0xF4, 0xFF]), 0..40), sizes in prop::collection::vec(1usize..4, 1..8), stops in any::<bool>()) {
        CODEC.with(|codec| {
            let ids: Vec<u32> = bytes.iter().map(|byte| id_of(codec, &[*byte])).collect();
            let whole = codec.decode(&ids, true);
            assert_eq!(whole, String::from_utf8_lossy(&bytes));
            let stop: &[&str] = if stops { &["\u{FFFD}a", "aa", "\u{FFFD}\u{FFFD}\u{FFFD}"] } else { &[] };
            let expected = cut(&whole, stop);
            let streamed = stream(codec, stop, &chunked(&ids, &sizes));
            assert_eq!(streamed.text, whole[..expected.unwrap_or(whole.len())]);
            assert_eq!(streamed.stopped, expected.is_some());
        });
    }

    #[test]
    fn text_ends_before_the_first_stop_string(text in "[ab你\n]{0,40}", stop in prop::collection::vec("[ab你\n]{0,4}", 0..4), sizes in prop::collection::vec(1usize..6, 1..8)) {
        CODEC.with(|codec| {
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let ids = codec.encode(&text, false);
            let expected = cut(&text, &stop);
            let streamed = stream(codec, &stop, &chunked(&ids, &sizes));
            assert_eq!(streamed.text, text[..expected.unwrap_or(text.len())]);
            assert_eq!(streamed.stopped, expected.is_some());
            // Pushed at once, `accepted` follows from the bytes of the ids alone: all here are whole characters or begin one.
            let whole = stream(codec, &stop, &[&ids]);
            let accepted = expected.map_or(ids.len(), |expected| {
                let mut begin = 0;
                let before = |id: &&u32| {
                    let own = begin;
                    begin += codec.token_bytes(**id).unwrap().len();
                    own < expected
                };
                ids.iter().take_while(before).count()
            });
            assert_eq!(whole.accepted, accepted);
        });
    }
}
