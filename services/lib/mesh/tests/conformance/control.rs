//! Deadlines, cancellation, panics, limits and drain.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use futures::{StreamExt as _, stream};
use mesh::MeshConfig;
use testkit::wait_until;
use tonic::{Code, Request};

use crate::basics::{ask, blobs};
use crate::generated::{Ask, Blob, End};
use crate::service::{Service, Watch};
use crate::world::{LIMIT, Over, World};

conformance! { [InProcess Nats NatsShort Direct]
    a_deadline_before_the_response_drops_the_handler a_deadline_mid_stream_drops_the_handler
    a_deadline_holds_while_nobody_reads a_deadline_ends_an_upload a_malformed_deadline_is_refused
    dropping_a_waiting_call_drops_the_handler dropping_a_stream_drops_the_handler dropping_an_upload_drops_the_handler
    dropping_a_stalled_stream_drops_the_handler the_server_may_answer_before_the_request_ends
    a_panic_is_one_status_and_nothing_else too_many_calls_are_refused_and_the_rest_run
    a_drain_lets_running_calls_finish a_drain_ends_what_outlasts_its_grace an_instance_that_leaves_loses_no_call
}

const SOON: Duration = Duration::from_millis(300);

fn hang(count: u32) -> Ask {
    Ask { count, size: 10, end: End::Hang.into(), ..Ask::default() }
}

fn soon(ask: Ask) -> Request<Ask> {
    let mut request = Request::new(ask);
    request.set_timeout(SOON);
    request
}

async fn wait_for(what: &str, counter: &AtomicUsize, count: usize) {
    wait_until(what, LIMIT, async || Watch::count(counter) == count).await;
}

async fn a_deadline_before_the_response_drops_the_handler(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let status = world.client().unary(soon(hang(0))).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    wait_for("the handler to be dropped", &service.watch.dropped, 1).await;
}

async fn a_deadline_mid_stream_drops_the_handler(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let mut answers = world.client().download(soon(hang(5))).await.unwrap().into_inner();
    for number in 0..5 {
        assert_eq!(answers.message().await.unwrap().unwrap().number, number);
    }
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    wait_for("the handler to be dropped", &service.watch.dropped, 1).await;
}

/// The stream is longer than every window and its reader has stopped: flow control holds the handler, the deadline still ends it.
async fn a_deadline_holds_while_nobody_reads(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let endless = Ask { count: u32::MAX, size: 4096, ..Ask::default() };
    let mut answers = world.client().download(soon(endless)).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    wait_for("the handler to be dropped", &service.watch.dropped, 1).await;
    let status = loop {
        if let Err(status) = answers.message().await {
            break status;
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
}

async fn a_deadline_ends_an_upload(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let mut request = Request::new(stream::iter(blobs(3, 10)).chain(stream::pending()));
    request.set_timeout(SOON);
    let status = world.client().upload(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    wait_for("the handler to be dropped", &service.watch.dropped, 1).await;
}

async fn a_malformed_deadline_is_refused(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let mut request = Request::new(ask(b"x"));
    request.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    assert_eq!(world.client().unary(request).await.unwrap_err().code(), Code::InvalidArgument);
}

async fn dropping_a_waiting_call_drops_the_handler(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let mut client = world.client();
    let call = tokio::spawn(async move { client.unary(hang(0)).await });
    wait_for("the handler to start", &service.watch.started, 1).await;
    call.abort();
    wait_for("the handler to be dropped", &service.watch.dropped, 1).await;
}

async fn dropping_a_stream_drops_the_handler(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let mut answers = world.client().download(hang(3)).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    drop(answers);
    wait_for("the handler to be dropped", &service.watch.dropped, 1).await;
}

async fn dropping_a_stalled_stream_drops_the_handler(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let endless = Ask { count: u32::MAX, size: 4096, ..Ask::default() };
    let answers = world.client().download(endless).await.unwrap().into_inner();
    drop(answers);
    wait_for("the handler to be dropped", &service.watch.dropped, 1).await;
}

async fn dropping_an_upload_drops_the_handler(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let mut client = world.client();
    let call = tokio::spawn(async move { client.upload(stream::iter(blobs(3, 10)).chain(stream::pending())).await });
    wait_for("the handler to start", &service.watch.started, 1).await;
    call.abort();
    wait_for("the handler to be dropped", &service.watch.dropped, 1).await;
}

/// The handler refuses at the first wrong message, while the caller would go on for ever.
async fn the_server_may_answer_before_the_request_ends(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let endless = stream::repeat(Blob { number: 1, data: vec![0; 1000].into(), ..Blob::default() });
    let status = world.client().upload(endless).await.unwrap_err();
    assert_eq!(status.code(), Code::DataLoss, "{status}");
}

async fn a_panic_is_one_status_and_nothing_else(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let mut client = world.client();
    let mut bystander = client.download(hang(1)).await.unwrap().into_inner();
    let panic = Ask { count: 1, size: 1, end: End::Panic.into(), ..Ask::default() };
    assert_eq!(client.unary(panic.clone()).await.unwrap_err().code(), Code::Internal);
    let mut answers = client.download(panic).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    assert_eq!(answers.message().await.unwrap_err().code(), Code::Internal);
    bystander.message().await.unwrap().unwrap();
    client.unary(ask(b"x")).await.unwrap();
    wait_for("the panicked handlers to be dropped", &service.watch.dropped, 3).await;
}

async fn too_many_calls_are_refused_and_the_rest_run(over: Over) {
    let world = World::with(over, |config| MeshConfig { max_calls: 4, ..config }).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let mut client = world.client();
    let mut running = Vec::new();
    for _ in 0..4 {
        running.push(client.download(hang(1)).await.unwrap().into_inner());
    }
    assert_eq!(client.unary(ask(b"x")).await.unwrap_err().code(), Code::ResourceExhausted);
    for answers in &mut running {
        answers.message().await.unwrap().unwrap();
    }
    running.pop();
    wait_for("a place to be free", &service.watch.dropped, 1).await;
    client.unary(ask(b"x")).await.unwrap();
}

async fn a_drain_lets_running_calls_finish(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let serving = world.serve(&service).await;
    let mut client = world.client();
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut answers = client.chat(tokio_stream::wrappers::ReceiverStream::new(receiver)).await.unwrap().into_inner();
    sender.send(Blob { number: 1, ..Blob::default() }).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().number, 1);
    let draining = tokio::spawn(serving.drain(LIMIT));
    wait_until("new calls to be refused", LIMIT, async || client.unary(ask(b"x")).await.is_err()).await;
    assert_eq!(client.unary(ask(b"x")).await.unwrap_err().code(), Code::Unavailable);
    sender.send(Blob { number: 2, ..Blob::default() }).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().number, 2);
    assert!(!draining.is_finished());
    drop(sender);
    assert_eq!(answers.message().await.unwrap(), None);
    draining.await.unwrap();
}

async fn a_drain_ends_what_outlasts_its_grace(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let serving = world.serve(&service).await;
    let mut answers = world.client().download(hang(1)).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    serving.drain(SOON).await;
    let status = answers.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    wait_for("the handler to be dropped", &service.watch.dropped, 1).await;
}

/// Calls come without a pause while instances come and go; not one of them fails.
async fn an_instance_that_leaves_loses_no_call(over: Over) {
    let world = World::new(over).await;
    let _stays = world.serve(&Service::named("stays")).await;
    let stop = Arc::new(AtomicBool::new(false));
    let callers = (0..8).map(|_| {
        let (mut client, stop) = (world.client(), stop.clone());
        tokio::spawn(async move {
            let mut calls = 0;
            while !stop.load(Ordering::SeqCst) {
                client.unary(ask(b"x")).await.unwrap();
                calls += 1;
            }
            calls
        })
    });
    let callers: Vec<_> = callers.collect();
    for _ in 0..5 {
        let service = Service::named("goes");
        let mesh = world.another().await;
        let serving = mesh.serve(world.target.clone(), service.routes()).await.unwrap();
        wait_until("the new instance to get calls", LIMIT, async || Watch::count(&service.watch.started) >= 20).await;
        serving.drain(LIMIT).await;
        let seen = Watch::count(&service.watch.started);
        world.client().unary(ask(b"x")).await.unwrap();
        assert_eq!(Watch::count(&service.watch.started), seen, "it is called after it has left");
    }
    stop.store(true, Ordering::SeqCst);
    for calls in join_all(callers).await {
        assert!(calls.unwrap() > 0);
    }
}
