use proto::v1;
use serde_json::Value;

use crate::request::{self, completion, picture, text};

/// The reference outputs of a fixture that can be seen through the public door.
pub struct Golden {
    pub model: String,
    pub prompts: Vec<GoldenPrompt>,
    pub drawings: Vec<Drawing>,
}

/// A prompt with its greedy continuation.
pub struct GoldenPrompt {
    /// Asks for exactly the tokens in `ids`.
    pub request: v1::GenerateRequest,
    pub prompt_tokens: usize,
    pub ids: Vec<u32>,
    /// Where the reference wrote it down.
    pub text: Option<String>,
}

/// A text-to-image prompt with its greedy codes and the decoded picture.
pub struct Drawing {
    pub request: v1::GenerateRequest,
    pub codes: Vec<u32>,
    pub picture: pixels::Rgb,
}

impl Golden {
    /// The fixture called `model`.
    pub fn read(model: &str) -> Self {
        let file = std::fs::read(testkit::fixture(model).join("golden.json")).unwrap();
        let json: Value = serde_json::from_slice(&file).unwrap();
        let list = |key: &str| json[key].as_array().cloned().unwrap_or_default();
        let prompts: Vec<_> = list("prompts").iter().map(|entry| prompt(model, entry)).collect();
        let drawings = list("text_to_image").iter().map(|entry| drawing(model, entry)).collect();
        assert!(!prompts.is_empty(), "{model} has no golden prompts");
        Self { model: model.to_owned(), prompts, drawings }
    }
}

fn prompt(model: &str, entry: &Value) -> GoldenPrompt {
    let ids = ids(&entry["generated_ids"]);
    let input = match (entry["prompt"].as_str(), entry.get("messages")) {
        (Some(prompt), _) => completion(vec![text(prompt)]),
        (None, Some(_)) => conversation(model, entry),
        (None, None) => illustrated(model, entry),
    };
    GoldenPrompt {
        request: request::for_text(model, input, request::greedy(ids.len() as u32)),
        prompt_tokens: entry["input_ids"].as_array().unwrap().len(),
        ids,
        text: entry["generated_text"].as_str().map(str::to_owned),
    }
}

/// A text with a placeholder for each of its pictures.
fn illustrated(model: &str, entry: &Value) -> v1::generate_request::Input {
    let mut files = entry["images"].as_array().unwrap().iter().map(|name| testkit::fixture(model).join(name.as_str().unwrap()));
    let mut pieces = entry["text"].as_str().unwrap().split("<image_placeholder>");
    let mut parts = vec![text(pieces.next().unwrap())];
    parts.extend(pieces.flat_map(|piece| [picture(std::fs::read(files.next().unwrap()).unwrap()), text(piece)]));
    completion(parts)
}

fn conversation(model: &str, entry: &Value) -> v1::generate_request::Input {
    let mut files = entry["images"].as_array().unwrap().iter().map(|name| testkit::fixture(model).join(name.as_str().unwrap()));
    let mut part = |part: &Value| match part["type"].as_str().unwrap() {
        "text" => text(part["text"].as_str().unwrap()),
        "image" => picture(std::fs::read(files.next().unwrap()).unwrap()),
        other => panic!("a part of kind {other}"),
    };
    let mut message = |message: &Value| {
        let role = match message["role"].as_str().unwrap() {
            "system" => v1::Role::System,
            "user" => v1::Role::User,
            "assistant" => v1::Role::Assistant,
            other => panic!("a message of {other}"),
        };
        v1::Message { role: role.into(), parts: message["content"].as_array().unwrap().iter().map(&mut part).collect() }
    };
    let messages = entry["messages"].as_array().unwrap().iter().map(&mut message).collect();
    v1::generate_request::Input::Chat(v1::Conversation { messages })
}

fn drawing(model: &str, entry: &Value) -> Drawing {
    let sampling = v1::ImageSampling {
        temperature: Some(0.0),
        guidance: Some(entry["cfg_weight"].as_f64().unwrap() as f32),
        seed: Some(1),
        ..v1::ImageSampling::default()
    };
    let png = std::fs::read(testkit::fixture(model).join(entry["png"].as_str().unwrap())).unwrap();
    Drawing {
        request: request::for_image(model, completion(vec![text(entry["text"].as_str().unwrap())]), sampling),
        codes: ids(&entry["image_ids"]),
        picture: pixels::decode(&png, &pixels::Limits::default()).unwrap(),
    }
}

fn ids(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}
