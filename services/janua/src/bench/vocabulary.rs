//! A tokenizer of real size out of a small one of the repository: more tokens and as many merges, in the same order of growth as the
//! published ones, so that loading and encoding take as long.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::recipe::Voice;
use crate::Failure;

/// Rows of the embedding table that stay without a token, as in the published models.
const SPARE: usize = 64;

impl Voice {
    /// `tokenizer.json` and `tokenizer_config.json` as the repository has them.
    fn files(self) -> [&'static str; 2] {
        macro_rules! files {
            ($name:literal) => {
                [
                    include_str!(concat!("../../../../tests/fixtures/tokenizers/", $name, "/tokenizer.json")),
                    include_str!(concat!("../../../../tests/fixtures/tokenizers/", $name, "/tokenizer_config.json")),
                ]
            };
        }
        match self {
            Self::Llm => files!("llm"),
            Self::V2 => files!("v2"),
            Self::Vl => files!("vl"),
            Self::Janus => files!("janus"),
        }
    }
}

/// `tokenizer.json` with nearly `rows` tokens, and `tokenizer_config.json`.
pub fn files(voice: Voice, rows: usize) -> Result<[Value; 2], Failure> {
    let [tokenizer, config] = voice.files().map(|text| serde_json::from_str::<Value>(text).map_err(Failure::software));
    let (mut tokenizer, config) = (tokenizer?, config?);
    grow(&mut tokenizer, rows.saturating_sub(SPARE)).ok_or_else(|| Failure::software("a tokenizer that cannot be grown"))?;
    Ok([tokenizer, config])
}

/// Adds tokens, each the merger of two that are there, until there are `size` ids. New merges rank behind the old ones.
fn grow(tokenizer: &mut Value, size: usize) -> Option<()> {
    let added = tokenizer["added_tokens"].as_array()?;
    let mut known: HashSet<String> = added.iter().filter_map(|token| token["content"].as_str()).map(str::to_owned).collect();
    let last_added = added.iter().filter_map(|token| token["id"].as_u64()).max().unwrap_or(0);
    let model = tokenizer["model"].as_object_mut()?;
    let vocabulary = model.get_mut("vocab")?.as_object_mut()?;
    let mut parts: Vec<(u64, String)> = vocabulary.iter().filter_map(|(text, id)| Some((id.as_u64()?, text.clone()))).collect();
    parts.sort_unstable();
    known.extend(parts.iter().map(|(_, text)| text.clone()));
    let mut next = parts.last().map_or(0, |(id, _)| *id).max(last_added) + 1;
    let mut merges = Vec::new();
    // Longer tokens first: those that begin with what is already a merger are the ones that text comes across.
    for (_, left) in parts.iter().rev() {
        for (_, right) in parts.iter().rev() {
            if next >= size as u64 {
                break;
            }
            let merged = format!("{left}{right}");
            if known.insert(merged.clone()) {
                merges.push(json!([left, right]));
                vocabulary.insert(merged, next.into());
                next += 1;
            }
        }
    }
    model.get_mut("merges")?.as_array_mut()?.extend(merges);
    Some(())
}
