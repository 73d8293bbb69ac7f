//! Messages of the Language service.

use domain::{
    Event, FinishReason, FlowState, ImageSampling, Invalid, Job, Latent, Logprob, Mode, Prompt, Sampling, Segment, TokenLogprobs,
};
use proto::v1;

use crate::{latent, sampling, vision};

/// `LanguageRequest` from the wire.
pub fn job(request: v1::LanguageRequest) -> Result<Job, Invalid> {
    let mode = match request.mode {
        Some(v1::language_request::Mode::Text(text)) => {
            Mode::Text { sampling: sampling::text(text.sampling, &Sampling::default())?.sampling, eos_token_ids: text.eos_token_ids }
        }
        Some(v1::language_request::Mode::Image(image)) => Mode::Image {
            unconditional: prompt(image.unconditional, "image.unconditional")?,
            sampling: sampling::image(image.sampling, &ImageSampling::default())?.sampling,
        },
        Some(v1::language_request::Mode::Flow(flow)) => Mode::Flow {
            unconditional: prompt(flow.unconditional, "flow.unconditional")?,
            sampling: sampling::image(flow.sampling, &ImageSampling::default())?.sampling,
            estimate_every: Some(flow.estimate_every).filter(|&every| every > 0),
            from: flow.from.map(|state| flow_state(state, "flow.from")).transpose()?,
        },
        None => return Err(Invalid::new("mode", "one of `text`, `image` and `flow` is needed")),
    };
    Ok(Job { prompt: prompt(request.prompt, "prompt")?, mode, emitted: request.emitted })
}

/// `LanguageRequest` for the wire.
pub fn to_request(job: &Job) -> v1::LanguageRequest {
    let mode = match &job.mode {
        Mode::Text { sampling, eos_token_ids } => v1::language_request::Mode::Text(v1::TextMode {
            sampling: Some(sampling::to_text(sampling)),
            eos_token_ids: eos_token_ids.clone(),
        }),
        Mode::Image { unconditional, sampling } => v1::language_request::Mode::Image(v1::ImageCodeMode {
            unconditional: to_prompt(unconditional),
            sampling: Some(sampling::to_image(sampling)),
        }),
        Mode::Flow { unconditional, sampling, estimate_every, from } => v1::language_request::Mode::Flow(v1::FlowMode {
            unconditional: to_prompt(unconditional),
            sampling: Some(sampling::to_flow(sampling)),
            estimate_every: estimate_every.unwrap_or(0),
            from: from.as_ref().map(to_flow_state),
        }),
    };
    v1::LanguageRequest { prompt: to_prompt(&job.prompt), mode: Some(mode), emitted: job.emitted.clone() }
}

/// A stream message holding `event` alone.
pub fn to_response(event: Event) -> v1::LanguageResponse {
    let event = match event {
        Event::Prefilled { prompt_tokens, cached_tokens } => {
            v1::language_response::Event::Prefilled(v1::Prefilled { prompt_tokens, cached_tokens })
        }
        Event::Output { id, logprobs } => v1::language_response::Event::Outputs(v1::Outputs {
            ids: vec![id],
            logprobs: logprobs.as_ref().map(to_token_logprobs).into_iter().collect(),
        }),
        Event::Degraded(positions) => v1::language_response::Event::DegradedPositions(positions),
        Event::Flow { state, total, estimate } => v1::language_response::Event::Flow(v1::FlowStep {
            state: Some(to_flow_state(&state)),
            total,
            estimate: estimate.as_ref().map(latent::to_latent),
        }),
        Event::Finished(reason) => v1::language_response::Event::Finished(to_finish_reason(reason).into()),
    };
    v1::LanguageResponse { event: Some(event) }
}

/// Stream messages that hold `events`, neighbouring outputs in one.
pub fn to_responses(events: impl IntoIterator<Item = Event>) -> Vec<v1::LanguageResponse> {
    use v1::language_response::Event::Outputs;

    let mut responses: Vec<v1::LanguageResponse> = Vec::new();
    for response in events.into_iter().map(to_response) {
        match (responses.last_mut().and_then(|last| last.event.as_mut()), response.event) {
            (Some(Outputs(last)), Some(Outputs(next))) => {
                last.ids.extend(next.ids);
                last.logprobs.extend(next.logprobs);
            }
            (_, event) => responses.push(v1::LanguageResponse { event }),
        }
    }
    responses
}

/// The events in a stream message.
pub fn events(response: v1::LanguageResponse) -> Result<Vec<Event>, Invalid> {
    match response.event {
        Some(v1::language_response::Event::Prefilled(p)) => {
            Ok(vec![Event::Prefilled { prompt_tokens: p.prompt_tokens, cached_tokens: p.cached_tokens }])
        }
        Some(v1::language_response::Event::Outputs(outputs)) => self::outputs(outputs),
        Some(v1::language_response::Event::DegradedPositions(positions)) => Ok(vec![Event::Degraded(positions)]),
        Some(v1::language_response::Event::Flow(step)) => flow_step(step).map(|event| vec![event]),
        Some(v1::language_response::Event::Finished(reason)) => Ok(vec![Event::Finished(finish_reason(reason)?)]),
        None => Err(Invalid::new("event", "an event is needed")),
    }
}

/// Why an output ended, from the wire.
pub fn finish_reason(value: i32) -> Result<FinishReason, Invalid> {
    match v1::FinishReason::try_from(value) {
        Ok(v1::FinishReason::Stop) => Ok(FinishReason::Stop),
        Ok(v1::FinishReason::Length) => Ok(FinishReason::Length),
        Ok(v1::FinishReason::Unspecified) | Err(_) => Err(Invalid::new("finished", format!("{value} is not a reason to finish"))),
    }
}

/// Why an output ended, for the wire.
pub fn to_finish_reason(reason: FinishReason) -> v1::FinishReason {
    match reason {
        FinishReason::Stop => v1::FinishReason::Stop,
        FinishReason::Length => v1::FinishReason::Length,
    }
}

/// Log-probabilities for the wire; the bytes of tokens are left to the tokenizer.
pub fn to_token_logprobs(logprobs: &TokenLogprobs) -> v1::TokenLogprobs {
    let entry = |l: &Logprob| v1::Logprob { token_id: l.token_id, logprob: l.logprob, bytes: bytes::Bytes::new() };
    v1::TokenLogprobs { chosen: Some(entry(&logprobs.chosen)), top: logprobs.top.iter().map(entry).collect() }
}

fn outputs(outputs: v1::Outputs) -> Result<Vec<Event>, Invalid> {
    if !outputs.logprobs.is_empty() && outputs.logprobs.len() != outputs.ids.len() {
        return Err(Invalid::new("outputs.logprobs", format!("{} entries for {} ids", outputs.logprobs.len(), outputs.ids.len())));
    }
    let mut logprobs = outputs.logprobs.into_iter();
    outputs.ids.into_iter().map(|id| Ok(Event::Output { id, logprobs: logprobs.next().map(token_logprobs).transpose()? })).collect()
}

fn token_logprobs(message: v1::TokenLogprobs) -> Result<TokenLogprobs, Invalid> {
    let entry = |l: v1::Logprob| Logprob { token_id: l.token_id, logprob: l.logprob };
    let chosen = message.chosen.ok_or_else(|| Invalid::new("outputs.logprobs.chosen", "the chosen token is needed"))?;
    Ok(TokenLogprobs { chosen: entry(chosen), top: message.top.into_iter().map(entry).collect() })
}

fn flow_step(step: v1::FlowStep) -> Result<Event, Invalid> {
    let state = flow_state(step.state.unwrap_or_default(), "flow.state")?;
    let estimate = step.estimate.map(|map| latent::latent(&map, "flow.estimate")).transpose()?;
    Ok(Event::Flow { state, total: step.total, estimate })
}

fn flow_state(state: v1::FlowState, field: &str) -> Result<FlowState, Invalid> {
    let z: Latent = latent::latent(&state.z.unwrap_or_default(), &format!("{field}.z"))?;
    Ok(FlowState { done: state.done, z })
}

fn to_flow_state(state: &FlowState) -> v1::FlowState {
    v1::FlowState { done: state.done, z: Some(latent::to_latent(&state.z)) }
}

fn prompt(segments: Vec<v1::PromptSegment>, field: &str) -> Result<Prompt, Invalid> {
    let segment = |(i, segment): (usize, v1::PromptSegment)| match segment.segment {
        Some(v1::prompt_segment::Segment::Tokens(tokens)) => Ok(Segment::Tokens(tokens.ids)),
        Some(v1::prompt_segment::Segment::Embeddings(message)) => {
            vision::embeddings(&message, &format!("{field}[{i}].embeddings")).map(Segment::Embeddings)
        }
        None => Err(Invalid::new(format!("{field}[{i}]"), "a segment is either tokens or embeddings")),
    };
    let segments = segments.into_iter().enumerate().map(segment).collect::<Result<_, _>>()?;
    Ok(Prompt { segments })
}

fn to_prompt(prompt: &Prompt) -> Vec<v1::PromptSegment> {
    let segment = |segment: &Segment| match segment {
        Segment::Tokens(ids) => v1::prompt_segment::Segment::Tokens(v1::TokenIds { ids: ids.clone() }),
        Segment::Embeddings(embeddings) => v1::prompt_segment::Segment::Embeddings(vision::to_embeddings(embeddings)),
    };
    prompt.segments.iter().map(|s| v1::PromptSegment { segment: Some(segment(s)) }).collect()
}
