//! The spans that leave the process: received by a real OTLP/gRPC server in the test.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use http::HeaderMap;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span as Exported;
use telemetry::{RequestFacts, TelemetryConfig};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};
use tracing::Instrument;

struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.send(request.into_inner()).await.map_err(|_| Status::unavailable("test over"))?;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn attribute<'a>(span: &'a Exported, key: &str) -> Option<&'a Value> {
    span.attributes.iter().find(|attribute| attribute.key == key)?.value.as_ref()?.value.as_ref()
}

fn text(value: &str) -> Option<Value> {
    Some(Value::StringValue(value.to_owned()))
}

/// A request span, a call out of it and the call's other end make one chain; the scrape endpoint and a second init behave.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_is_one_tree() {
    let (sender, mut received) = mpsc::channel(16);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(sender))).serve_with_incoming(incoming));
    let config = TelemetryConfig { otlp_endpoint: Some(endpoint), ..TelemetryConfig::default() };
    let guard = telemetry::init(&config, "janua").await.unwrap();
    assert!(telemetry::init(&config, "janua").await.is_err(), "a second init must be refused");

    let request = telemetry::request_span(RequestFacts { operation: "chat", model: "tiny", output: "text", choices: 1 });
    async {
        let send = telemetry::client_span("tokenizer.tiny", "Prepare");
        async {
            let mut headers = HeaderMap::new();
            telemetry::inject(&mut headers);
            assert!(headers.contains_key("traceparent"));
            let receive = telemetry::server_span(&headers, "janua.v1.Tokenizer", "Prepare");
            async { tracing::info!(count = 3, "inside") }.instrument(receive.clone()).await;
            telemetry::record_status(&receive, 14, "gone");
            assert!(telemetry::server_span(&headers, "grpc.health.v1.Health", "Check").is_none());
        }
        .instrument(send)
        .await;
    }
    .instrument(request)
    .await;
    guard.shutdown().await;

    let export = tokio::time::timeout(Duration::from_secs(20), received.recv()).await.unwrap().unwrap();
    let resource = export.resource_spans[0].resource.as_ref().unwrap();
    let name = resource.attributes.iter().find(|attribute| attribute.key == "service.name").unwrap();
    assert_eq!(name.value.as_ref().unwrap().value, text("janua"));
    let spans: Vec<&Exported> = export.resource_spans[0].scope_spans.iter().flat_map(|scope| &scope.spans).collect();
    let named = |name: &str| *spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name} is missing"));
    let (request, send, receive) = (named("chat tiny"), named("tokenizer.tiny/Prepare"), named("tokenizer/Prepare"));
    assert!(request.parent_span_id.is_empty());
    assert_eq!(send.parent_span_id, request.span_id);
    assert_eq!(receive.parent_span_id, send.span_id);
    assert_eq!(receive.trace_id, request.trace_id);
    assert_eq!(attribute(receive, "janua.service").cloned(), text("tokenizer"));
    assert_eq!(attribute(receive, "rpc.service").cloned(), text("janua.v1.Tokenizer"));
    assert_eq!(attribute(receive, "rpc.grpc.status_code").cloned(), Some(Value::IntValue(14)));
    assert_eq!(receive.status.as_ref().unwrap().message, "gone");
    assert_eq!(attribute(request, "gen_ai.output.type").cloned(), text("text"));
    assert_eq!((send.kind, receive.kind), (3, 2), "client and server");
}
