//! One call is one tree of spans on every wire: caller, client, server, handler. In a test program of its own, because a process
//! has one subscriber.

#![allow(clippy::unwrap_used, dead_code, unused_macros)]

#[macro_use]
mod world;
mod generated;
mod service;

use futures::StreamExt as _;
use mesh::{Channel, Mesh};
use telemetry::TelemetryConfig;
use testkit::{CollectedSpan, TraceCollector};
use tracing::Instrument as _;

use crate::generated::Ask;
use crate::generated::conformance_client::ConformanceClient;
use crate::service::Service;
use crate::world::{Over, World};

const CLIENT: i32 = 3;
const SERVER: i32 = 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_is_one_tree_of_spans_on_every_wire() {
    let collector = TraceCollector::start().await;
    let config = TelemetryConfig { otlp_endpoint: Some(collector.endpoint()), ..TelemetryConfig::default() };
    let guard = telemetry::init(&config, "mesh-test").await.unwrap();
    let overs = [Over::InProcess, Over::Nats, Over::NatsShort, Over::Direct];
    for over in overs {
        let world = World::new(over).await;
        let _serving = world.serve(&Service::named("a")).await;
        calls(&world, &world.calling, &format!("{over:?}")).await;
        // The negative control: the same, with the context dropped on purpose.
        calls(&world, &world.calling.clone().without_trace_context(), &format!("{over:?} broken")).await;
    }
    guard.shutdown().await;
    let spans = collector.spans();
    for over in overs {
        check(&spans, &format!("{over:?}")).unwrap();
        let broken = check(&spans, &format!("{over:?} broken")).unwrap_err();
        assert!(broken.contains("server spans"), "{broken}");
    }
    assert!(!spans.iter().any(|span| span.name.contains("Health")), "probes have spans");
}

/// One unary call and one stream below a span named `root`.
async fn calls(world: &World, mesh: &Mesh, root: &str) {
    let channel: Channel = mesh.channel(&world.target);
    let work = async {
        let mut client = ConformanceClient::new(channel.clone());
        client.unary(Ask::default()).await.unwrap();
        let answers = client.download(Ask { count: 3, size: 10, ..Ask::default() }).await.unwrap().into_inner();
        assert_eq!(answers.count().await, 3);
        tonic_health::pb::health_client::HealthClient::new(channel).check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();
    };
    work.instrument(tracing::info_span!("root", otel.name = root)).await;
}

/// The tree: root, below it two client spans, below each one server span, below those four handler spans.
fn check(spans: &[CollectedSpan], root: &str) -> Result<(), String> {
    let root = spans.iter().find(|span| span.name == root).ok_or(format!("no span {root}"))?;
    let below = |parents: &[&CollectedSpan], kind: Option<i32>| -> Vec<&CollectedSpan> {
        let is_below =
            |span: &&CollectedSpan| parents.iter().any(|parent| parent.span_id == span.parent_id && parent.trace_id == span.trace_id);
        spans.iter().filter(is_below).filter(|span| kind.is_none_or(|kind| span.kind == kind)).collect()
    };
    let clients = below(&[root], Some(CLIENT));
    let servers = below(&clients, Some(SERVER));
    let handlers = below(&servers, None);
    let names = |spans: &[&CollectedSpan]| spans.iter().map(|span| span.name.clone()).collect::<Vec<_>>();
    if clients.len() != 2 {
        return Err(format!("{} has these client spans: {:?}", root.name, names(&clients)));
    }
    if servers.len() != 2 {
        return Err(format!("{} has these server spans: {:?}", root.name, names(&servers)));
    }
    if handlers.len() != 4 || handlers.iter().any(|span| span.name != "handler") {
        return Err(format!("{} has these handler spans: {:?}", root.name, names(&handlers)));
    }
    for span in clients.iter().chain(&servers) {
        if span.attributes.get("rpc.grpc.status_code").map(String::as_str) != Some("0") {
            return Err(format!("{} has no status: {:?}", span.name, span.attributes));
        }
    }
    Ok(())
}
