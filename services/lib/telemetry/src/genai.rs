use tracing::{Span, field};

/// What the span of a model request says about it. Prompt and answer are not among it.
#[derive(Debug, Clone, Copy)]
pub struct RequestFacts<'a> {
    /// `chat`, `text_completion` or `generate_content` (pictures).
    pub operation: &'a str,
    pub model: &'a str,
    /// `text` or `image`.
    pub output: &'a str,
    pub choices: u32,
}

/// The span of one request to a model, by the OpenTelemetry conventions for generative AI (status: development; the names live here alone).
///
/// Fields to record later: `gen_ai.usage.input_tokens`, `gen_ai.usage.output_tokens`, `gen_ai.usage.cache_read.input_tokens`,
/// `gen_ai.response.finish_reasons`, `gen_ai.response.time_to_first_chunk` (seconds), `gen_ai.request.seed`, `error.type`.
pub fn request_span(facts: RequestFacts<'_>) -> Span {
    tracing::info_span!(
        "request",
        otel.name = format_args!("{} {}", facts.operation, facts.model),
        otel.kind = "internal",
        otel.status_code = field::Empty,
        janua.service = "router",
        gen_ai.operation.name = facts.operation,
        gen_ai.provider.name = "janua",
        gen_ai.request.model = facts.model,
        gen_ai.output.type = facts.output,
        gen_ai.request.choice.count = facts.choices,
        gen_ai.request.seed = field::Empty,
        gen_ai.response.finish_reasons = field::Empty,
        gen_ai.response.time_to_first_chunk = field::Empty,
        gen_ai.usage.input_tokens = field::Empty,
        gen_ai.usage.output_tokens = field::Empty,
        gen_ai.usage.cache_read.input_tokens = field::Empty,
        error.r#type = field::Empty,
    )
}
