use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::{Args, ValueEnum};
use proto::v1;

use crate::Failure;

/// Largest file that is sent as a picture.
const MAX_IMAGE_BYTES: u64 = 32 << 20;

/// How text is drawn. What is left out is the checkpoint's own default.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingFlags {
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep the smallest set of tokens whose probabilities add up to this
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 keeps all
    #[arg(long, value_name = "COUNT")]
    pub top_k: Option<u32>,
    /// Drop tokens less likely than this times the likeliest one
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// The same seed and request give the same answer
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// Most tokens to generate
    #[arg(long, value_name = "COUNT")]
    pub max_tokens: Option<u32>,
    /// Text that ends the answer; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Report the log-probability of every token and of this many alternatives
    #[arg(long, value_name = "COUNT", num_args = 0..=1, default_missing_value = "0")]
    pub logprobs: Option<u32>,
    /// Number of independent answers
    #[arg(long, value_name = "COUNT")]
    pub n: Option<u32>,
    /// Go on after end-of-sentence until --max-tokens
    #[arg(long)]
    pub ignore_eos: bool,
    /// Answer without the experts of a shard that is not running, rather than not at all
    #[arg(long)]
    pub allow_expert_loss: bool,
    #[command(flatten)]
    pub constraint: ConstraintFlags,
}

impl SamplingFlags {
    /// The message for the wire.
    pub fn message(&self) -> Result<v1::Sampling, Failure> {
        Ok(v1::Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            seed: self.seed,
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            top_logprobs: self.logprobs,
            ignore_eos: self.ignore_eos,
            allow_expert_loss: self.allow_expert_loss,
            n: self.n,
            constraint: self.constraint.message()?,
            ..v1::Sampling::default()
        })
    }
}

/// How a step of a flow is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FlowSolver {
    /// First order: one evaluation a step
    Euler,
    /// Second order: two evaluations a step, at its ends
    Heun,
    /// Second order: two evaluations a step, the second in its middle
    Midpoint,
}

impl FlowSolver {
    /// The enum value for the wire.
    pub fn message(self) -> v1::FlowSolver {
        match self {
            Self::Euler => v1::FlowSolver::Euler,
            Self::Heun => v1::FlowSolver::Heun,
            Self::Midpoint => v1::FlowSolver::Midpoint,
        }
    }
}

/// What the answer must look like.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Structured output")]
#[group(multiple = false)]
pub struct ConstraintFlags {
    /// The answer is JSON that is valid under this JSON Schema, given as a file or in words; '{}' takes any JSON
    #[arg(long, value_name = "FILE|TEXT")]
    pub json_schema: Option<String>,
    /// The answer as a whole matches this regular expression (syntax of Rust's regex crate)
    #[arg(long, value_name = "REGEX")]
    pub regex: Option<String>,
    /// The answer is a sentence of the grammar in this file (llguidance's dialect of Lark, from the rule `start`)
    #[arg(long, value_name = "FILE")]
    pub grammar: Option<PathBuf>,
}

impl ConstraintFlags {
    /// The message for the wire. Whether it makes sense is left to the server.
    pub fn message(&self) -> Result<Option<v1::Constraint>, Failure> {
        use v1::constraint::Constraint::{JsonSchema, Lark, Regex};

        let read = |file: &Path, flag: &str| {
            std::fs::read_to_string(file).map_err(|error| Failure::input(format!("{flag}: cannot read {}: {error}", file.display())))
        };
        let schema = |text: &String| match text.trim_start().starts_with(['{', '[', '"']) || text == "true" || text == "false" {
            true => Ok(text.clone()),
            false => read(Path::new(text), "--json-schema"),
        };
        let constraint = match (&self.json_schema, &self.regex, &self.grammar) {
            (Some(text), _, _) => JsonSchema(schema(text)?),
            (_, Some(regex), _) => Regex(regex.clone()),
            (_, _, Some(file)) => Lark(read(file, "--grammar")?),
            (None, None, None) => return Ok(None),
        };
        Ok(Some(v1::Constraint { constraint: Some(constraint) }))
    }
}

/// Encoding of a picture file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PictureFormat {
    Png,
    /// Lossless WebP
    Webp,
}

impl PictureFormat {
    /// The enum value for the wire.
    pub fn message(self) -> v1::ImageFormat {
        match self {
            Self::Png => v1::ImageFormat::Png,
            Self::Webp => v1::ImageFormat::Webp,
        }
    }

    /// The format that the name of `file` asks for.
    pub fn of(file: &Path) -> Option<Self> {
        match file.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "png" => Some(Self::Png),
            "webp" => Some(Self::Webp),
            _ => None,
        }
    }

    /// What a file of this format is called after the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Webp => "webp",
        }
    }
}

/// A text part.
pub fn text(text: impl Into<String>) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Text(text.into())) }
}

/// A picture part.
pub fn picture(data: impl Into<Bytes>) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Image(v1::ImagePart { data: data.into() })) }
}

/// The pictures in `files`, as parts. What is no picture is left to the server to refuse.
pub fn pictures(files: &[PathBuf]) -> Result<Vec<v1::Part>, Failure> {
    files.iter().map(|file| Ok(picture(read_picture(file)?))).collect()
}

fn read_picture(file: &Path) -> Result<Vec<u8>, Failure> {
    let unreadable = |error: std::io::Error| Failure::input(format!("cannot read the picture {}: {error}", file.display()));
    let size = std::fs::metadata(file).map_err(unreadable)?.len();
    if size > MAX_IMAGE_BYTES {
        return Err(Failure::input(format!("{} has {size} bytes, at most {MAX_IMAGE_BYTES} are sent: scale it down", file.display())));
    }
    std::fs::read(file).map_err(unreadable)
}

/// A message of `role`.
pub fn message(role: v1::Role, parts: Vec<v1::Part>) -> v1::Message {
    v1::Message { role: role.into(), parts }
}

/// A conversation as the input of a request.
pub fn chat(messages: Vec<v1::Message>) -> v1::generate_request::Input {
    v1::generate_request::Input::Chat(v1::Conversation { messages })
}

/// Raw parts as the input of a request.
pub fn completion(parts: Vec<v1::Part>) -> v1::generate_request::Input {
    v1::generate_request::Input::Completion(v1::Completion { parts, omit_bos: false })
}
