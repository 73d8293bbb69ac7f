//! Sampling parameters: ranges, defaults, and the way back.

use domain::{Canvas, Constraint, ImageFormat, ImageSampling, Invalid, Sampling, Solver};
use proto::v1;

/// Most completions or images that one request may ask for.
pub const MAX_CHOICES: u32 = 16;
/// Most steps of a flow.
pub const MAX_STEPS: u32 = 1000;
/// Most alternatives per position that log-probabilities may list.
pub const MAX_TOP_LOGPROBS: u32 = 20;
const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_CONSTRAINT_BYTES: usize = 64 << 10;

/// Text sampling as a client asked for it.
#[derive(Debug, Clone, PartialEq)]
pub struct TextRequest {
    /// `seed` holds `given_seed`, or 0.
    pub sampling: Sampling,
    pub given_seed: Option<u64>,
    pub stop: Vec<String>,
    /// 1..=[`MAX_CHOICES`].
    pub n: u32,
}

/// Image sampling as a client asked for it.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRequest {
    /// `seed` holds `given_seed`, or 0.
    pub sampling: ImageSampling,
    pub given_seed: Option<u64>,
    /// 1..=[`MAX_CHOICES`].
    pub n: u32,
    /// `None`: no previews.
    pub preview_every: Option<u32>,
    pub format: ImageFormat,
}

/// The `sampling` field of a request; what is absent comes from `defaults`.
pub fn text(sampling: Option<v1::Sampling>, defaults: &Sampling) -> Result<TextRequest, Invalid> {
    let s = sampling.unwrap_or_default();
    let n = s.n.unwrap_or(1);
    count("sampling.n", n, 1, MAX_CHOICES)?;
    if let Some(max_tokens) = s.max_tokens {
        count("sampling.max_tokens", max_tokens, 1, u32::MAX)?;
    }
    if let Some(top) = s.top_logprobs {
        count("sampling.top_logprobs", top, 0, MAX_TOP_LOGPROBS)?;
    }
    stop_strings("sampling.stop", &s.stop)?;
    let constraint = s.constraint.map(constraint).transpose()?;
    if constraint.is_some() && s.ignore_eos {
        return Err(Invalid::new("sampling.ignore_eos", "a constraint says where the text ends: nothing can follow it"));
    }
    let resolved = Sampling {
        temperature: real("sampling.temperature", s.temperature, defaults.temperature, 0.0, 100.0)?,
        top_p: above_zero("sampling.top_p", s.top_p, defaults.top_p, 1.0)?,
        top_k: s.top_k.unwrap_or(defaults.top_k),
        min_p: real("sampling.min_p", s.min_p, defaults.min_p, 0.0, 1.0)?,
        seed: s.seed.unwrap_or(0),
        max_tokens: s.max_tokens.or(defaults.max_tokens),
        top_logprobs: s.top_logprobs,
        repetition_penalty: above_zero("sampling.repetition_penalty", s.repetition_penalty, defaults.repetition_penalty, 10.0)?,
        frequency_penalty: real("sampling.frequency_penalty", s.frequency_penalty, defaults.frequency_penalty, -2.0, 2.0)?,
        presence_penalty: real("sampling.presence_penalty", s.presence_penalty, defaults.presence_penalty, -2.0, 2.0)?,
        ignore_eos: s.ignore_eos,
        allow_expert_loss: s.allow_expert_loss,
        constraint,
    };
    Ok(TextRequest { sampling: resolved, given_seed: s.seed, stop: s.stop, n })
}

/// The `image` field of a request; what is absent comes from `defaults`.
pub fn image(sampling: Option<v1::ImageSampling>, defaults: &ImageSampling) -> Result<ImageRequest, Invalid> {
    let s = sampling.unwrap_or_default();
    let n = s.n.unwrap_or(1);
    count("image.n", n, 1, MAX_CHOICES)?;
    let resolved = ImageSampling {
        guidance: real("image.guidance", s.guidance, defaults.guidance, 0.0, 100.0)?,
        temperature: real("image.temperature", s.temperature, defaults.temperature, 0.0, 100.0)?,
        seed: s.seed.unwrap_or(0),
        steps: s.steps.unwrap_or(defaults.steps),
        solver: solver("image.solver", s.solver, defaults.solver)?,
    };
    count("image.steps", resolved.steps, 1, MAX_STEPS)?;
    let preview_every = s.preview_every.filter(|&every| every > 0);
    Ok(ImageRequest { sampling: resolved, given_seed: s.seed, n, preview_every, format: format("image.format", s.format)? })
}

/// Refuses what means nothing to a model whose images are made of `canvas`: a client that sets it expects something that will not happen.
pub fn suits(sampling: &v1::ImageSampling, canvas: Canvas) -> Result<(), Invalid> {
    let (steps, solver, temperature) = (sampling.steps.is_some(), sampling.solver != 0, sampling.temperature.is_some());
    let (field, reason) = match canvas {
        Canvas::Codes(_) if steps => ("image.steps", "this model draws code by code: it has no steps"),
        Canvas::Codes(_) if solver => ("image.solver", "this model draws code by code: it has no steps to solve"),
        Canvas::Latent(_) if temperature => ("image.temperature", "this model draws by a flow: it has no temperature"),
        Canvas::Codes(_) | Canvas::Latent(_) => return Ok(()),
    };
    Err(Invalid::new(field, reason))
}

/// How a step of a flow is taken; absent means `default`.
fn solver(field: &str, value: i32, default: Solver) -> Result<Solver, Invalid> {
    match v1::FlowSolver::try_from(value) {
        Ok(v1::FlowSolver::Unspecified) => Ok(default),
        Ok(v1::FlowSolver::Euler) => Ok(Solver::Euler),
        Ok(v1::FlowSolver::Heun) => Ok(Solver::Heun),
        Ok(v1::FlowSolver::Midpoint) => Ok(Solver::Midpoint),
        Err(_) => Err(Invalid::new(field, format!("{value} is not a FlowSolver"))),
    }
}

/// An image format; absent means PNG.
pub fn format(field: &str, value: i32) -> Result<ImageFormat, Invalid> {
    match v1::ImageFormat::try_from(value) {
        Ok(v1::ImageFormat::Unspecified | v1::ImageFormat::Png) => Ok(ImageFormat::Png),
        Ok(v1::ImageFormat::Webp) => Ok(ImageFormat::WebP),
        Err(_) => Err(Invalid::new(field, format!("{value} is not an ImageFormat"))),
    }
}

/// Resolved text sampling for the wire: every field set.
pub fn to_text(s: &Sampling) -> v1::Sampling {
    v1::Sampling {
        temperature: Some(s.temperature),
        top_p: Some(s.top_p),
        top_k: Some(s.top_k),
        min_p: Some(s.min_p),
        seed: Some(s.seed),
        max_tokens: s.max_tokens,
        stop: Vec::new(),
        top_logprobs: s.top_logprobs,
        repetition_penalty: Some(s.repetition_penalty),
        frequency_penalty: Some(s.frequency_penalty),
        presence_penalty: Some(s.presence_penalty),
        ignore_eos: s.ignore_eos,
        allow_expert_loss: s.allow_expert_loss,
        n: None,
        constraint: s.constraint.as_ref().map(to_constraint),
    }
}

/// Resolved sampling of codes for the wire.
pub fn to_image(s: &ImageSampling) -> v1::ImageSampling {
    v1::ImageSampling { guidance: Some(s.guidance), temperature: Some(s.temperature), seed: Some(s.seed), ..v1::ImageSampling::default() }
}

/// Resolved sampling of a flow for the wire.
pub fn to_flow(s: &ImageSampling) -> v1::ImageSampling {
    v1::ImageSampling {
        guidance: Some(s.guidance),
        seed: Some(s.seed),
        steps: Some(s.steps),
        solver: to_solver(s.solver).into(),
        ..v1::ImageSampling::default()
    }
}

/// A solver for the wire.
pub fn to_solver(solver: Solver) -> v1::FlowSolver {
    match solver {
        Solver::Euler => v1::FlowSolver::Euler,
        Solver::Heun => v1::FlowSolver::Heun,
        Solver::Midpoint => v1::FlowSolver::Midpoint,
    }
}

/// An image format for the wire.
pub fn to_format(format: ImageFormat) -> v1::ImageFormat {
    match format {
        ImageFormat::Png => v1::ImageFormat::Png,
        ImageFormat::WebP => v1::ImageFormat::Webp,
    }
}

/// A constraint that says something, in a size that can be worked on. Whether it makes sense is for the language service to find out.
fn constraint(message: v1::Constraint) -> Result<Constraint, Invalid> {
    let constraint = match message.constraint {
        Some(v1::constraint::Constraint::JsonSchema(text)) => Constraint::JsonSchema(text),
        Some(v1::constraint::Constraint::Regex(text)) => Constraint::Regex(text),
        Some(v1::constraint::Constraint::Lark(text)) => Constraint::Lark(text),
        None => return Err(Invalid::new("sampling.constraint", "one of `json_schema`, `regex` and `lark` is needed")),
    };
    let (Constraint::JsonSchema(text) | Constraint::Regex(text) | Constraint::Lark(text)) = &constraint;
    match text.len() {
        0 => Err(Invalid::new(constraint.field(), "empty")),
        bytes if bytes > MAX_CONSTRAINT_BYTES => {
            Err(Invalid::new(constraint.field(), format!("{bytes} bytes, at most {MAX_CONSTRAINT_BYTES} are taken")))
        }
        _ => Ok(constraint),
    }
}

fn to_constraint(constraint: &Constraint) -> v1::Constraint {
    let constraint = match constraint {
        Constraint::JsonSchema(text) => v1::constraint::Constraint::JsonSchema(text.clone()),
        Constraint::Regex(text) => v1::constraint::Constraint::Regex(text.clone()),
        Constraint::Lark(text) => v1::constraint::Constraint::Lark(text.clone()),
    };
    v1::Constraint { constraint: Some(constraint) }
}

fn real(field: &str, value: Option<f32>, default: f32, low: f32, high: f32) -> Result<f32, Invalid> {
    let value = value.unwrap_or(default);
    // A NaN is in no range, so it is refused here as well.
    if (low..=high).contains(&value) { Ok(value) } else { Err(Invalid::new(field, format!("{value} is not in {low}..={high}"))) }
}

fn above_zero(field: &str, value: Option<f32>, default: f32, high: f32) -> Result<f32, Invalid> {
    let value = value.unwrap_or(default);
    if value > 0.0 && value <= high { Ok(value) } else { Err(Invalid::new(field, format!("{value} is not above 0 and at most {high}"))) }
}

fn count(field: &str, value: u32, low: u32, high: u32) -> Result<(), Invalid> {
    if (low..=high).contains(&value) { Ok(()) } else { Err(Invalid::new(field, format!("{value} is not in {low}..={high}"))) }
}

/// Refuses too many stop strings, and ones that are empty or too long.
pub fn stop_strings(field: &str, stop: &[String]) -> Result<(), Invalid> {
    if stop.len() > MAX_STOP_STRINGS {
        return Err(Invalid::new(field, format!("{} stop strings, at most {MAX_STOP_STRINGS} are taken", stop.len())));
    }
    match stop.iter().position(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
        Some(i) => Err(Invalid::new(format!("{field}[{i}]"), format!("a stop string has 1 to {MAX_STOP_BYTES} bytes"))),
        None => Ok(()),
    }
}
