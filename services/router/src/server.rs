use std::sync::Arc;
use std::time::Duration;

use domain::Invalid;
use mesh::Mesh;
use proto::v1;
use proto::v1::janua_server::Janua;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::Instrument;
use wire::tokenizer::PreparedSegment;

use crate::admission::Gate;
use crate::answer::Answer;
use crate::error::Error;
use crate::life::{self, Shared};
use crate::models::Models;
use crate::stages::Calls;
use crate::{RouterConfig, stages};

/// The public service.
#[derive(Clone)]
pub struct Router(Arc<Shared>);

impl Router {
    /// A router for the models `names`, whose stages are found on `mesh`.
    pub fn new(mesh: &Mesh, names: &[String], config: RouterConfig) -> Self {
        let gate = Gate::new(config.max_concurrent, config.max_waiting);
        Self(Arc::new(Shared { models: Models::new(mesh, names), gate, config }))
    }

    fn calls(&self, metadata: &MetadataMap) -> Calls {
        let limit = self.0.config.timeout();
        let wait = timeout(metadata).map_or(limit, |wanted| wanted.min(limit));
        Calls { deadline: Instant::now() + wait, attempts: self.0.config.attempts }
    }
}

#[tonic::async_trait]
impl Janua for Router {
    type GenerateStream = Answer;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Answer>, Status> {
        let calls = self.calls(request.metadata());
        let call = life::admit(&self.0, request.into_inner(), calls).await?;
        let span = call.span.clone();
        Ok(Response::new(Answer::new(|events| life::live(call, events).instrument(span))))
    }

    async fn list_models(&self, request: Request<v1::ListModelsRequest>) -> Result<Response<v1::ListModelsResponse>, Status> {
        let calls = self.calls(request.metadata());
        Ok(Response::new(v1::ListModelsResponse { models: self.0.models.list(&calls).await }))
    }

    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let calls = self.calls(request.metadata());
        let token_ids = tokenize(&self.0, request.into_inner(), calls).await?;
        Ok(Response::new(v1::TokenizeResponse { token_ids }))
    }
}

async fn tokenize(shared: &Shared, request: v1::TokenizeRequest, calls: Calls) -> Result<Vec<u32>, Error> {
    let model = shared.models.find(&request.model)?;
    let _place = shared.gate.enter(calls.deadline).await?;
    let limits = shared.config.input_limits();
    match request.input {
        Some(v1::tokenize_request::Input::Text(text)) if text.len() > limits.text_bytes => {
            Err(Invalid::new("text", format!("{} bytes of text, at most {} are taken", text.len(), limits.text_bytes)).into())
        }
        Some(v1::tokenize_request::Input::Text(text)) => {
            calls.encode_text(&model, v1::EncodeTextRequest { text, omit_bos: request.omit_bos }).await
        }
        Some(v1::tokenize_request::Input::Chat(chat)) => {
            let input = wire::input::chat(chat, &limits)?;
            if let Some(path) = crate::request::image_paths(&input).first() {
                return Err(Invalid::new(path, "only text can be tokenised").into());
            }
            let prepared = calls.prepare(&model, &input, domain::OutputKind::Text).await?;
            prepared.segments.into_iter().map(tokens).collect::<Result<Vec<_>, _>>().map(|ids| ids.concat())
        }
        None => Err(Invalid::new("input", "one of `chat` and `text` is needed").into()),
    }
}

fn tokens(segment: PreparedSegment) -> Result<Vec<u32>, Error> {
    match segment {
        PreparedSegment::Tokens(ids) => Ok(ids),
        PreparedSegment::Image(_) | PreparedSegment::Padding { .. } => Err(Error::contract(stages::TOKENIZER, "a picture in a text")),
    }
}

/// The client's `grpc-timeout`: up to eight digits and a unit. The mesh has refused a malformed one before it comes here.
fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount.saturating_mul(3600)),
        "M" => Duration::from_secs(amount.saturating_mul(60)),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}
