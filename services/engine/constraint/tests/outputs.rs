//! What is drawn under a constraint satisfies it, whatever the model says.
#![allow(clippy::unwrap_used)]

mod support;

use proptest::prelude::*;
use sched::Guides;
use serde_json::Value;
use support::*;

const SEEDS: u64 = 60;
/// Every constraint here is satisfied by texts of this many tokens at most, for any model.
const LONGEST: usize = 3000;

/// A schema all of whose documents are short.
const PERSON: &str = r##"{
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["gut", "schlecht", "naïve", "<｜User｜>"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "spouse": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/other"}]}
    },
    "required": ["name", "age", "mood", "tags"],
    "additionalProperties": false,
    "$defs": {"other": {"type": "object", "properties": {"id": {"const": 7}}, "required": ["id"], "additionalProperties": false}}
}"##;

fn is_person(text: &str) -> bool {
    let person: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    let fields = person.as_object().unwrap();
    let known = ["name", "age", "mood", "tags", "spouse"];
    let name = fields["name"].as_str().unwrap().chars().count();
    let tags = fields["tags"].as_array().unwrap();
    let spouse = fields.get("spouse").unwrap_or(&Value::Null);
    fields.keys().all(|key| known.contains(&key.as_str()))
        && (1..=12).contains(&name)
        && (0..=150).contains(&fields["age"].as_i64().unwrap())
        && ["gut", "schlecht", "naïve", "<｜User｜>"].contains(&fields["mood"].as_str().unwrap())
        && (1..=3).contains(&tags.len())
        && tags.iter().all(Value::is_boolean)
        && (spouse.is_null() || *spouse == serde_json::json!({"id": 7}))
}

#[test]
fn json_is_valid_under_its_schema() {
    for bench in benches() {
        for seed in 0..SEEDS {
            let drawn = bench.draw(&json(PERSON), seed, LONGEST);
            assert!(drawn.complete, "seed {seed}: {:?}", drawn.text);
            assert!(is_person(&drawn.text), "seed {seed}: {:?}", drawn.text);
        }
    }
}

/// Without bounds a random model says anything for ever; what it has said by then must still be the beginning of JSON.
#[test]
fn any_json_is_json() {
    let mut complete = 0;
    for bench in benches() {
        for seed in 0..SEEDS {
            for schema in ["{}", "true", r#"{"type": "object"}"#] {
                let drawn = bench.draw(&json(schema), seed, 400);
                let parsed = serde_json::from_str::<Value>(&drawn.text);
                complete += usize::from(drawn.complete);
                match parsed {
                    Ok(value) => assert!(schema.len() < 6 || value.is_object(), "{:?}", drawn.text),
                    // A number that no machine number holds is JSON all the same.
                    Err(error) if error.to_string().starts_with("number out of range") => {}
                    Err(error) => assert!(!drawn.complete && error.is_eof(), "{error}: {:?}", drawn.text),
                }
            }
        }
    }
    assert!(complete > 100, "{complete} documents came to an end");
}

/// Whether a text is what a regex describes, worked out by hand.
type Matches<'a> = &'a dyn Fn(&str) -> bool;

#[test]
fn texts_match_their_regex() {
    let date = |text: &str| {
        let parts: Vec<&str> = text.split('-').collect();
        let digits = |part: &str, count| part.len() == count && part.bytes().all(|byte| byte.is_ascii_digit());
        parts.len() == 3 && digits(parts[0], 4) && digits(parts[1], 2) && digits(parts[2], 2)
    };
    let rows: [(&str, Matches<'_>); 5] = [
        ("[0-9]{4}-[0-9]{2}-[0-9]{2}", &date),
        ("yes|no|perhaps", &|text| ["yes", "no", "perhaps"].contains(&text)),
        ("[^\\x00-\\x7F]{1,5}", &|text| (1..=5).contains(&text.chars().count()) && !text.contains(|c: char| c.is_ascii())),
        ("(?:ab){0,4}c?", &|text| {
            let rest = text.trim_start_matches("ab");
            (rest.is_empty() || rest == "c") && text.len() <= 9
        }),
        ("a/b\\\\n\\.", &|text| text == "a/b\\n."),
    ];
    for bench in benches() {
        for (regex, matches) in rows {
            for seed in 0..SEEDS {
                let drawn = bench.draw(&self::regex(regex), seed, LONGEST);
                assert!(drawn.complete && matches(&drawn.text), "{regex} seed {seed}: {drawn:?}");
            }
        }
    }
}

#[test]
fn texts_are_sentences_of_their_grammar() {
    let sum = r#"
        start: term (OPERATOR term){0,3} "=" NUMBER
        term: NUMBER | "(" NUMBER OPERATOR NUMBER ")"
        OPERATOR: "+" | "-"
        NUMBER: /[1-9][0-9]{0,2}/
    "#;
    let is_sum = |text: &str| {
        let (left, right) = text.split_once('=').unwrap();
        let number = |text: &str| (1..=3).contains(&text.len()) && !text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit());
        let mut depth = 0;
        let balanced = left.chars().all(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            (0..=1).contains(&depth)
        });
        let numbers: Vec<&str> = left.split(['+', '-', '(', ')']).filter(|part| !part.is_empty()).collect();
        balanced && depth == 0 && numbers.iter().all(|part| number(part)) && number(right)
    };
    for bench in benches() {
        for seed in 0..SEEDS {
            let drawn = bench.draw(&lark(sum), seed, LONGEST);
            assert!(drawn.complete && is_sum(&drawn.text), "seed {seed}: {drawn:?}");
        }
    }
}

/// End-of-sentence comes only where the text may end, and is the only way to end one that could go on.
#[test]
fn texts_end_where_they_may() {
    for bench in benches() {
        let mut guide = bench.guide(&regex("a{2,4}")).unwrap();
        let a = bench.codec.encode("a", false)[0];
        for (count, may_end, finished) in [(0, false, false), (1, false, false), (2, true, false), (3, true, false), (4, true, true)] {
            assert_eq!(guide.is_finished(), finished, "after {count}");
            if !finished {
                assert_eq!(bench.allowed(&mut *guide).contains(&EOS), may_end, "after {count}");
                guide.accept(a).unwrap();
            }
        }
        assert!(guide.accept(a).is_err() && guide.accept(EOS).is_err(), "nothing follows a complete text");

        let mut guide = bench.guide(&regex("a{2,4}")).unwrap();
        assert!(guide.accept(EOS).is_err(), "too early");
        let mut guide = bench.guide(&regex("a{2,4}")).unwrap();
        guide.accept(a).unwrap();
        guide.accept(a).unwrap();
        guide.accept(EOS).unwrap();
        assert!(guide.is_finished() && guide.accept(a).is_err());
    }
}

/// A constraint is compiled once and kept for a while; each output still has a state of its own.
#[test]
fn guides_of_one_constraint_do_not_meet() {
    let bench = &benches()[0];
    let a = bench.codec.encode("a", false)[0];
    let mut first = bench.guide(&regex("a{2}b?")).unwrap();
    first.accept(a).unwrap();
    let mut second = bench.guide(&regex("a{2}b?")).unwrap();
    first.accept(a).unwrap();
    assert!(bench.allowed(&mut *first).contains(&EOS) && !bench.allowed(&mut *second).contains(&EOS));
    // More constraints than are kept, again and again.
    for round in 0..3 {
        for length in 1..40 {
            let drawn = bench.draw(&regex(&format!("[ab]{{{length}}}")), round, LONGEST);
            assert!(drawn.complete && drawn.text.len() == length, "{drawn:?}");
        }
    }
}

/// A job may end at other tokens than those of the tokenizer: these are then the ones that are allowed at the end.
#[test]
fn the_jobs_own_end_of_sentence_counts() {
    for bench in benches() {
        let other = bench.codec.control_token_ids().find(|id| *id != EOS).unwrap();
        let mut guide = bench.grammars.guide(&regex("a?"), &[other, 1_000_000]).unwrap();
        let allowed = bench.allowed(&mut *guide);
        assert!(allowed.contains(&other) && !allowed.contains(&EOS), "{allowed:?}");
    }
}

/// Rows of the model beyond the tokenizer, ids without a token, and control tokens are never allowed.
#[test]
fn only_text_is_allowed() {
    for bench in benches() {
        let mut guide = bench.guide(&regex("(?s:.*)")).unwrap();
        let allowed = bench.allowed(&mut *guide);
        let tokens = bench.codec.vocabulary_size() as u32;
        assert!(allowed.iter().all(|id| *id < tokens), "the model has {ROWS} rows, the tokenizer {tokens} tokens");
        let control: Vec<u32> = bench.codec.control_token_ids().filter(|id| *id != EOS && allowed.contains(id)).collect();
        assert_eq!(control, [0; 0], "control tokens");
        assert!(allowed.len() > 300, "{} tokens begin a text", allowed.len());
        // The text of a control token is text like any other.
        for token in ["<｜User｜>", "<|User|>", "<image_placeholder>"] {
            let drawn = bench.draw(&regex(&token.replace('|', "\\|")), 1, LONGEST);
            assert!(drawn.complete && drawn.text == token && drawn.ids.len() > 1, "{drawn:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Where the constraint allows a text, it allows every token of it: a model that says it anyway is not disturbed.
    #[test]
    fn allowed_texts_pass_token_by_token(text in "(?s:.{0,40})", byte in any::<bool>()) {
        let escaped: String = text.chars().map(|c| if c.is_ascii() && !c.is_ascii_alphanumeric() { format!("\\x{:02x}", c as u32) } else { c.to_string() }).collect();
        for bench in benches() {
            for constraint in [regex("(?s:.*)"), regex(&format!("(?s:{escaped}.*)"))] {
                let mut guide = bench.guide(&constraint).unwrap();
                let ids = if byte { bench.bytes(&text) } else { bench.plain(&text) };
                for id in ids {
                    prop_assert!(bench.allowed(&mut *guide).contains(&id), "{id} of {text:?}");
                    prop_assert_eq!(guide.accept(id), Ok(()));
                }
                prop_assert!(bench.allowed(&mut *guide).contains(&EOS));
            }
        }
    }

    /// What is allowed depends on the tokens before, not on how often anybody has asked.
    #[test]
    fn a_replayed_guide_goes_on_as_the_first_would_have(seed in 0..1000u64, cut in 0.0..1.0f64) {
        for bench in benches() {
            for constraint in [json(PERSON), json("{}"), regex("[a-z ]{3,30}\\.")] {
                let whole = bench.draw(&constraint, seed, 60);
                let at = (whole.ids.len() as f64 * cut) as usize;
                let resumed = bench.resume(&constraint, seed, 60, &whole.ids[..at]);
                prop_assert_eq!(&resumed.ids, &whole.ids);
                prop_assert_eq!(resumed.complete, whole.complete);
            }
        }
    }
}
