//! Messages of the Tokenizer service.

use bytes::Bytes;
use domain::{Input, Invalid, OutputKind};
use proto::v1;

use crate::{input, input::InputLimits, sampling};

/// A piece of a prepared prompt: token ids, or the place of a picture or of padding as long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PreparedSegment {
    Tokens(Vec<u32>),
    /// Index of the picture in the order in which the request lists them.
    Image(u32),
    /// The token `id` as often as picture `image` has positions.
    Padding {
        image: u32,
        id: u32,
    },
}

/// A prompt rendered and encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    pub segments: Vec<PreparedSegment>,
    /// Guidance pair; empty for text output.
    pub unconditional: Vec<PreparedSegment>,
    pub eos_token_ids: Vec<u32>,
}

/// `PrepareRequest` from the wire.
pub fn prepare_request(request: v1::PrepareRequest, limits: &InputLimits) -> Result<(Input, OutputKind), Invalid> {
    let parsed = match request.input {
        Some(v1::prepare_request::Input::Chat(chat)) => input::chat(chat, limits),
        Some(v1::prepare_request::Input::Completion(completion)) => input::completion(completion, limits),
        Some(v1::prepare_request::Input::Fim(fim)) => input::fim(fim, limits),
        None => Err(Invalid::new("input", "one of `chat`, `completion` and `fim` is needed")),
    }?;
    Ok((parsed, input::output_kind(request.output)?))
}

/// `PrepareRequest` for the wire, without pixels.
pub fn to_prepare_request(request: &Input, output: OutputKind) -> v1::PrepareRequest {
    let stripped = input::without_pixels(request);
    let body = match &stripped {
        Input::Chat(messages) => v1::prepare_request::Input::Chat(input::to_conversation(messages)),
        Input::Completion { parts, bos } => {
            v1::prepare_request::Input::Completion(v1::Completion { parts: input::to_parts(parts), omit_bos: !bos })
        }
        Input::Fim { prefix, suffix } => {
            v1::prepare_request::Input::Fim(v1::FillInTheMiddle { prefix: prefix.clone(), suffix: suffix.clone() })
        }
    };
    v1::PrepareRequest { input: Some(body), output: input::to_output_kind(output).into() }
}

/// `PrepareResponse` from the wire.
pub fn prepared(response: v1::PrepareResponse) -> Result<Prepared, Invalid> {
    Ok(Prepared {
        segments: segments(response.segments, "segments")?,
        unconditional: segments(response.unconditional, "unconditional")?,
        eos_token_ids: response.eos_token_ids,
    })
}

/// `PrepareResponse` for the wire.
pub fn to_prepared(prepared: Prepared) -> v1::PrepareResponse {
    v1::PrepareResponse {
        segments: to_segments(prepared.segments),
        unconditional: to_segments(prepared.unconditional),
        eos_token_ids: prepared.eos_token_ids,
    }
}

/// What a detokenising stream may be asked: first `Open`, then `Tokens`.
#[derive(Debug, Clone, PartialEq)]
pub enum Detokenize {
    /// The stop strings.
    Open(Vec<String>),
    Tokens {
        ids: Vec<u32>,
        /// One entry per id, or none; see [`with_bytes`].
        logprobs: Vec<v1::TokenLogprobs>,
        last: bool,
    },
}

/// `DetokenizeRequest` from the wire.
pub fn detokenize(request: v1::DetokenizeRequest) -> Result<Detokenize, Invalid> {
    match request.request {
        Some(v1::detokenize_request::Request::Open(open)) => {
            sampling::stop_strings("open.stop", &open.stop)?;
            Ok(Detokenize::Open(open.stop))
        }
        Some(v1::detokenize_request::Request::Tokens(v1::DetokenizeTokens { ids, logprobs, last })) => {
            if !logprobs.is_empty() && logprobs.len() != ids.len() {
                return Err(Invalid::new("tokens.logprobs", format!("{} entries for {} ids", logprobs.len(), ids.len())));
            }
            Ok(Detokenize::Tokens { ids, logprobs, last })
        }
        None => Err(Invalid::new("request", "one of `open` and `tokens` is needed")),
    }
}

/// Log-probabilities with the bytes of every token filled in.
pub fn with_bytes(mut logprobs: Vec<v1::TokenLogprobs>, bytes: impl Fn(u32) -> Bytes) -> Vec<v1::TokenLogprobs> {
    for position in &mut logprobs {
        for entry in position.chosen.iter_mut().chain(&mut position.top) {
            entry.bytes = bytes(entry.token_id);
        }
    }
    logprobs
}

fn segments(segments: Vec<v1::PreparedSegment>, field: &str) -> Result<Vec<PreparedSegment>, Invalid> {
    let segment = |(i, segment): (usize, v1::PreparedSegment)| match segment.segment {
        Some(v1::prepared_segment::Segment::Tokens(tokens)) => Ok(PreparedSegment::Tokens(tokens.ids)),
        Some(v1::prepared_segment::Segment::Image(index)) => Ok(PreparedSegment::Image(index)),
        Some(v1::prepared_segment::Segment::Padding(v1::ImagePadding { image, id })) => Ok(PreparedSegment::Padding { image, id }),
        None => Err(Invalid::new(format!("{field}[{i}]"), "a segment is tokens, an image or padding")),
    };
    segments.into_iter().enumerate().map(segment).collect()
}

fn to_segments(segments: Vec<PreparedSegment>) -> Vec<v1::PreparedSegment> {
    let segment = |segment| match segment {
        PreparedSegment::Tokens(ids) => v1::prepared_segment::Segment::Tokens(v1::TokenIds { ids }),
        PreparedSegment::Image(index) => v1::prepared_segment::Segment::Image(index),
        PreparedSegment::Padding { image, id } => v1::prepared_segment::Segment::Padding(v1::ImagePadding { image, id }),
    };
    segments.into_iter().map(|s| v1::PreparedSegment { segment: Some(segment(s)) }).collect()
}
