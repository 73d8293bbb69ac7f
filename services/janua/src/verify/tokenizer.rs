use std::path::Path;

use bytes::Bytes;
use domain::{Input, Message, OutputKind, Part, Role};
use serde_json::Value;
use text::{PreparedSegment, TextCodec};

use super::golden::{Golden, ids};
use super::report::Report;
use crate::Failure;

/// Keys of `golden.json` that describe how it was made.
const NOTES: [&str; 2] = ["case", "transformers_wrapper_disagreements"];

/// Compares a folder that holds a tokenizer alone.
pub fn compare(dir: &Path, golden: &Golden, report: &mut Report) -> Result<(), Failure> {
    let codec = TextCodec::load_dir(dir).map_err(Failure::input)?;
    for (key, value) in golden.json.as_object().into_iter().flatten() {
        match key.as_str() {
            "strings" => strings(&codec, golden.list("strings"), report),
            "chat" => chats(&codec, golden.list("chat"), report),
            "fim" => fim(&codec, value, report),
            "vocab_size_with_added" => report.same(key, &[Value::from(codec.vocabulary_size())], std::slice::from_ref(value)),
            "bos_id" => report.same(key, &codec.encode("", true), &single(value)),
            "eos_id" => report.same(key, codec.eos_token_ids(), &single(value)),
            note if NOTES.contains(&note) => {}
            unknown => report.fail(unknown, "not a quantity that this program knows"),
        }
    }
    golden.unasked().into_iter().for_each(|key| report.fail(key, "not a quantity that this program knows"));
    Ok(())
}

/// One row per property over all strings: 200 strings in 200 rows would hide the one that fails.
fn strings(codec: &TextCodec, strings: &[Value], report: &mut Report) {
    type Property = (&'static str, fn(&TextCodec, &str, &Value) -> Value);
    let properties: [Property; 4] = [
        ("ids", |codec, text, _| codec.encode(text, false).into()),
        ("ids_with_bos", |codec, text, _| codec.encode(text, true).into()),
        ("decoded", |codec, _, entry| codec.decode(&ids(&entry["ids"]).unwrap_or_default(), false).into()),
        ("decoded_skip_special", |codec, _, entry| codec.decode(&ids(&entry["ids"]).unwrap_or_default(), true).into()),
    ];
    for (name, compute) in properties {
        let found: Vec<Value> = strings.iter().map(|entry| compute(codec, text(entry), entry)).collect();
        let expected: Vec<Value> = strings.iter().map(|entry| entry[name].clone()).collect();
        report.same(&format!("strings.{name} ({})", strings.len()), &found, &expected);
    }
    let known = properties.map(|(name, _)| name);
    unknown_fields("strings", strings, &[&known[..], &["text"]].concat(), report);
}

fn chats(codec: &TextCodec, chats: &[Value], report: &mut Report) {
    for (i, entry) in chats.iter().enumerate() {
        let quantity = format!("chat[{i}]");
        let Some(messages) = messages(&entry["messages"]) else {
            report.fail(&quantity, "its messages cannot be read");
            continue;
        };
        match codec.render(&messages, entry["add_generation_prompt"].as_bool().unwrap_or(false)) {
            Ok(found) => report.same(&format!("{quantity}.text"), &[found.as_str()], &[text(entry)]),
            Err(error) => report.fail(&format!("{quantity}.text"), &error.to_string()),
        }
        // The rendered text holds its own BOS where the template writes one.
        report.same(&format!("{quantity}.ids"), &codec.encode(text(entry), false), &ids(&entry["ids"]).unwrap_or_default());
    }
    unknown_fields("chat", chats, &["messages", "add_generation_prompt", "text", "ids"], report);
}

/// A fill-in-the-middle prompt; `null` for tokenizers without its tokens.
fn fim(codec: &TextCodec, fim: &Value, report: &mut Report) {
    if !fim.is_null() {
        let expected = ids(&fim["ids_with_bos"]).unwrap_or_default();
        report.same("fim.ids_with_bos", &codec.encode(text(fim), true), &expected);
        match gap(text(fim)).map(|input| codec.prepare(&input, OutputKind::Text)) {
            Some(Ok(prepared)) => report.same("fim.prepared", &tokens(&prepared.segments), &expected),
            Some(Err(error)) => report.fail("fim.prepared", &error.to_string()),
            None => report.fail("fim.prepared", "its text cannot be read"),
        }
        unknown_fields("fim", std::slice::from_ref(fim), &["text", "ids_with_bos"], report);
    }
}

/// What a client would have sent for a rendered fill-in-the-middle prompt.
fn gap(rendered: &str) -> Option<Input> {
    let (prefix, rest) = rendered.strip_prefix("<｜fim▁begin｜>")?.split_once("<｜fim▁hole｜>")?;
    let suffix = rest.strip_suffix("<｜fim▁end｜>")?;
    Some(Input::Fim { prefix: prefix.to_owned(), suffix: suffix.to_owned() })
}

/// The ids of a prompt without pictures.
fn tokens(segments: &[PreparedSegment]) -> Vec<u32> {
    let ids = |segment: &PreparedSegment| if let PreparedSegment::Tokens(ids) = segment { ids.clone() } else { Vec::new() };
    segments.iter().flat_map(ids).collect()
}

/// Messages as the goldens write them: content is a text, or a list of parts whose pictures are left empty.
pub fn messages(value: &Value) -> Option<Vec<Message>> {
    let part = |part: &Value| match part["type"].as_str()? {
        "text" => Some(Part::Text(part["text"].as_str()?.to_owned())),
        "image" => Some(Part::Image(Bytes::new())),
        _ => None,
    };
    let message = |message: &Value| {
        let role = match message["role"].as_str()? {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            _ => return None,
        };
        let parts = match &message["content"] {
            Value::String(text) => vec![Part::Text(text.clone())],
            Value::Array(parts) => parts.iter().map(part).collect::<Option<_>>()?,
            _ => return None,
        };
        Some(Message { role, parts })
    };
    value.as_array()?.iter().map(message).collect()
}

/// Fields of list entries that nobody compares are quantities that nobody knows.
pub fn unknown_fields(list: &str, entries: &[Value], known: &[&str], report: &mut Report) {
    let keys = entries.iter().filter_map(Value::as_object).flat_map(|entry| entry.keys());
    let unknown: std::collections::BTreeSet<&String> = keys.filter(|key| !known.contains(&key.as_str())).collect();
    unknown.into_iter().for_each(|key| report.fail(&format!("{list}[].{key}"), "not a quantity that this program knows"));
}

fn text(entry: &Value) -> &str {
    entry["text"].as_str().unwrap_or_default()
}

fn single(value: &Value) -> Vec<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok()).into_iter().collect()
}
