use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use domain::{Input, Invalid, ModelCard, OutputKind, Part};
use proto::v1;
use wire::input::InputLimits;
use wire::sampling::{ImageRequest, TextRequest};

/// A request after it was checked against the limits and the model.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) input: Input,
    pub(crate) task: Task,
    /// Given by the client, or drawn. Choice i uses `seed + i`.
    pub(crate) seed: u64,
}

#[derive(Debug)]
pub(crate) enum Task {
    Text(TextRequest),
    Image(ImageRequest),
}

impl Request {
    /// Checks everything of `message` that can be checked before its prompt is tokenised.
    pub(crate) fn parse(message: v1::GenerateRequest, card: &ModelCard, limits: &InputLimits, max_tokens: u32) -> Result<Self, Invalid> {
        let input = wire::input::generate(message.input, limits)?;
        let paths = image_paths(&input);
        if let (Some(path), None) = (paths.first(), card.tokens_per_image) {
            return Err(Invalid::new(path, "the model takes no pictures"));
        }
        let task = match wire::input::output_kind(message.output)? {
            OutputKind::Text => {
                let wanted = message.sampling.as_ref().and_then(|sampling| sampling.max_tokens);
                if let Some(wanted) = wanted.filter(|&wanted| wanted > max_tokens) {
                    return Err(Invalid::new("sampling.max_tokens", format!("{wanted} is more than the limit of {max_tokens}")));
                }
                let text = wire::sampling::text(message.sampling, &card.default_sampling)?;
                Task::Text(text)
            }
            OutputKind::Image if matches!(input, Input::Fim { .. }) => {
                return Err(Invalid::new("output", "what fills a gap in a text is text"));
            }
            OutputKind::Image if message.sampling.as_ref().is_some_and(|sampling| sampling.constraint.is_some()) => {
                return Err(Invalid::new("sampling.constraint", "an image takes no constraint"));
            }
            OutputKind::Image => {
                let canvas = card.canvas.ok_or_else(|| Invalid::new("output", "the model draws no images"))?;
                message.image.iter().try_for_each(|image| wire::sampling::suits(image, canvas))?;
                Task::Image(wire::sampling::image(message.image, &card.default_image_sampling)?)
            }
        };
        let given = match &task {
            Task::Text(text) => text.given_seed,
            Task::Image(image) => image.given_seed,
        };
        Ok(Self { input, task, seed: given.unwrap_or_else(drawn_seed) })
    }

    pub(crate) fn output(&self) -> OutputKind {
        match self.task {
            Task::Text(_) => OutputKind::Text,
            Task::Image(_) => OutputKind::Image,
        }
    }

    pub(crate) fn choices(&self) -> u32 {
        match &self.task {
            Task::Text(text) => text.n,
            Task::Image(image) => image.n,
        }
    }

    /// The field that holds the prompt, for messages about it as a whole.
    pub(crate) fn field(&self) -> &'static str {
        match self.input {
            Input::Chat(_) => "chat",
            Input::Completion { .. } => "completion",
            Input::Fim { .. } => "fim",
        }
    }
}

/// Where each picture stands, in the client's words: `chat.messages[1].parts[0].image`.
pub(crate) fn image_paths(input: &Input) -> Vec<String> {
    let within = |parts: &[Part], prefix: &str| -> Vec<String> {
        let images = parts.iter().enumerate().filter(|(_, part)| matches!(part, Part::Image(_)));
        images.map(|(i, _)| format!("{prefix}.parts[{i}].image")).collect()
    };
    match input {
        Input::Chat(messages) => {
            messages.iter().enumerate().flat_map(|(i, message)| within(&message.parts, &format!("chat.messages[{i}]"))).collect()
        }
        Input::Completion { parts, .. } => within(parts, "completion"),
        Input::Fim { .. } => Vec::new(),
    }
}

/// 64 bits that nobody can foresee: the standard library seeds its hashers from the operating system.
fn drawn_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}
