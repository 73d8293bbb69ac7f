//! What the tests ask, and what they read out of the answers.

use bytes::Bytes;
use proto::v1;
use proto::v1::generate_response::Event;

use super::MODEL;

pub fn text_part(text: &str) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Text(text.to_owned())) }
}

pub fn image_part(data: &'static [u8]) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Image(v1::ImagePart { data: Bytes::from_static(data) })) }
}

/// A user's message of `parts`, answered with `max_tokens` tokens from seed 0.
pub fn chat(parts: Vec<v1::Part>, max_tokens: u32) -> v1::GenerateRequest {
    let message = v1::Message { role: v1::Role::User.into(), parts };
    v1::GenerateRequest {
        model: MODEL.to_owned(),
        input: Some(v1::generate_request::Input::Chat(v1::Conversation { messages: vec![message] })),
        sampling: Some(v1::Sampling { seed: Some(0), max_tokens: Some(max_tokens), ..v1::Sampling::default() }),
        ..v1::GenerateRequest::default()
    }
}

pub fn draw(prompt: &str, image: v1::ImageSampling) -> v1::GenerateRequest {
    v1::GenerateRequest { output: v1::OutputKind::Image.into(), image: Some(image), sampling: None, ..chat(vec![text_part(prompt)], 1) }
}

/// The text of one choice.
pub fn text_of(events: &[Event], choice: u32) -> String {
    let text = |event: &Event| match event {
        Event::Text(delta) if delta.choice == choice => Some(delta.text.clone()),
        _ => None,
    };
    events.iter().filter_map(text).collect()
}

/// The token ids of one choice.
pub fn ids_of(events: &[Event], choice: u32) -> Vec<u32> {
    let ids = |event: &Event| match event {
        Event::Text(delta) if delta.choice == choice => delta.token_ids.clone(),
        _ => Vec::new(),
    };
    events.iter().flat_map(ids).collect()
}

pub fn finish_of(events: &[Event], choice: u32) -> Option<v1::FinishReason> {
    events.iter().find_map(|event| match event {
        Event::Finished(finished) if finished.choice == choice => v1::FinishReason::try_from(finished.reason).ok(),
        _ => None,
    })
}

pub fn usage_of(events: &[Event]) -> v1::Usage {
    match events.last() {
        Some(Event::Completed(completed)) => completed.usage.unwrap(),
        other => panic!("the last event is {other:?}"),
    }
}
