//! The client side of every wire: what each generated tonic client is built on.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Instant, Sleep};
use tonic::Status;
use tonic::body::Body;
use tower::Service;
use tracing::{Instrument as _, Span};

use crate::deadline;
use crate::mesh::{Mesh, Wires};
use crate::nats;
use crate::routes::split_path;
use crate::target::{InstanceName, Named, Target};

/// Calls to one target, or to one instance of it. Cheap to clone; usable as the transport of every generated client: `TokenizerClient::new(channel)`.
///
/// Nothing is connected beforehand: a call finds an instance when it is made, or ends with UNAVAILABLE.
#[derive(Clone)]
pub struct Channel {
    mesh: Mesh,
    target: Named,
    instance: Option<InstanceName>,
}

impl Channel {
    pub(crate) fn new(mesh: Mesh, target: &Target, instance: Option<InstanceName>) -> Self {
        Self { mesh, target: Named::new(target), instance }
    }

    /// Whom the calls of this channel go to.
    pub fn target(&self) -> &Target {
        &self.target.target
    }

    /// The only instance that they go to, if there is one.
    pub fn instance(&self) -> Option<&InstanceName> {
        self.instance.as_ref()
    }

    async fn send(self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let instance = self.instance.as_ref();
        match self.mesh.wires() {
            Wires::Local(registry) => Ok(registry.call(&self.target.target, instance, request)?.await),
            Wires::Nats(connected) => nats::call(&connected.node, &self.target, instance, request).await,
            Wires::Direct(direct) => direct.call(&self.target, instance, request).await,
        }
    }

    /// In-process the server side, which runs in the same task, already keeps the deadline.
    fn own_deadline(&self, request: &http::Request<Body>) -> Result<Option<Instant>, Status> {
        match self.mesh.wires() {
            Wires::Local(_) => Ok(None),
            Wires::Nats(_) | Wires::Direct(_) => deadline::deadline(request.headers()),
        }
    }
}

impl Service<http::Request<Body>> for Channel {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let channel = self.clone();
        let span = client_span(&self.target.name, request.uri().path());
        if self.mesh.carries_trace_context() {
            span.in_scope(|| telemetry::inject(request.headers_mut()));
        }
        let inside = span.clone();
        let answer = async move {
            let deadline = channel.own_deadline(&request)?;
            let sent = channel.send(request);
            let answer = match deadline {
                Some(deadline) => tokio::time::timeout_at(deadline, sent).await.unwrap_or_else(|_| Err(deadline::exceeded())),
                None => sent.await,
            };
            match answer {
                Ok(response) => Ok(response.map(|body| ClientBody::wrap(body, inside, deadline))),
                Err(status) => {
                    record(&inside, &status);
                    Err(status)
                }
            }
        };
        // Without a subscriber there is no span to enter.
        if span.is_disabled() { Box::pin(answer) } else { Box::pin(answer.instrument(span)) }
    }
}

/// Probes of health and reflection are not worth a span: they would bury the requests.
fn client_span(target: &str, path: &str) -> Span {
    match split_path(path) {
        Some((service, method)) if !service.starts_with("grpc.") => telemetry::client_span(target, method),
        _ => Span::none(),
    }
}

fn record(span: &Span, status: &Status) {
    telemetry::record_status(span, status.code().into(), status.message());
}

/// A response body that ends at the deadline and keeps the span of its call open until then.
struct ClientBody {
    body: Body,
    span: Span,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl ClientBody {
    fn wrap(body: Body, span: Span, deadline: Option<Instant>) -> Body {
        if body.is_end_stream() || (span.is_disabled() && deadline.is_none()) {
            return body;
        }
        let deadline = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
        Body::new(Self { body, span, deadline })
    }
}

impl http_body::Body for ClientBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Err(status))) => record(&this.span, status),
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(status) = frame.trailers_ref().and_then(Status::from_header_map) {
                    record(&this.span, &status);
                }
            }
            Poll::Ready(None) => {}
            Poll::Pending => {
                let Some(deadline) = &mut this.deadline else { return Poll::Pending };
                if deadline.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                // What is left of the call is cancelled by dropping it.
                this.body = Body::empty();
                this.deadline = None;
                record(&this.span, &deadline::exceeded());
                return Poll::Ready(Some(Err(deadline::exceeded())));
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
