use std::sync::Arc;

/// What the language model reads: tokens and picture embeddings, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prompt {
    pub segments: Vec<Segment>,
}

/// A run of positions of one kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Segment {
    Tokens(Vec<u32>),
    Embeddings(Embeddings),
}

/// Rows that stand where token embeddings would, in the language model's hidden size.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    /// Values per row.
    pub width: usize,
    /// Row-major `[rows, width]`, f32.
    pub values: Arc<[f32]>,
}

impl Embeddings {
    /// Number of positions.
    pub fn rows(&self) -> usize {
        self.values.len() / self.width.max(1)
    }
}

impl Segment {
    /// Number of positions.
    pub fn len(&self) -> usize {
        match self {
            Self::Tokens(ids) => ids.len(),
            Self::Embeddings(embeddings) => embeddings.rows(),
        }
    }

    /// Whether the segment covers no position.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Prompt {
    /// A prompt of tokens alone.
    pub fn tokens(ids: Vec<u32>) -> Self {
        Self { segments: vec![Segment::Tokens(ids)] }
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.segments.iter().map(Segment::len).sum()
    }

    /// Whether the prompt covers no position.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
