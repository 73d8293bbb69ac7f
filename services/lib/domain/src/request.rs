use bytes::Bytes;

/// What a client wants answered or continued.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A conversation for the checkpoint's chat template.
    Chat(Vec<Message>),
    /// Raw text and pictures to continue; special-token strings count as special tokens.
    Completion {
        parts: Vec<Part>,
        /// Begin with the beginning-of-sentence token where the tokenizer's configuration asks for it.
        bos: bool,
    },
    /// A text with a gap to fill; special-token strings are ordinary text.
    Fim { prefix: String, suffix: String },
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    pub role: Role,
    pub parts: Vec<Part>,
}

/// Who said a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
}

/// A piece of a message or prompt, in the client's order.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    Text(String),
    /// An encoded picture. Inside the tokenizer its bytes are empty: only the order of pictures counts there.
    Image(Bytes),
}

/// What a request asks the model to produce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputKind {
    Text,
    Image,
}

impl Input {
    /// All parts in the order in which the client wrote them; a text with a gap has none.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        let (messages, parts): (&[Message], &[Part]) = match self {
            Self::Chat(messages) => (messages, &[]),
            Self::Completion { parts, .. } => (&[], parts),
            Self::Fim { .. } => (&[], &[]),
        };
        messages.iter().flat_map(|message| &message.parts).chain(parts)
    }

    /// The texts, in order.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let around = match self {
            Self::Fim { prefix, suffix } => [Some(prefix.as_str()), Some(suffix.as_str())],
            Self::Chat(_) | Self::Completion { .. } => [None, None],
        };
        let parts = self.parts().filter_map(|part| match part {
            Part::Text(text) => Some(text.as_str()),
            Part::Image(_) => None,
        });
        parts.chain(around.into_iter().flatten())
    }

    /// The pictures, in order.
    pub fn images(&self) -> impl Iterator<Item = &Bytes> {
        self.parts().filter_map(|part| match part {
            Part::Image(data) => Some(data),
            Part::Text(_) => None,
        })
    }
}
