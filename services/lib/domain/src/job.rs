use crate::{ImageSampling, Prompt, Sampling};

/// One sequence for the language model (a pair, with guidance).
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub prompt: Prompt,
    pub mode: Mode,
    /// Outputs that an earlier worker has already produced: generation goes on after them as if it had never stopped.
    pub emitted: Vec<u32>,
}

/// What a job produces.
#[derive(Debug, Clone, PartialEq)]
pub enum Mode {
    Text {
        sampling: Sampling,
        /// Tokens that end the output; they are emitted as the last output.
        eos_token_ids: Vec<u32>,
    },
    /// As many codes as the model's code grid has cells.
    Image {
        /// Guidance pair of the prompt, of the same length.
        unconditional: Prompt,
        sampling: ImageSampling,
    },
}
