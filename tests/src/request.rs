//! Requests of the public API.

use proto::v1;
use proto::v1::generate_request::Input;

/// A text part.
pub fn text(text: &str) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Text(text.to_owned())) }
}

/// A picture part.
pub fn picture(data: impl Into<bytes::Bytes>) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Image(v1::ImagePart { data: data.into() })) }
}

/// One user message.
pub fn chat(parts: Vec<v1::Part>) -> Input {
    Input::Chat(v1::Conversation { messages: vec![v1::Message { role: v1::Role::User.into(), parts }] })
}

/// Raw parts.
pub fn completion(parts: Vec<v1::Part>) -> Input {
    Input::Completion(v1::Completion { parts, omit_bos: false })
}

/// Greedy, exactly `max_tokens` long.
pub fn greedy(max_tokens: u32) -> v1::Sampling {
    v1::Sampling { temperature: Some(0.0), max_tokens: Some(max_tokens), ignore_eos: true, ..v1::Sampling::default() }
}

/// A request for text.
pub fn for_text(model: &str, input: Input, sampling: v1::Sampling) -> v1::GenerateRequest {
    v1::GenerateRequest { model: model.to_owned(), input: Some(input), sampling: Some(sampling), ..v1::GenerateRequest::default() }
}

/// A request for a picture.
pub fn for_image(model: &str, input: Input, image: v1::ImageSampling) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: model.to_owned(),
        input: Some(input),
        output: v1::OutputKind::Image.into(),
        image: Some(image),
        ..v1::GenerateRequest::default()
    }
}
