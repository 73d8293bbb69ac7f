//! The four kinds of calls, metadata, trailers, errors, health and reflection.

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use mesh::{Routes, Target};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tonic_types::StatusExt as _;

use crate::generated::{Ask, Blob, End};
use crate::service::{Service, refusal};
use crate::world::{Over, World};

conformance! { [InProcess Nats NatsShort Direct]
    unary empty_messages client_streaming server_streaming bidi_in_lockstep bidi_request_outlives_nothing
    metadata_both_ways an_error_carries_everything an_error_after_messages_comes_in_trailers
    what_is_not_offered_is_unimplemented nobody_there_is_unavailable_at_once targets_are_kept_apart
    health_is_checked_and_watched reflection_lists_what_is_offered
}

pub fn ask(data: &'static [u8]) -> Ask {
    Ask { data: Bytes::from_static(data), ..Ask::default() }
}

pub fn blobs(count: u64, size: usize) -> Vec<Blob> {
    (0..count).map(|number| Blob { data: Bytes::from(vec![number as u8; size]), number, ..Blob::default() }).collect()
}

async fn unary(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let mut client = world.client();
    for _ in 0..3 {
        let answer = client.unary(ask(b"hello")).await.unwrap().into_inner();
        assert_eq!(answer, Blob { data: Bytes::from_static(b"hello"), number: 0, instance: "a".to_owned() });
    }
}

async fn empty_messages(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("")).await;
    let mut client = world.client();
    assert_eq!(client.unary(Ask::default()).await.unwrap().into_inner(), Blob::default());
    let sum = client.upload(stream::iter(Vec::<Blob>::new())).await.unwrap().into_inner();
    assert_eq!(sum.count, 0);
    let mut answers = client.download(Ask::default()).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap(), None);
    let mut answers = client.chat(stream::iter(Vec::<Blob>::new())).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap(), None);
}

async fn client_streaming(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let sum = world.client().upload(stream::iter(blobs(500, 1000))).await.unwrap().into_inner();
    assert_eq!((sum.count, sum.bytes), (500, 500_000));
}

async fn server_streaming(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let ask = Ask { count: 500, size: 1000, ..Ask::default() };
    let answers: Vec<_> = world.client().download(ask).await.unwrap().into_inner().collect().await;
    assert_eq!(answers.len(), 500);
    for (number, blob) in answers.into_iter().enumerate() {
        let blob = blob.unwrap();
        assert_eq!((blob.number, blob.data.len()), (number as u64, 1000));
        assert!(blob.data.iter().all(|byte| *byte == number as u8));
    }
}

/// Each message waits for the answer to the one before: nothing may be held back in the hope of more.
async fn bidi_in_lockstep(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut answers = world.client().chat(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    for number in 0..50 {
        sender.send(Blob { number, ..Blob::default() }).await.unwrap();
        assert_eq!(answers.message().await.unwrap().unwrap().number, number);
    }
    drop(sender);
    assert_eq!(answers.message().await.unwrap(), None);
}

/// All requests are sent before the first answer is read.
async fn bidi_request_outlives_nothing(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let answers = world.client().chat(stream::iter(blobs(300, 100))).await.unwrap().into_inner();
    let numbers: Vec<u64> = answers.map(|blob| blob.unwrap().number).collect().await;
    assert_eq!(numbers, (0..300).collect::<Vec<_>>());
}

async fn metadata_both_ways(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let mut request = Request::new(ask(b"x"));
    let texts = ["one", "two words", "~!@#"];
    let binaries: [&[u8]; 3] = [b"", &[0, 1, 2, 253, 254, 255], b"\r\n\0"];
    for text in texts {
        request.metadata_mut().append("x-echo", text.parse().unwrap());
    }
    for binary in binaries {
        request.metadata_mut().append_bin("x-echo-bin", MetadataValue::from_bytes(binary));
    }
    let response = world.client().unary(request).await.unwrap();
    let back: Vec<_> = response.metadata().get_all("x-echo").iter().map(|value| value.to_str().unwrap().to_owned()).collect();
    assert_eq!(back, texts);
    let back: Vec<_> = response.metadata().get_all_bin("x-echo-bin").iter().map(|value| value.to_bytes().unwrap()).collect();
    assert_eq!(back, binaries);
}

fn assert_is_refusal(status: &tonic::Status) {
    let expected = refusal();
    assert_eq!((status.code(), status.message()), (expected.code(), expected.message()));
    assert_eq!(status.details(), expected.details());
    let details = status.get_error_details();
    assert_eq!(details.bad_request().unwrap().field_violations[0].field, "ask.end");
    assert_eq!(details.request_info().unwrap().request_id, "7");
    assert_eq!(status.metadata().get("x-reason").unwrap(), "asked");
    assert_eq!(status.metadata().get_bin("x-reason-bin").unwrap().to_bytes().unwrap(), &[0, 255, 10, 13][..]);
}

async fn an_error_carries_everything(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let ask = Ask { end: End::Abort.into(), ..Ask::default() };
    assert_is_refusal(&world.client().unary(ask).await.unwrap_err());
}

async fn an_error_after_messages_comes_in_trailers(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let ask = Ask { count: 20, size: 10, end: End::Abort.into(), ..Ask::default() };
    let mut answers = world.client().download(ask).await.unwrap().into_inner();
    for number in 0..20 {
        assert_eq!(answers.message().await.unwrap().unwrap().number, number);
    }
    assert_is_refusal(&answers.message().await.unwrap_err());
}

async fn what_is_not_offered_is_unimplemented(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve_routes(Routes::new()).await;
    let status = world.client().unary(ask(b"x")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
    assert!(status.message().contains("conformance.v1.Conformance"), "{status}");
}

async fn nobody_there_is_unavailable_at_once(over: Over) {
    let world = World::new(over).await;
    let status = world.client().unary(ask(b"x")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let status = world.client().chat(stream::pending()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(!world.calling.is_served(&world.target).await);
    let serving = world.serve(&Service::named("a")).await;
    assert!(world.calling.is_served(&world.target).await);
    world.client().unary(ask(b"x")).await.unwrap();
    drop(serving);
    testkit::wait_until("the offer to be gone", crate::world::LIMIT, async || !world.calling.is_served(&world.target).await).await;
    assert_eq!(world.client().unary(ask(b"x")).await.unwrap_err().code(), Code::Unavailable);
}

/// One process serves two models of the same service.
async fn targets_are_kept_apart(over: Over) {
    let mut world = World::new(over).await;
    let mut servings = Vec::new();
    let targets = [Target::new("conformance", "a"), Target::new("conformance", "b"), Target::new("conformance", "b").shard("0")];
    for (name, target) in ["first", "second", "third"].into_iter().zip(&targets) {
        servings.push(world.serving.serve(target.clone(), Service::named(name).routes()).await.unwrap());
    }
    for (name, target) in ["first", "second", "third"].into_iter().zip(targets) {
        world.target = target;
        for _ in 0..3 {
            assert_eq!(world.client().unary(ask(b"x")).await.unwrap().into_inner().instance, name);
        }
    }
}

async fn health_is_checked_and_watched(over: Over) {
    let world = World::new(over).await;
    let routes = Service::named("a").routes();
    let _serving = world.serve_routes(routes.clone()).await;
    let mut client = HealthClient::new(world.calling.channel(&world.target));
    let named = |service: &str| HealthCheckRequest { service: service.to_owned() };
    let mut changes = client.watch(named("conformance.v1.Conformance")).await.unwrap().into_inner();
    for (serving, expected) in [(true, ServingStatus::Serving), (false, ServingStatus::NotServing), (true, ServingStatus::Serving)] {
        routes.set_serving(serving);
        assert_eq!(changes.message().await.unwrap().unwrap().status(), expected);
        for service in ["", "conformance.v1.Conformance"] {
            assert_eq!(client.check(named(service)).await.unwrap().into_inner().status(), expected, "{service:?}");
        }
    }
    assert_eq!(client.check(named("no.such.Service")).await.unwrap_err().code(), Code::NotFound);
    let mut unknown = client.watch(named("no.such.Service")).await.unwrap().into_inner();
    assert_eq!(unknown.message().await.unwrap().unwrap().status(), ServingStatus::ServiceUnknown);
}

async fn reflection_lists_what_is_offered(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let mut client = ServerReflectionClient::new(world.calling.channel(&world.target));
    let questions =
        [MessageRequest::ListServices(String::new()), MessageRequest::FileContainingSymbol("conformance.v1.Conformance.Unary".to_owned())];
    let questions = questions.map(|question| ServerReflectionRequest { host: String::new(), message_request: Some(question) });
    let answers = client.server_reflection_info(stream::iter(questions)).await.unwrap().into_inner();
    let answers: Vec<ServerReflectionResponse> = answers.map(Result::unwrap).collect().await;
    let Some(MessageResponse::ListServicesResponse(list)) = &answers[0].message_response else { panic!("{answers:?}") };
    let mut names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["conformance.v1.Conformance", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"]);
    let Some(MessageResponse::FileDescriptorResponse(file)) = &answers[1].message_response else { panic!("{answers:?}") };
    assert!(!file.file_descriptor_proto.is_empty());
}
