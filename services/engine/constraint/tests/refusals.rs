//! Constraints that make no sense, and ones that are made to do harm.
#![allow(clippy::unwrap_used)]

mod support;

use std::thread;
use std::time::{Duration, Instant};

use constraint::Grammars;
use domain::Constraint;
use sched::{GuideError, Guides};
use support::*;

fn refusal(constraint: &Constraint) -> String {
    match benches()[0].guide(constraint) {
        Err(GuideError::Invalid(invalid)) => invalid.to_string(),
        other => panic!("{constraint:?}: {other:?}"),
    }
}

#[test]
fn nonsense_is_refused_by_its_field_in_one_line() {
    let rows = [
        (json("{"), "sampling.constraint.json_schema: not JSON: EOF"),
        (json("[]"), "sampling.constraint.json_schema: a schema is an object"),
        (json("false"), "sampling.constraint.json_schema: a schema is an object"),
        (json(r#"{"multipleOf": 1000000007, "type": "integer"}"#), "sampling.constraint.json_schema: more than can be compiled"),
        (json(r##"{"$ref": "#"}"##), "sampling.constraint.json_schema: no text satisfies it"),
        (json(r#"{"type": "strin"}"#), "sampling.constraint.json_schema: "),
        (json(r#"{"type": 3}"#), "sampling.constraint.json_schema: "),
        (json(r##"{"$ref": "#/nowhere"}"##), "sampling.constraint.json_schema: "),
        (json(r#"{"$ref": "https://example.org/schema"}"#), "sampling.constraint.json_schema: "),
        (json(r#"{"type": "string", "pattern": "("}"#), "sampling.constraint.json_schema: "),
        (json(r#"{"not": {"type": "string"}}"#), "sampling.constraint.json_schema: "),
        (json(r#"{"type": "integer", "minimum": 5, "maximum": 4}"#), "sampling.constraint.json_schema: "),
        (regex("("), "sampling.constraint.regex: "),
        (regex("a(?=b)"), "sampling.constraint.regex: "),
        (regex("(a)\\1"), "sampling.constraint.regex: "),
        (regex("[z-a]"), "sampling.constraint.regex: "),
        (lark("   "), "sampling.constraint.lark: "),
        (lark("rule: \"a\""), "sampling.constraint.lark: "),
        (lark("start: nowhere"), "sampling.constraint.lark: "),
        (lark("start: \"a"), "sampling.constraint.lark: "),
        (lark("start: /(/"), "sampling.constraint.lark: "),
        (lark("start: <nothing>"), "sampling.constraint.lark: "),
    ];
    for (constraint, expected) in rows {
        let refusal = refusal(&constraint);
        assert!(refusal.starts_with(expected), "{refusal:?} does not begin with {expected:?}");
        assert!(
            refusal.len() >= expected.len() && !refusal.ends_with(": ") && refusal.len() < 500 && refusal.lines().count() == 1,
            "{refusal:?}"
        );
        assert!(!refusal.contains("panic"), "{refusal:?}");
    }
}

#[test]
fn a_checkpoint_without_a_tokenizer_cannot_be_guided() {
    let error = Grammars::of(&fixture("preprocess")).guide(&regex("a"), &[EOS]).unwrap_err();
    let GuideError::Unable(reason) = error else { panic!("{error}") };
    assert!(reason.contains("tokenizer_config.json: missing"), "{reason}");
}

/// Everything that a client may send, in 64 KiB: each is either compiled or refused in good time, and when it is compiled its first masks
/// are made in good time as well, on a thread as small as the engine's.
#[test]
fn hostile_constraints_take_neither_the_process_nor_the_time() {
    let mut slow = Vec::new();
    for (name, constraint) in [regexes(), grammars(), schemas()].concat() {
        let begun = Instant::now();
        let thread = thread::Builder::new().stack_size(2 << 20).spawn(move || outcome(&constraint)).unwrap();
        let outcome = thread.join().unwrap();
        println!("{name}: {:?} {}", begun.elapsed(), &outcome[..outcome.floor_char_boundary(200)]);
        if begun.elapsed() > PATIENCE {
            slow.push((name, begun.elapsed()));
        }
    }
    assert!(slow.is_empty(), "{slow:?}");
}

/// Generous: the machines that run tests are busy.
const PATIENCE: Duration = Duration::from_secs(90);
/// Nearly as long as a constraint may be.
const FULL: usize = 65_000;

/// What becomes of a constraint and of a few tokens under it.
fn outcome(constraint: &Constraint) -> String {
    let mut guide = match benches()[0].guide(constraint) {
        Err(error) => return error.to_string(),
        Ok(guide) => guide,
    };
    for step in 0..20 {
        let mut logits = vec![0.0; ROWS];
        if guide.is_finished() {
            break;
        }
        if let Err(reason) = guide.mask(&mut logits) {
            return format!("mask {step}: {reason}");
        }
        let allowed: Vec<u32> = (0..).zip(logits).filter(|(_, logit)| *logit == 0.0).map(|(id, _)| id).collect();
        if let Err(reason) = guide.accept(allowed[step * 7 % allowed.len()]) {
            return format!("accept {step}: {reason}");
        }
    }
    "taken".to_owned()
}

type Row = (&'static str, Constraint);

fn regexes() -> Vec<Row> {
    vec![
        ("deep parentheses", regex(&nested("(", "a", ")", FULL))),
        ("deep repetition", regex(&nested("(", "a", ")*", FULL))),
        ("counted repetition", regex(&nested("(", "a", "){1000}", 900))),
        ("large counts", regex("(?:[a-z]{1,60000}[0-9]{1,60000}){1,60000}")),
        ("many alternatives", regex(&many(&|i| format!("a{i}b"), "|"))),
        ("states without end", regex("(?:a|b)*a(?:a|b){400}c")),
        ("a long literal", regex(&"ab".repeat(FULL / 2))),
        ("unicode classes", regex(&many(&|_| "\\p{L}{1,50}".into(), "&"))),
    ]
}

fn grammars() -> Vec<Row> {
    let doubling: String = (0..40).map(|i| format!("T{i}: T{} T{}\n", i + 1, i + 1)).collect();
    let nowhere = many(&|i| format!("r{i}: r{} | \"{i}\"", i + 1), "\n");
    vec![
        ("deep parentheses", lark(&format!("start: {}", nested("(", "\"a\"", ")", FULL)))),
        ("deep groups", lark(&format!("start: {}", nested("(\"a\" ", "\"a\"", ")?", FULL)))),
        ("left and right recursion", lark("start: start start | \"a\" | ")),
        ("an ambiguous grammar", lark("start: x x x x x x x x x x x x\nx: (\"a\" | \"a\" \"a\" | x x)*")),
        ("a chain of rules that leads nowhere", lark(&format!("start: r0\n{nowhere}\n"))),
        ("a long chain of rules", lark(&chain('a'))),
        ("a long chain of terminals", lark(&chain('A'))),
        ("counted rules", lark("start: a{60000}\na: b{60000}\nb: \"x\"{60000}")),
        ("doubling terminals", lark(&format!("start: T0\n{doubling}T40: \"a\""))),
        ("a deep schema in a grammar", lark(&format!("start: %json {{ \"type\": {} }}", nested("[", "", "]", FULL)))),
    ]
}

fn schemas() -> Vec<Row> {
    let alternatives =
        r#"{"anyOf": [{"properties": {"a": {"type": "string"}}}, {"properties": {"b": {"type": "number"}}}, {"required": ["c"]}]}"#;
    let cycle = r##"{"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}}"##;
    let next = |i: usize| format!(r##"{{"$ref": "#/$defs/d{}"}}"##, (i + 1) % 600);
    let doubling: Vec<String> =
        (0..600).map(|i| format!(r#""d{i}": {{"anyOf": [{}, {{"allOf": [{}]}}, {{"type": "null"}}]}}"#, next(i), next(i))).collect();
    vec![
        ("deep", json(&nested("{\"items\":", "{}", "}", FULL))),
        ("deep alternatives", json(&nested("{\"anyOf\":[", "{}", "]}", 120 * 12))),
        ("doubling definitions", json(&format!(r##"{{"$ref": "#/$defs/d0", "$defs": {{{}}}}}"##, doubling.join(",")))),
        ("products of alternatives", json(&format!(r#"{{"allOf": [{}]}}"#, vec![alternatives; 24].join(",")))),
        ("a cycle of references", json(cycle)),
        ("many properties", json(&format!(r#"{{"properties": {{{}}}}}"#, many(&|i| format!(r#""p{i}":{{}}"#), ",")))),
        ("a large enumeration", json(&format!(r#"{{"enum": [{}]}}"#, many(&|i| format!("\"{i}\""), ",")))),
        ("large arrays", json(r#"{"type": "array", "minItems": 1000000, "items": {"type": "array", "minItems": 1000000}}"#)),
        ("long strings", json(r#"{"type": "string", "minLength": 100000000, "maxLength": 200000000}"#)),
        ("a hostile pattern", json(r#"{"type": "string", "pattern": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"}"#)),
        ("multiples", json(r#"{"allOf": [{"multipleOf": 7919}, {"multipleOf": 7907}, {"multipleOf": 7901}, {"type": "integer"}]}"#)),
        ("a tiny multiple", json(r#"{"type": "number", "multipleOf": 1e-300}"#)),
        ("a huge range", json(r#"{"type": "number", "minimum": -1e308, "maximum": 1e-308}"#)),
        (
            "pattern properties",
            json(&format!(r#"{{"patternProperties": {{{}}}}}"#, many(&|i| format!(r#""(a|b)*{i}(a|b){{30}}":{{}}"#), ","))),
        ),
    ]
}

fn nested(open: &str, inner: &str, close: &str, bytes: usize) -> String {
    let depth = bytes / (open.len() + close.len());
    format!("{}{inner}{}", open.repeat(depth), close.repeat(depth))
}

/// As many items as fit.
fn many(item: &dyn Fn(usize) -> String, separator: &str) -> String {
    let mut text = item(0);
    for next in (1..).map(item) {
        if text.len() + separator.len() + next.len() > FULL {
            return text;
        }
        text.extend([separator, &next]);
    }
    text
}

/// As many rules as fit, each naming the next: as deep as a compiler can be made to go. Names are of the case of `letter`.
fn chain(letter: char) -> String {
    let digit = |digit: u8| char::from(letter as u8 + digit - b'0');
    let name = |i: usize| format!("{i:04}").bytes().map(digit).collect::<String>();
    let last = FULL / "aaaa:aaaa\n".len() - 2;
    let rules: String = (0..last).map(|i| format!("{}:{}\n", name(i), name(i + 1))).collect();
    format!("start:{}\n{rules}{}:\"a\"\n", name(0), name(last))
}
