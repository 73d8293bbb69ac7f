use proto::v1;
use proto::v1::generate_response::Event;
use serde_json::{Value, json};

/// An event for scripts: `event` names it; pictures are told by their size, not their bytes.
pub fn to_json(event: &Event) -> Value {
    match event {
        Event::Started(e) => json!({"event": "started", "model": e.model, "prompt_tokens": e.prompt_tokens, "seed": e.seed}),
        Event::Text(e) => {
            let mut value = json!({"event": "text", "choice": e.choice, "text": e.text, "token_ids": e.token_ids});
            if !e.logprobs.is_empty() {
                value["logprobs"] = e.logprobs.iter().map(token).collect();
            }
            value
        }
        Event::ImageProgress(e) => json!({"event": "image_progress", "image": e.image, "done": e.done, "total": e.total}),
        Event::ImagePreview(e) => {
            json!({"event": "image_preview", "image": e.image, "done": e.done, "media_type": e.media_type, "bytes": e.data.len()})
        }
        Event::Image(e) => json!({
            "event": "image", "image": e.image, "media_type": e.media_type, "bytes": e.data.len(),
            "width": e.width, "height": e.height, "seed": e.seed, "codes": e.codes,
        }),
        Event::Finished(e) => json!({"event": "finished", "choice": e.choice, "reason": reason(e.reason())}),
        Event::Completed(e) => {
            let usage = e.usage.unwrap_or_default();
            json!({"event": "completed", "usage": {
                "prompt_tokens": usage.prompt_tokens, "image_tokens": usage.image_tokens,
                "output_tokens": usage.output_tokens, "cached_tokens": usage.cached_tokens,
                "degraded_tokens": usage.degraded_tokens,
            }})
        }
    }
}

/// A model for scripts.
pub fn model(model: &v1::Model) -> Value {
    json!({
        "name": model.name, "family": model.family, "context_length": model.context_length, "text_output": model.text_output,
        "image_input": model.image_input, "image_output": model.image_output, "ready": model.ready,
    })
}

fn reason(reason: v1::FinishReason) -> &'static str {
    match reason {
        v1::FinishReason::Stop => "stop",
        v1::FinishReason::Length => "length",
        v1::FinishReason::Unspecified => "unknown",
    }
}

fn token(token: &v1::TokenLogprobs) -> Value {
    let mut value = token.chosen.as_ref().map_or(Value::Null, entry);
    value["top"] = token.top.iter().map(entry).collect();
    value
}

/// `bytes` are the token's own: a character may be spread over several tokens.
fn entry(token: &v1::Logprob) -> Value {
    json!({"token_id": token.token_id, "logprob": token.logprob, "bytes": token.bytes.to_vec()})
}
