//! One trace over every service: router, tokenizer, vision, language and images, whichever wire carries the calls.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use proto::v1;
use testkit::{CollectedSpan, TraceCollector};
use tests::request::{for_text, greedy};
use tests::{Answer, Golden, Wire, World, request};
use tracing::Instrument;

const SERVICES: [&str; 5] = ["router", "tokenizer", "vision", "language", "images"];
const WIRES: [Wire; 3] = [Wire::InProcess, Wire::Nats, Wire::Direct];
/// `SpanKind` of OTLP.
const SERVER: i32 = 2;

/// One test, since a process has one tracing subscriber. The client asks about a picture and then has one drawn, below one span of its
/// own. Afterwards the same with every call losing its context on purpose: the same check must fail then.
#[tokio::test(flavor = "multi_thread")]
async fn one_piece_of_work_is_one_tree() {
    let collector = TraceCollector::start().await;
    let settings = telemetry::TelemetryConfig { otlp_endpoint: Some(collector.endpoint()), level: "error".into(), ..Default::default() };
    let guard = telemetry::init(&settings, "janua").await.unwrap();
    for wire in WIRES {
        work(World::start(wire, &["janus"]).await, &label(wire, "whole")).await;
        work(World::without_trace_context(wire, &["janus"]).await, &label(wire, "broken")).await;
    }
    for wire in WIRES {
        sharded_work(wire).await;
    }
    // Everything has ended, so this sends the last span.
    guard.shutdown().await;

    let spans = collector.spans();
    for wire in WIRES {
        assert_eq!(tree(&trace_of(&spans, &label(wire, "whole"))), Ok(()), "over {}", wire.name());
        let broken = trace_of(&spans, &label(wire, "broken"));
        assert!(tree(&broken).is_err(), "a lost context over {} must be noticed: {broken:#?}", wire.name());
    }
    for wire in WIRES {
        assert_eq!(shards(&spans, &trace_of(&spans, &label(wire, "sharded"))), Ok(()), "over {}", wire.name());
    }
    // The broken requests did reach every service: their spans are there, in traces of their own.
    for service in SERVICES {
        let count = spans.iter().filter(|span| owner(span) == service).count();
        assert!(count >= 2 * WIRES.len(), "{count} spans of {service}");
    }
}

/// The name of the client's span.
fn label(wire: Wire, kind: &str) -> String {
    format!("{kind} over {}", wire.name())
}

async fn work(world: World, label: &str) {
    let span = tracing::info_span!("work", otel.name = label);
    async {
        let picture = std::fs::read(testkit::fixture("janus").join("image1.png")).unwrap();
        let parts = vec![request::picture(picture), request::text("What is in the image?")];
        send(&world, for_text("janus", request::chat(parts), greedy(4))).await;
        send(&world, Golden::read("janus").drawings.remove(0).request).await;
    }
    .instrument(span)
    .await;
    world.stop().await;
}

/// Two requests to a model whose experts are in two shards.
async fn sharded_work(wire: Wire) {
    let world = World::start_with(wire, &["moe_v1"], &[("language.experts", "remote"), ("experts.shards", "2")]).await;
    testkit::wait_until("the shards are found", std::time::Duration::from_secs(30), async || {
        world.ask(Golden::read("moe_v1").prompts.remove(0).request).await.is_ok()
    })
    .await;
    let span = tracing::info_span!("work", otel.name = label(wire, "sharded"));
    async {
        let (first, second) = (Golden::read("moe_v1").prompts.remove(0), Golden::read("moe_v1").prompts.remove(1));
        tokio::join!(send(&world, first.request), send(&world, second.request));
    }
    .instrument(span)
    .await;
    world.stop().await;
}

/// `Ok` when the trace leads to the steps that computed its requests, those to the calls of every shard and to what happened there, and back.
fn shards(spans: &[CollectedSpan], trace: &[CollectedSpan]) -> Result<(), String> {
    let requests: Vec<_> = trace.iter().filter(|span| span.name == "language.generate").collect();
    if requests.len() != 2 {
        return Err(format!("{} generations", requests.len()));
    }
    for request in requests {
        let is_linked = |a: &CollectedSpan, b: &CollectedSpan| a.links.contains(&(b.trace_id.clone(), b.span_id.clone()));
        let steps: Vec<_> = spans.iter().filter(|span| span.name == "language.step" && is_linked(request, span)).collect();
        let step = steps.iter().find(|step| is_linked(step, request)).ok_or(format!("none of {} steps leads back", steps.len()))?;
        let below = |parent: &CollectedSpan, name: &str| -> Vec<&CollectedSpan> {
            spans.iter().filter(|span| span.parent_id == parent.span_id && span.name == name).collect()
        };
        let calls = below(step, "experts.call");
        let called: BTreeSet<&str> = calls.iter().filter_map(|call| call.attributes.get("janua.shard")).map(String::as_str).collect();
        if called != BTreeSet::from(["0-7", "8-15"]) {
            return Err(format!("calls of {called:?}"));
        }
        for call in calls {
            if call.trace_id != step.trace_id || below(call, "experts/Compute").is_empty() {
                return Err(format!("nothing happened at {:?}", call.attributes));
            }
        }
    }
    Ok(())
}

/// Sends a request with the current span's context in its headers, as an instrumented client does.
async fn send(world: &World, message: v1::GenerateRequest) {
    let mut headers = http::HeaderMap::new();
    telemetry::inject(&mut headers);
    assert!(headers.contains_key("traceparent"));
    let mut call = tonic::Request::new(message);
    *call.metadata_mut() = tonic::metadata::MetadataMap::from_headers(headers);
    Answer::read(world.client().generate(call).await.unwrap().into_inner()).await.unwrap();
}

/// All spans of the trace that begins with the client's span `label`.
fn trace_of(spans: &[CollectedSpan], label: &str) -> Vec<CollectedSpan> {
    let root = spans.iter().find(|span| span.name == label).unwrap_or_else(|| panic!("no span {label:?}"));
    spans.iter().filter(|span| span.trace_id == root.trace_id).cloned().collect()
}

/// `Ok` when the spans are one tree: one root, every parent among them, and a server span of every service.
fn tree(spans: &[CollectedSpan]) -> Result<(), String> {
    let ids: BTreeMap<&str, &CollectedSpan> = spans.iter().map(|span| (span.span_id.as_str(), span)).collect();
    let roots = spans.iter().filter(|span| span.parent_id.is_empty()).count();
    if roots != 1 {
        return Err(format!("{roots} roots"));
    }
    if let Some(orphan) = spans.iter().find(|span| !span.parent_id.is_empty() && !ids.contains_key(span.parent_id.as_str())) {
        return Err(format!("the parent of {:?} is missing", orphan.name));
    }
    let found: BTreeSet<&str> = spans.iter().filter(|span| span.kind == SERVER).map(owner).collect();
    match SERVICES.iter().find(|service| !found.contains(*service)) {
        Some(missing) => Err(format!("no span of {missing} among {found:?}")),
        None => Ok(()),
    }
}

/// Which service a span belongs to; empty for spans inside one.
fn owner(span: &CollectedSpan) -> &str {
    span.attributes.get("janua.service").map_or("", String::as_str)
}
