use std::future::Future;
use std::time::Duration;

use domain::{Input, ModelCard, OutputKind};
use proto::v1;
use tokio::time::{Instant, sleep_until};
use tonic::{Code, Request, Response, Status};
use wire::tokenizer::Prepared;

use crate::error::Error;
use crate::metrics;
use crate::models::Model;

pub(crate) const TOKENIZER: &str = "tokenizer";
pub(crate) const VISION: &str = "vision";
pub(crate) const LANGUAGE: &str = "language";
pub(crate) const IMAGES: &str = "images";

/// Wait before the second try; doubled before each further one.
const BACKOFF: Duration = Duration::from_millis(10);

/// How the calls of one request are made: until when, and how often.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Calls {
    pub(crate) deadline: Instant,
    /// The first try included.
    pub(crate) attempts: u32,
}

impl Calls {
    pub(crate) async fn describe(&self, model: &Model) -> Result<ModelCard, Error> {
        let call = || {
            let (mut client, request) = (model.language.clone(), self.request(v1::DescribeRequest {}));
            async move { client.describe(request).await }
        };
        wire::model::card(self.retried(LANGUAGE, call).await?).map_err(|invalid| Error::contract(LANGUAGE, invalid))
    }

    pub(crate) async fn prepare(&self, model: &Model, input: &Input, output: OutputKind) -> Result<Prepared, Error> {
        let message = wire::tokenizer::to_prepare_request(input, output);
        let call = || {
            let (mut client, request) = (model.tokenizer.clone(), self.request(message.clone()));
            async move { client.prepare(request).await }
        };
        wire::tokenizer::prepared(self.retried(TOKENIZER, call).await?).map_err(|invalid| Error::contract(TOKENIZER, invalid))
    }

    pub(crate) async fn encode_text(&self, model: &Model, message: v1::EncodeTextRequest) -> Result<Vec<u32>, Error> {
        let call = || {
            let (mut client, request) = (model.tokenizer.clone(), self.request(message.clone()));
            async move { client.encode(request).await }
        };
        Ok(self.retried(TOKENIZER, call).await?.ids)
    }

    pub(crate) async fn encode_image(&self, model: &Model, data: &bytes::Bytes) -> Result<v1::Embeddings, Error> {
        let call = || {
            let message = v1::EncodeImageRequest { image: Some(v1::ImagePart { data: data.clone() }) };
            let (mut client, request) = (model.vision.clone(), self.request(message));
            async move { client.encode(request).await }
        };
        self.retried(VISION, call).await?.embeddings.ok_or_else(|| Error::contract(VISION, "no embeddings"))
    }

    pub(crate) async fn decode_image(&self, model: &Model, message: v1::DecodeImageRequest) -> Result<v1::DecodeImageResponse, Error> {
        let call = || {
            let (mut client, request) = (model.images.clone(), self.request(message.clone()));
            async move { client.decode(request).await }
        };
        self.retried(IMAGES, call).await
    }

    /// `message` with the time that is left as its timeout.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.deadline.saturating_duration_since(Instant::now()));
        request
    }

    /// Whether a call that ended with `status` after `failures` tries (this one included) may be made again on another instance. Waits a
    /// little before it says yes.
    pub(crate) async fn again(&self, stage: &'static str, status: Status, failures: u32) -> Result<(), Error> {
        if status.code() != Code::Unavailable || failures >= self.attempts {
            return Err(stage_error(stage, status));
        }
        metrics::retried(stage);
        tracing::debug!(stage, failures, reason = status.message(), "trying again");
        sleep_until((Instant::now() + BACKOFF * (1 << failures.min(8)) / 2).min(self.deadline)).await;
        Ok(())
    }

    async fn retried<T, F>(&self, stage: &'static str, call: impl Fn() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        for failures in 1.. {
            match call().await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => self.again(stage, status, failures).await?,
            }
        }
        Err(Error::Deadline)
    }
}

pub(crate) fn stage_error(stage: &'static str, status: Status) -> Error {
    match (status.code(), wire::violation(&status)) {
        (Code::DeadlineExceeded, _) => Error::Deadline,
        // The stage names the field as the client does.
        (Code::InvalidArgument, Some(invalid)) => Error::Invalid(invalid),
        _ => Error::Stage { stage, status },
    }
}
