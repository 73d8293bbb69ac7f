//! Conversations and completions.

use bytes::Bytes;
use domain::{Input, Invalid, Message, OutputKind, Part, Role};
use proto::v1;

/// What a request may hold at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputLimits {
    pub messages: usize,
    pub images: usize,
    /// All text parts together.
    pub text_bytes: usize,
    /// One encoded picture.
    pub image_bytes: usize,
}

impl Default for InputLimits {
    fn default() -> Self {
        Self { messages: 1024, images: 32, text_bytes: 4 << 20, image_bytes: 32 << 20 }
    }
}

/// The `chat` field of a request.
pub fn chat(conversation: v1::Conversation, limits: &InputLimits) -> Result<Input, Invalid> {
    if conversation.messages.is_empty() {
        return Err(Invalid::new("chat.messages", "a conversation needs at least one message"));
    }
    if conversation.messages.len() > limits.messages {
        return Err(Invalid::new(
            "chat.messages",
            format!("{} messages, at most {} are taken", conversation.messages.len(), limits.messages),
        ));
    }
    let messages = conversation
        .messages
        .into_iter()
        .enumerate()
        .map(|(i, message)| self::message(message, &format!("chat.messages[{i}]")))
        .collect::<Result<_, _>>()?;
    within(Input::Chat(messages), "chat", limits)
}

/// The `completion` field of a request.
pub fn completion(completion: v1::Completion, limits: &InputLimits) -> Result<Input, Invalid> {
    if completion.parts.is_empty() {
        return Err(Invalid::new("completion.parts", "a completion needs at least one part"));
    }
    let parts = self::parts(completion.parts, "completion")?;
    within(Input::Completion { parts, bos: !completion.omit_bos }, "completion", limits)
}

/// The `fim` field of a request.
pub fn fim(fim: v1::FillInTheMiddle, limits: &InputLimits) -> Result<Input, Invalid> {
    within(Input::Fim { prefix: fim.prefix, suffix: fim.suffix }, "fim", limits)
}

/// The input of `GenerateRequest`.
pub fn generate(input: Option<v1::generate_request::Input>, limits: &InputLimits) -> Result<Input, Invalid> {
    match input {
        Some(v1::generate_request::Input::Chat(conversation)) => chat(conversation, limits),
        Some(v1::generate_request::Input::Completion(completion)) => self::completion(completion, limits),
        Some(v1::generate_request::Input::Fim(fim)) => self::fim(fim, limits),
        None => Err(Invalid::new("input", "one of `chat`, `completion` and `fim` is needed")),
    }
}

/// A conversation for the wire.
pub fn to_conversation(messages: &[Message]) -> v1::Conversation {
    let messages =
        messages.iter().map(|message| v1::Message { role: to_role(message.role).into(), parts: to_parts(&message.parts) }).collect();
    v1::Conversation { messages }
}

/// Prompt parts for the wire.
pub fn to_parts(parts: &[Part]) -> Vec<v1::Part> {
    let part = |part: &Part| match part {
        Part::Text(text) => v1::part::Part::Text(text.clone()),
        Part::Image(data) => v1::part::Part::Image(v1::ImagePart { data: data.clone() }),
    };
    parts.iter().map(|p| v1::Part { part: Some(part(p)) }).collect()
}

/// The same input without the bytes of its pictures: what the tokenizer needs to see.
pub fn without_pixels(input: &Input) -> Input {
    let strip = |parts: &[Part]| -> Vec<Part> {
        parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => Part::Text(text.clone()),
                Part::Image(_) => Part::Image(Bytes::new()),
            })
            .collect()
    };
    match input {
        Input::Chat(messages) => Input::Chat(messages.iter().map(|m| Message { role: m.role, parts: strip(&m.parts) }).collect()),
        Input::Completion { parts, bos } => Input::Completion { parts: strip(parts), bos: *bos },
        Input::Fim { .. } => input.clone(),
    }
}

/// What a request asks for; absent means text.
pub fn output_kind(value: i32) -> Result<OutputKind, Invalid> {
    match v1::OutputKind::try_from(value) {
        Ok(v1::OutputKind::Unspecified | v1::OutputKind::Text) => Ok(OutputKind::Text),
        Ok(v1::OutputKind::Image) => Ok(OutputKind::Image),
        Err(_) => Err(Invalid::new("output", format!("{value} is not an OutputKind"))),
    }
}

/// An output kind for the wire.
pub fn to_output_kind(kind: OutputKind) -> v1::OutputKind {
    match kind {
        OutputKind::Text => v1::OutputKind::Text,
        OutputKind::Image => v1::OutputKind::Image,
    }
}

fn message(message: v1::Message, field: &str) -> Result<Message, Invalid> {
    let role = match v1::Role::try_from(message.role) {
        Ok(v1::Role::System) => Role::System,
        Ok(v1::Role::User) => Role::User,
        Ok(v1::Role::Assistant) => Role::Assistant,
        Ok(v1::Role::Unspecified) | Err(_) => {
            return Err(Invalid::new(format!("{field}.role"), "the role must be system, user or assistant"));
        }
    };
    if message.parts.is_empty() {
        return Err(Invalid::new(format!("{field}.parts"), "a message needs at least one part"));
    }
    Ok(Message { role, parts: parts(message.parts, field)? })
}

fn parts(parts: Vec<v1::Part>, field: &str) -> Result<Vec<Part>, Invalid> {
    let part = |(i, part): (usize, v1::Part)| match part.part {
        Some(v1::part::Part::Text(text)) => Ok(Part::Text(text)),
        Some(v1::part::Part::Image(image)) => Ok(Part::Image(image.data)),
        None => Err(Invalid::new(format!("{field}.parts[{i}]"), "a part is either text or an image")),
    };
    parts.into_iter().enumerate().map(part).collect()
}

fn within(input: Input, field: &str, limits: &InputLimits) -> Result<Input, Invalid> {
    let images = input.images().count();
    let text_bytes: usize = input.texts().map(str::len).sum();
    if let Some((index, data)) = input.images().enumerate().find(|(_, data)| data.len() > limits.image_bytes) {
        let reason = format!("picture {index} has {} bytes, at most {} are taken", data.len(), limits.image_bytes);
        return Err(Invalid::new(format!("{field}.image"), reason));
    }
    if images > limits.images {
        return Err(Invalid::new(format!("{field}.image"), format!("{images} pictures, at most {} are taken", limits.images)));
    }
    if text_bytes > limits.text_bytes {
        return Err(Invalid::new(format!("{field}.text"), format!("{text_bytes} bytes of text, at most {} are taken", limits.text_bytes)));
    }
    if images == 0 && text_bytes == 0 {
        return Err(Invalid::new(field, "the prompt is empty"));
    }
    Ok(input)
}

fn to_role(role: Role) -> v1::Role {
    match role {
        Role::System => v1::Role::System,
        Role::User => v1::Role::User,
        Role::Assistant => v1::Role::Assistant,
    }
}
