use std::pin::Pin;

use futures::{Stream, StreamExt, stream};
use proto::v1;
use proto::v1::language_server::Language;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::stage::Stage;

/// The tonic service of one model.
pub struct Server {
    stage: Stage,
}

impl Server {
    pub fn new(stage: Stage) -> Self {
        Self { stage }
    }
}

#[tonic::async_trait]
impl Language for Server {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::LanguageResponse, Status>> + Send>>;

    async fn generate(&self, request: Request<v1::LanguageRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let job = wire::language::job(request.into_inner()).map_err(Error::from)?;
        let responses = self.stage.generate(job).await?.flat_map(|events| {
            let responses = events.map(wire::language::to_responses).map_err(Status::from);
            stream::iter(match responses {
                Ok(responses) => responses.into_iter().map(Ok).collect(),
                Err(status) => vec![Err(status)],
            })
        });
        Ok(Response::new(Box::pin(responses)))
    }

    async fn describe(&self, _request: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        Ok(Response::new(wire::model::to_card(self.stage.card())))
    }
}
