//! What has to do with the nats-server itself: its restart, its tooling, and strangers on its subjects.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::stream;
use mesh::MeshConfig;
use serde_json::Value;
use testkit::wait_until;
use tokio::net::TcpListener;
use tonic::Code;

use crate::basics::{ask, blobs};
use crate::generated::conformance_client::ConformanceClient;
use crate::generated::{Ask, Blob, End};
use crate::service::{Service, Watch};
use crate::world::{LIMIT, Over, World};

conformance! { [Nats NatsShort Direct]
    a_restarted_nats_server_is_found_again calls_during_an_outage_end_one_way_or_the_other
    the_services_api_lists_the_instance strangers_on_the_subjects_disturb_nobody
}

conformance! { [Direct]
    an_address_that_cannot_be_dialled_is_no_obstacle calls_go_over_the_connection_and_not_over_nats
    a_pinned_stream_outlives_a_restart_of_nats_server
    a_client_from_outside_needs_no_mesh
}

/// The address that the instance tells leads to nobody, or to another process: its calls go over NATS.
async fn an_address_that_cannot_be_dialled_is_no_obstacle(over: Over) {
    let stranger = World::new(over).await;
    let _elsewhere = stranger.serve(&Service::named("stranger")).await;
    let wrong = [TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap(), address_of(&stranger).await];
    for address in wrong {
        let bind = Some("127.0.0.1:0".parse().unwrap());
        let world = World::with(over, |config| MeshConfig { advertise: Some(address), bind, ..config }).await;
        let serving = world.serve(&Service::named("a")).await;
        for _ in 0..3 {
            assert_eq!(world.client().unary(ask(b"x")).await.unwrap().into_inner().instance, "a");
            assert_eq!(world.client_to(serving.instance()).unary(ask(b"x")).await.unwrap().into_inner().instance, "a");
        }
        assert_eq!(world.client().upload(stream::iter(blobs(100, 1000))).await.unwrap().into_inner().count, 100);
    }
}

async fn calls_go_over_the_connection_and_not_over_nats(over: Over) {
    let mut world = World::new(over).await;
    let serving = world.serve(&Service::named("a")).await;
    let mut clients = [world.client(), world.client_to(serving.instance())];
    for client in &mut clients {
        client.unary(ask(b"x")).await.unwrap();
    }
    world.broker.as_mut().unwrap().kill();
    for _ in 0..3 {
        for client in &mut clients {
            client.unary(ask(b"x")).await.unwrap();
        }
    }
}

async fn a_pinned_stream_outlives_a_restart_of_nats_server(over: Over) {
    let mut world = World::new(over).await;
    let serving = world.serve(&Service::named("a")).await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut answers = world.client_to(serving.instance()).chat(requests).await.unwrap().into_inner();
    for number in 0..3 {
        sender.send(Blob { number, ..Blob::default() }).await.unwrap();
        assert_eq!(answers.message().await.unwrap().unwrap().number, number);
        let broker = world.broker.as_mut().unwrap();
        broker.kill();
        broker.restart().await;
        wait_until("the instance to be found again", LIMIT, async || world.calling.is_served(&world.target).await).await;
    }
    drop(sender);
    assert_eq!(answers.message().await.unwrap(), None);
}

async fn a_client_from_outside_needs_no_mesh(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let endpoint = tonic::transport::Endpoint::new(format!("http://{}", address_of(&world).await)).unwrap();
    let mut client = ConformanceClient::new(endpoint.connect().await.unwrap());
    assert_eq!(client.unary(ask(b"x")).await.unwrap().into_inner().instance, "a");
    assert_eq!(client.upload(stream::iter(blobs(100, 1000))).await.unwrap().into_inner().count, 100);
}

/// The address that the world's one instance tells.
async fn address_of(world: &World) -> SocketAddr {
    let nats = async_nats::connect(world.url()).await.unwrap();
    let info = nats.request("$SRV.INFO.janua-conformance", "".into()).await.unwrap();
    let info: Value = serde_json::from_slice(&info.payload).unwrap();
    info["metadata"]["address"].as_str().unwrap().parse().unwrap()
}

async fn a_restarted_nats_server_is_found_again(over: Over) {
    let mut world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let mut client = world.client();
    for _ in 0..2 {
        let before = Watch::count(&service.watch.dropped);
        let ask_hang = Ask { count: 3, size: 10, end: End::Hang.into(), ..Ask::default() };
        let mut answers = client.download(ask_hang).await.unwrap().into_inner();
        answers.message().await.unwrap().unwrap();
        world.broker.as_mut().unwrap().kill();
        if over == Over::Direct {
            // HTTP/2 does not need the broker once the instance is known.
            answers.message().await.unwrap().unwrap();
            drop(answers);
        } else {
            let status = loop {
                if let Err(status) = answers.message().await {
                    break status;
                }
            };
            assert_eq!(status.code(), Code::Unavailable, "{status}");
        }
        wait_until("the handler to be dropped", LIMIT, async || Watch::count(&service.watch.dropped) > before).await;
        world.broker.as_mut().unwrap().restart().await;
        wait_until("calls to work again", LIMIT, async || client.unary(ask(b"x")).await.is_ok()).await;
        assert_eq!(client.upload(stream::iter(blobs(100, 1000))).await.unwrap().into_inner().count, 100);
        wait_until("the instance to be found again", LIMIT, async || world.calling.is_served(&world.target).await).await;
    }
}

async fn calls_during_an_outage_end_one_way_or_the_other(over: Over) {
    let mut world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let (mut client, stop) = (world.client(), stop.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    if let Err(status) = client.unary(ask(b"x")).await {
                        assert_eq!(status.code(), Code::Unavailable, "{status}");
                    }
                }
            })
        })
        .collect();
    for _ in 0..3 {
        let broker = world.broker.as_mut().unwrap();
        broker.kill();
        broker.restart().await;
        let mut client = world.client();
        wait_until("calls to work again", LIMIT, async || client.unary(ask(b"x")).await.is_ok()).await;
    }
    stop.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.await.unwrap();
    }
}

async fn the_services_api_lists_the_instance(over: Over) {
    let world = World::new(over).await;
    let serving = world.serve(&Service::named("a")).await;
    world.client().unary(ask(b"x")).await.unwrap();
    let nats = async_nats::connect(world.url()).await.unwrap();
    let question =
        async |subject: String| -> Value { serde_json::from_slice(&nats.request(subject, "".into()).await.unwrap().payload).unwrap() };
    let ping = question("$SRV.PING".to_owned()).await;
    assert_eq!((&ping["type"], &ping["name"]), (&"io.nats.micro.v1.ping_response".into(), &"janua-conformance".into()));
    let id = ping["id"].as_str().unwrap().to_owned();
    let info = question(format!("$SRV.INFO.janua-conformance.{id}")).await;
    assert_eq!(info["type"], "io.nats.micro.v1.info_response");
    let metadata = &info["metadata"];
    assert_eq!((&metadata["service"], &metadata["model"]), (&"conformance".into(), &"test/1.0".into()));
    assert_eq!(metadata["instance"], id.as_str());
    assert_eq!(metadata.get("address").is_some(), over == Over::Direct, "{metadata}");
    assert_eq!(info["endpoints"][0]["subject"], world.target.subject());
    let stats = question("$SRV.STATS.janua-conformance".to_owned()).await;
    assert_eq!(stats["type"], "io.nats.micro.v1.stats_response");
    assert_eq!(stats["endpoints"][0]["num_requests"], 1);
    serving.drain(LIMIT).await;
    let gone = nats.request("$SRV.PING.janua-conformance", "".into()).await.unwrap_err();
    assert_eq!(gone.kind(), async_nats::client::RequestErrorKind::NoResponders);
}

async fn strangers_on_the_subjects_disturb_nobody(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let mut client = world.client();
    client.unary(ask(b"x")).await.unwrap();
    let nats = async_nats::connect(world.url()).await.unwrap();
    let target = world.target.to_string();
    for subject in
        [format!("janua.{target}"), format!("janua-all.{target}"), "$SRV.INFO.janua-conformance".to_owned(), "$SRV.NOISE".to_owned()]
    {
        for noise in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[1; 39], &[1; 40], &[255; 5000]] {
            nats.publish(subject.clone(), noise.into()).await.unwrap();
            nats.publish_with_reply(subject.clone(), "noise", noise.into()).await.unwrap();
        }
    }
    // An answer to a malformed call comes at once: its sender need not wait for a deadline.
    let request = async_nats::Request::new().payload("noise".into()).timeout(Some(Duration::from_secs(30)));
    nats.send_request(format!("janua.{target}"), request).await.unwrap();
    client.unary(ask(b"x")).await.unwrap();
    assert_eq!(client.upload(stream::iter(blobs(10, 10))).await.unwrap().into_inner().count, 10);
}
