/// How the next text token is drawn. Every value is in range; see `proto/janua/v1/common.proto` for the ranges.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 = greedy.
    pub temperature: f32,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: u32,
    /// 0 = off.
    pub min_p: f32,
    pub seed: u64,
    /// `None`: as many as the context holds.
    pub max_tokens: Option<u32>,
    /// `None`: no log-probabilities; otherwise how many alternatives beside the chosen token.
    pub top_logprobs: Option<u32>,
    /// 1 = off.
    pub repetition_penalty: f32,
    /// 0 = off.
    pub frequency_penalty: f32,
    /// 0 = off.
    pub presence_penalty: f32,
    pub ignore_eos: bool,
    /// `None`: the text may be anything.
    pub constraint: Option<Constraint>,
    /// Whether experts that nobody can compute are left out, instead of the request failing.
    pub allow_expert_loss: bool,
}

/// What a text must look like as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Constraint {
    /// A JSON document that is valid under this JSON Schema.
    JsonSchema(String),
    /// A regular expression.
    Regex(String),
    /// A context-free grammar in llguidance's dialect of Lark.
    Lark(String),
}

impl Constraint {
    /// The field of a request that holds it, for messages about it.
    pub fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "sampling.constraint.json_schema",
            Self::Regex(_) => "sampling.constraint.regex",
            Self::Lark(_) => "sampling.constraint.lark",
        }
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            max_tokens: None,
            top_logprobs: None,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            ignore_eos: false,
            constraint: None,
            allow_expert_loss: false,
        }
    }
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }
}

/// How an image is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageSampling {
    /// `uncond + guidance * (cond - uncond)`.
    pub guidance: f32,
    /// 0 = greedy. Means nothing to a flow.
    pub temperature: f32,
    pub seed: u64,
    /// Steps of a flow; means nothing to codes.
    pub steps: u32,
    /// How a flow takes a step.
    pub solver: Solver,
}

impl Default for ImageSampling {
    /// The defaults of Janus and, for the steps, of JanusFlow (spec: janus.md section 4, janusflow.md section 2).
    fn default() -> Self {
        Self { guidance: 5.0, temperature: 1.0, seed: 0, steps: 30, solver: Solver::Euler }
    }
}

/// How a step of a flow is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Solver {
    /// First order: one evaluation.
    #[default]
    Euler,
    /// Second order: the mean of the velocities at both ends.
    Heun,
    /// Second order: the velocity in the middle.
    Midpoint,
}

impl Solver {
    /// As written in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Euler => "euler",
            Self::Heun => "heun",
            Self::Midpoint => "midpoint",
        }
    }
}

/// Encoding of a finished image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImageFormat {
    #[default]
    Png,
    /// Lossless.
    WebP,
}
