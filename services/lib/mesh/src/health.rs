use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use futures::StreamExt as _;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// `grpc.health.v1` of one [`Routes`](crate::Routes): all of its services share one state, which the owner sets.
///
/// Written here instead of taking `tonic_health::server` because that one keeps a state per service behind an async lock, and
/// what a service process knows is one thing: servable or not.
pub(crate) struct HealthService {
    pub serving: watch::Receiver<bool>,
    /// The names that can be asked about; the empty name is the process as a whole.
    pub services: Arc<[String]>,
}

impl HealthService {
    fn knows(&self, service: &str) -> bool {
        service.is_empty() || self.services.iter().any(|name| name == service)
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        if !self.knows(&service) {
            return Err(Status::not_found(format!("service `{service}` is not offered here")));
        }
        Ok(Response::new(answer(status(*self.serving.borrow()))))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let known = self.knows(&request.into_inner().service);
        let changes = WatchStream::new(self.serving.clone());
        let answers = changes.map(move |serving| Ok(answer(if known { status(serving) } else { ServingStatus::ServiceUnknown })));
        Ok(Response::new(Box::pin(answers)))
    }
}

fn status(serving: bool) -> ServingStatus {
    if serving { ServingStatus::Serving } else { ServingStatus::NotServing }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}
