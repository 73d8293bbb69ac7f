//! The same answers over every wire, and a drain that loses none of them.
#![allow(clippy::unwrap_used)]

mod fakes;

use std::time::Duration;

use fakes::*;
use futures::StreamExt;
use mesh::{Mesh, MeshConfig, Target};
use process::Offer;
use proto::v1;
use proto::v1::generate_response::Event;
use proto::v1::janua_client::JanuaClient;
use testkit::{NatsServer, wait_until};
use tokio::sync::Semaphore;
use tonic::Code;
use tonic::transport::Endpoint;

/// Text, pictures, images, carry-over and leaving, over the mesh `bench` runs on.
async fn answers(bench: &Bench) {
    bench.script.unary_faults.lock().unwrap().push_back(Code::Unavailable);
    let gone = Fault { after: 9, code: Some(Code::Unavailable) };
    bench.script.language_faults.lock().unwrap().push_back(gone);
    let mut request = chat(vec![text_part("look"), image_part(b"a"), text_part("and"), image_part(b"b")], 40);
    request.sampling.as_mut().unwrap().n = Some(3);
    let events = bench.ask(request).await.unwrap();
    for choice in 0..3 {
        assert_eq!(text_of(&events, choice), answer(choice.into(), 40));
    }
    assert_eq!(
        usage_of(&events),
        v1::Usage { prompt_tokens: 13, image_tokens: 6, output_tokens: 120, cached_tokens: 1, degraded_tokens: 0 }
    );

    let events = bench.ask(draw("a hut", v1::ImageSampling { seed: Some(3), ..v1::ImageSampling::default() })).await.unwrap();
    let codes = events.iter().find_map(|event| match event {
        Event::Image(image) => Some(image.codes.clone()),
        _ => None,
    });
    assert_eq!(codes.unwrap(), (0..12).map(|i| code(3, i)).collect::<Vec<_>>());

    // A sequence that has begun and cannot end by itself.
    bench.script.steps.forget_permits(Semaphore::MAX_PERMITS);
    bench.script.steps.add_permits(5);
    let mut stream = bench.open(chat(vec![text_part("x")], 10)).await.unwrap();
    until(&mut stream, |event| matches!(event, Event::Text(_))).await;
    assert_eq!(bench.script.alive(), 1);
    drop(stream);
    wait_until("it ends with its reader", LIMIT, async || bench.script.alive() == 0).await;

    let status = bench.ask(chat(vec![image_part(b"?")], 3)).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "chat.messages[0].parts[0].image: not a picture"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_process() {
    answers(&Bench::new(Script::new()).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_nats() {
    let nats = NatsServer::start().await;
    let mesh = Mesh::connect(&MeshConfig::nats(nats.url())).await.unwrap();
    answers(&Bench::on(mesh, Script::new()).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_http2() {
    let nats = NatsServer::start().await;
    let mesh = Mesh::connect(&MeshConfig::direct(nats.url())).await.unwrap();
    answers(&Bench::on(mesh, Script::new()).await).await;
}

/// Requests that were taken are finished, through the door and over the mesh, by stages that stay until then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_finishes_what_was_taken() {
    let script = Script::new();
    script.steps.forget_permits(Semaphore::MAX_PERMITS);
    let bench = Bench::bare(script.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let routes = router::routes(&bench.host).unwrap();
    router::listen(&bench.host, listener, routes.clone());
    let mut offers: Vec<Offer> =
        SERVICES.iter().map(|service| Offer { target: Target::new(*service, MODEL), routes: bench.routes(service) }).collect();
    offers.push(Offer { target: Target::new("router", "janua"), routes });
    let served = process::serve(&bench.mesh, &bench.host.doors, offers).await.unwrap();

    let mut door = JanuaClient::new(Endpoint::from_shared(address.clone()).unwrap().connect().await.unwrap());
    let mut outside = door.generate(chat(vec![text_part("x")], 30)).await.unwrap().into_inner();
    let mut inside = bench.open(chat(vec![text_part("x")], 30)).await.unwrap();
    for stream in [&mut outside, &mut inside] {
        until(stream, |event| matches!(event, Event::Started(_))).await;
    }
    let drain = tokio::spawn(served.drain(Duration::from_secs(60)));
    wait_until("nobody new is let in", LIMIT, async || !bench.mesh.is_served(&Target::new("router", "janua")).await).await;
    assert_eq!(bench.open(chat(vec![text_part("x")], 1)).await.unwrap_err().code(), Code::Unavailable);
    wait_until("the door is shut", LIMIT, async || Endpoint::from_shared(address.clone()).unwrap().connect().await.is_err()).await;
    script.steps.add_permits(1000);
    for stream in [outside, inside] {
        let events: Vec<_> = stream.map(|response| response.unwrap().event.unwrap()).collect().await;
        assert_eq!(text_of(&events, 0), answer(0, 30));
        assert!(matches!(events.last(), Some(Event::Completed(_))));
    }
    drop(door);
    tokio::time::timeout(LIMIT, drain).await.unwrap().unwrap();
}
