//! One request is one tree of spans, from the router to every stage and back. A process of its own: telemetry is set up once.
#![allow(clippy::unwrap_used)]

mod fakes;

use std::collections::BTreeSet;

use fakes::*;
use proto::v1;
use telemetry::TelemetryConfig;
use testkit::{CollectedSpan, TraceCollector};

/// Who answered for the server spans of a trace.
fn owners(spans: &[CollectedSpan]) -> BTreeSet<&str> {
    spans.iter().filter_map(|span| span.attributes.get("janua.service").map(String::as_str)).collect()
}

fn check_tree(spans: &[&CollectedSpan]) {
    let roots: Vec<_> = spans.iter().filter(|span| span.parent_id.is_empty()).collect();
    assert_eq!(roots.len(), 1, "{roots:#?}");
    for span in spans.iter().filter(|span| !span.parent_id.is_empty()) {
        assert!(spans.iter().any(|parent| parent.span_id == span.parent_id), "{} has lost its parent", span.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_is_one_tree() {
    let collector = TraceCollector::start().await;
    let config = TelemetryConfig { otlp_endpoint: Some(collector.endpoint()), ..TelemetryConfig::default() };
    let telemetry = telemetry::init(&config, "janua").await.unwrap();
    let bench = Bench::new(Script::new()).await;
    bench.ask(chat(vec![text_part("x"), image_part(b"a"), image_part(b"b")], 5)).await.unwrap();
    bench.ask(draw("a hut", v1::ImageSampling { n: Some(2), ..v1::ImageSampling::default() })).await.unwrap();
    telemetry.shutdown().await;

    let spans = collector.spans();
    let traces: BTreeSet<&str> = spans.iter().map(|span| span.trace_id.as_str()).collect();
    assert_eq!(traces.len(), 2, "two requests: {:?}", spans.iter().map(|span| &span.name).collect::<Vec<_>>());
    assert_eq!(owners(&spans), BTreeSet::from(["router", "tokenizer", "vision", "language", "images"]));
    for trace in traces {
        check_tree(&spans.iter().filter(|span| span.trace_id == trace).collect::<Vec<_>>());
    }
    let request = spans.iter().find(|span| span.name == "chat tiny").unwrap();
    for (key, value) in [
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.request.model", "tiny"),
        ("gen_ai.usage.input_tokens", "7"),
        ("gen_ai.usage.output_tokens", "5"),
        ("gen_ai.request.seed", "0"),
    ] {
        assert_eq!(request.attributes.get(key).map(String::as_str), Some(value), "{key}");
    }
    let served = spans.iter().find(|span| span.name == "router/Generate").unwrap();
    assert_eq!(request.parent_id, served.span_id);
    let count = |name: &str| spans.iter().filter(|span| span.name == name).count();
    assert_eq!((count("vision/Encode"), count("language/Generate"), count("images/Decode")), (2, 3, 2));
    assert!(spans.iter().all(|span| span.attributes.values().all(|value| !value.contains("hut"))), "no prompt text");
    let metrics = telemetry::metrics_text();
    assert!(metrics.contains("janua_router_requests_total{model=\"tiny\",output=\"text\",code=\"Ok\"} 1"), "{metrics}");
    assert!(metrics.contains("janua_router_output_tokens_total{model=\"tiny\"} 29"), "{metrics}");
    assert!(metrics.contains("janua_router_running_requests 0"), "{metrics}");
}
