//! The spans of batches. Apart from the other tests: a process has one tracing subscriber.
#![allow(clippy::unwrap_used)]

mod support;

use proto::v1;
use support::{Question, Random, Service, Whole};
use telemetry::TelemetryConfig;
use testkit::TraceCollector;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_is_traced_leaves_its_spans() {
    let collector = TraceCollector::start().await;
    let config = TelemetryConfig { otlp_endpoint: Some(collector.endpoint()), ..TelemetryConfig::default() };
    let guard = telemetry::init(&config, "experts-test").await.unwrap();
    let (service, whole) = (Service::whole("moe_v1", &[]).await, Whole::open("moe_v1"));
    let (mut talk, _) = service.open().await;
    let question = Question::full(&mut Random(1), whole.shape(), 2, "4-6".parse().unwrap(), 5);
    let traced = v1::ExpertBatch { traceparent: format!("00-{TRACE}-{SPAN}-01"), ..question.batch(1) };
    talk.outputs(&traced).await;
    talk.failure(&v1::ExpertBatch { layer: 0, ..traced.clone() }).await;
    talk.outputs(&question.batch(2)).await;
    talk.outputs(&v1::ExpertBatch { traceparent: "\n".into(), ..question.batch(3) }).await;
    drop((talk, service));
    guard.shutdown().await;

    let spans = collector.spans();
    let batches: Vec<_> = spans.iter().filter(|span| span.trace_id == TRACE && span.parent_id == SPAN).collect();
    let status = |code: &str| batches.iter().find(|span| span.attributes["rpc.grpc.status_code"] == code).copied();
    assert_eq!(batches.len(), 2, "{spans:?}");
    assert!(batches.iter().all(|span| span.name == "experts/Compute" && span.kind == 2));
    assert!(status("3").is_some(), "the one that was refused");
    let inner: Vec<_> = spans.iter().filter(|span| span.name == "experts.compute").collect();
    assert_eq!(inner.len(), 1, "{spans:?}");
    assert_eq!((&inner[0].parent_id, inner[0].trace_id.as_str()), (&status("0").unwrap().span_id, TRACE));
    for (field, value) in
        [("janua.model", "moe"), ("janua.shard", "0-15"), ("janua.layer", "2"), ("janua.rows", "5"), ("janua.experts", "3")]
    {
        assert_eq!(inner[0].attributes[field], value, "{field}");
    }
}
