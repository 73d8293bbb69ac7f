use crate::{ImageSampling, Latent, Prompt, Sampling};

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
    /// The latent map of an image, reached from noise in steps.
    Flow {
        /// The beginning of the prompt that unconditional rows see, at the prompt's first positions. What follows the prompt stands at the
        /// same rotary positions for both.
        unconditional: Prompt,
        sampling: ImageSampling,
        /// Estimate the finished map after every so many steps.
        estimate_every: Option<u32>,
        /// Where an earlier worker has come to; `None` begins with the noise of the seed.
        from: Option<FlowState>,
    },
}

/// A flow between two steps.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowState {
    /// Steps taken.
    pub done: u32,
    /// The map after them.
    pub z: Latent,
}
