use crate::{FlowState, Latent};

/// A token and the natural logarithm of its probability (after constraint and penalties, before temperature and truncation).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logprob {
    pub token_id: u32,
    pub logprob: f32,
}

/// The log-probabilities at one output position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub chosen: Logprob,
    /// The most likely tokens, best first.
    pub top: Vec<Logprob>,
}

/// Why an output ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-sentence, a stop string, a constraint after which nothing may follow, or a complete image.
    Stop,
    /// `max_tokens` or the model's context.
    Length,
}

/// What the language model emits for one job: one `Prefilled`, then outputs or steps of a flow, then `Finished`. `Degraded` may
/// come before any of them but the last.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Prefilled {
        prompt_tokens: u32,
        cached_tokens: u32,
    },
    /// A token id (text) or a VQ code (image).
    Output {
        id: u32,
        logprobs: Option<TokenLogprobs>,
    },
    /// So many positions since the last such event lost an expert. Comes before the output that follows from them.
    Degraded(u32),
    /// A step of a flow.
    Flow {
        state: FlowState,
        /// Steps in all.
        total: u32,
        /// What the finished map would be if the velocity stayed as it is, when it was asked for.
        estimate: Option<Latent>,
    },
    Finished(FinishReason),
}
