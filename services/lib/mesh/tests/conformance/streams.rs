//! Streams are live: nothing waits for what need not come, nothing outlives its call, and nobody is held up by somebody else.

use std::pin::Pin;
use std::sync::Arc;

use futures::future::join_all;
use futures::{StreamExt as _, stream};
use mesh::Target;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Response};

use crate::generated::conformance_client::ConformanceClient;
use crate::generated::{Ask, Blob, Sum};
use crate::script::{Census, Script, blob, content, during, is_blob, numbered};
use crate::world::{Over, World};

conformance! { [InProcess Nats NatsShort Direct]
    headers_come_before_messages answers_may_come_before_requests a_message_is_not_held_back_for_the_next
    the_request_stream_is_dropped_when_the_handler_has_answered both_streams_are_dropped_with_the_call
    a_request_stream_is_dropped_at_the_deadline stalled_streams_hold_up_nobody
    unknown_methods_are_unimplemented odd_names_are_names_like_others three_instances_share_the_calls
    a_channel_may_be_there_before_the_instance
}

/// What is left of a request when its sender must show that it is dropped.
fn endless(census: &Census) -> impl futures::Stream<Item = Blob> + Send + 'static {
    during(census.enter(), numbered(0..u64::MAX, 5000))
}

async fn headers_come_before_messages(over: Over) {
    let world = World::new(over).await;
    let go = Arc::new(Semaphore::new(0));
    let held = go.clone();
    let script = Script::new().download(move |_| {
        let held = held.clone();
        async move {
            let late = stream::once(async move {
                held.acquire().await.unwrap().forget();
                Ok(blob(0, 100))
            });
            let mut response = Response::new(late.boxed());
            response.metadata_mut().insert("x-early", "yes".parse().unwrap());
            Ok(response)
        }
    });
    let _serving = world.serve_routes(script.routes()).await;
    let response = world.client().download(Ask::default()).await.unwrap();
    assert_eq!(response.metadata().get("x-early").unwrap(), "yes");
    go.add_permits(1);
    let mut answers = response.into_inner();
    assert!(is_blob(&answers.message().await.unwrap().unwrap(), 0, 100));
    assert_eq!(answers.message().await.unwrap(), None);
}

async fn answers_may_come_before_requests(over: Over) {
    let world = World::new(over).await;
    let script = Script::new().chat(async |request| {
        let rest = Pin::from(Box::new(request.into_inner()));
        Ok(Response::new(stream::iter([Ok(blob(0, 100))]).chain(rest).boxed()))
    });
    let _serving = world.serve_routes(script.routes()).await;
    let (sender, requests) = mpsc::channel(1);
    let mut answers = world.client().chat(ReceiverStream::new(requests)).await.unwrap().into_inner();
    assert!(is_blob(&answers.message().await.unwrap().unwrap(), 0, 100));
    sender.send(blob(1, 100)).await.unwrap();
    assert!(is_blob(&answers.message().await.unwrap().unwrap(), 1, 100));
    drop(sender);
    assert_eq!(answers.message().await.unwrap(), None);
}

/// Ping-pong at lengths that fill a piece, a message of the broker, a window, and none of them.
async fn a_message_is_not_held_back_for_the_next(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve_routes(Script::random(&Census::new(), 0).routes()).await;
    let (sender, requests) = mpsc::channel(1);
    let mut answers = world.client().chat(ReceiverStream::new(requests)).await.unwrap().into_inner();
    for size in [0, 1, 8191, 8192, 16_384, 32_768, 65_400, 65_536, 70_000, 524_288, 600_000, 2_097_152, 3_000_000, 5] {
        for _ in 0..3 {
            let sent = Blob { data: content(size as u64, size), ..Blob::default() };
            sender.send(sent.clone()).await.unwrap();
            assert!(answers.message().await.unwrap().unwrap() == sent, "{size} bytes come back otherwise");
        }
    }
}

async fn the_request_stream_is_dropped_when_the_handler_has_answered(over: Over) {
    let world = World::new(over).await;
    let script = Script::new()
        .upload(async |request| {
            let first = request.into_inner().message().await?.unwrap_or_default();
            Ok(Response::new(Sum { count: 1, bytes: first.data.len() as u64 }))
        })
        .chat(async |request| {
            let mut requests = request.into_inner();
            let first = requests.message().await?.unwrap_or_default();
            Ok(Response::new(stream::iter([Ok(first)]).boxed()))
        });
    let _serving = world.serve_routes(script.routes()).await;
    let mut client = world.client();
    let senders = Census::new();
    assert_eq!(client.upload(endless(&senders)).await.unwrap().into_inner().count, 1);
    senders.reaches("senders after an early answer", 0).await;
    let mut answers = client.chat(endless(&senders)).await.unwrap().into_inner();
    assert!(is_blob(&answers.message().await.unwrap().unwrap(), 0, 5000));
    assert_eq!(answers.message().await.unwrap(), None);
    drop(answers);
    senders.reaches("senders after an early end", 0).await;
}

async fn both_streams_are_dropped_with_the_call(over: Over) {
    let world = World::new(over).await;
    let (handlers, senders) = (Census::new(), Census::new());
    let _serving = world.serve_routes(Script::random(&handlers, 5000).routes()).await;
    let mut client = world.client();
    for read in [0, 1, 500] {
        let mut answers = client.chat(endless(&senders)).await.unwrap().into_inner();
        for number in 0..read {
            assert!(is_blob(&answers.message().await.unwrap().unwrap(), number, 5000));
        }
        drop(answers);
        senders.reaches("senders of a dropped call", 0).await;
        handlers.reaches("handlers of a dropped call", 0).await;
    }
}

async fn a_request_stream_is_dropped_at_the_deadline(over: Over) {
    let world = World::new(over).await;
    let (handlers, senders) = (Census::new(), Census::new());
    let present = handlers.clone();
    let script = Script::new().upload(move |request| {
        let present = present.enter();
        async move {
            let _held = (present, request);
            std::future::pending().await
        }
    });
    let _serving = world.serve_routes(script.routes()).await;
    let mut request = Request::new(endless(&senders));
    request.set_timeout(std::time::Duration::from_millis(300));
    let status = world.client().upload(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    senders.reaches("senders after the deadline", 0).await;
    handlers.reaches("handlers after the deadline", 0).await;
}

/// Forty readers and ten handlers have stopped in the middle; others are served, and then those go on where they were.
async fn stalled_streams_hold_up_nobody(over: Over) {
    const SIZE: usize = 20_000;
    const COUNT: u64 = 600;
    let world = World::new(over).await;
    let go = Arc::new(Semaphore::new(0));
    let held = go.clone();
    let script = Script::random(&Census::new(), SIZE).upload(move |request| {
        let held = held.clone();
        async move {
            held.acquire().await.unwrap().forget();
            Ok(Response::new(crate::script::sum(request.into_inner(), SIZE).await?))
        }
    });
    let _serving = world.serve_routes(script.routes()).await;
    let ask = Ask { count: COUNT as u32, size: SIZE as u32, ..Ask::default() };
    let mut client = world.client();
    let mut stalled = Vec::new();
    for _ in 0..40 {
        stalled.push(client.download(ask.clone()).await.unwrap().into_inner());
    }
    let mut uploader = world.client();
    let uploads = tokio::spawn(async move {
        let uploads = (0..10).map(|_| {
            let mut client = uploader.clone();
            async move { client.upload(numbered(0..COUNT, SIZE)).await.unwrap().into_inner().count }
        });
        let counts = join_all(uploads).await;
        uploader.unary(Ask::default()).await.unwrap();
        counts
    });
    for number in 0..100 {
        let data = content(number, SIZE);
        assert!(client.unary(Ask { data: data.clone(), ..Ask::default() }).await.unwrap().into_inner().data == data);
        let mut answers = client.chat(numbered(0..3, SIZE)).await.unwrap().into_inner();
        for number in 0..3 {
            assert!(is_blob(&answers.message().await.unwrap().unwrap(), number, SIZE));
        }
    }
    go.add_permits(10);
    assert_eq!(uploads.await.unwrap(), [COUNT; 10]);
    for mut answers in stalled {
        for number in 0..COUNT {
            assert!(is_blob(&answers.message().await.unwrap().unwrap(), number, SIZE), "blob {number} is another");
        }
        assert_eq!(answers.message().await.unwrap(), None);
    }
}

async fn unknown_methods_are_unimplemented(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve_routes(Script::random(&Census::new(), 0).routes()).await;
    for path in ["/conformance.v1.Conformance/Nope", "/conformance.v1.Nope/Unary", "/grpc.health.v1.Health/Nope"] {
        let mut client = tonic::client::Grpc::new(world.calling.channel(&world.target));
        let codec = tonic_prost::ProstCodec::<Ask, Blob>::default();
        let answer = client.unary(Request::new(Ask::default()), PathAndQuery::from_static(path), codec).await;
        assert_eq!(answer.unwrap_err().code(), Code::Unimplemented, "{path}");
    }
    world.client().unary(Ask::default()).await.unwrap();
}

async fn odd_names_are_names_like_others(over: Over) {
    let world = World::new(over).await;
    let names = ["deepseek-ai/Janus-Pro-7B", "a.b", "a b", "*", ">", "模型", "", "x=2E", "x."];
    let mut servings = Vec::new();
    for name in names {
        let script = Script::new().unary(async move |_| Ok(Response::new(Blob { instance: name.to_owned(), ..Blob::default() })));
        servings.push(world.serving.serve(Target::new("odd service", name).shard(name), script.routes()).await.unwrap());
    }
    for name in names {
        let target = Target::new("odd service", name).shard(name);
        assert!(world.calling.is_served(&target).await, "{name:?}");
        let mut client = ConformanceClient::new(world.calling.channel(&target));
        assert_eq!(client.unary(Ask::default()).await.unwrap().into_inner().instance, name);
    }
    assert!(!world.calling.is_served(&Target::new("odd service", "a b")).await, "without its shard it is another target");
}

async fn three_instances_share_the_calls(over: Over) {
    let world = World::new(over).await;
    let mut served = Vec::new();
    for name in ["a", "b", "c"] {
        let mesh = world.another().await;
        let script = Script::new().unary(async move |_| Ok(Response::new(Blob { instance: name.to_owned(), ..Blob::default() })));
        let serving = mesh.serve(world.target.clone(), script.routes()).await.unwrap();
        served.push((mesh, serving));
    }
    let mut client = world.client();
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    for _ in 0..300 {
        let answer = client.unary(Ask::default()).await.unwrap().into_inner();
        *counts.entry(answer.instance).or_default() += 1;
    }
    // Each gets 100 on average; fewer than 40 come by chance once in 10^14 runs.
    assert!(counts.len() == 3 && counts.values().all(|count| *count >= 40), "{counts:?}");
}

async fn a_channel_may_be_there_before_the_instance(over: Over) {
    let world = World::new(over).await;
    let mut client = world.client();
    for _ in 0..3 {
        assert_eq!(client.unary(Ask::default()).await.unwrap_err().code(), Code::Unavailable);
        let serving = world.serve_routes(Script::random(&Census::new(), 0).routes()).await;
        client.unary(Ask::default()).await.expect("an offer holds from the moment that serve returns");
        serving.drain(crate::world::LIMIT).await;
    }
}
