//! Instances by name: who is there, and calls to one of them and no other.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::future::join_all;
use futures::stream;
use mesh::{InstanceName, Target};
use testkit::wait_until;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::basics::ask;
use crate::generated::conformance_client::ConformanceClient;
use crate::generated::{Ask, Blob, End};
use crate::script::{blob, is_blob};
use crate::service::{Service, Watch};
use crate::world::{LIMIT, Over, World};

conformance! { [InProcess Nats NatsShort Direct]
    instances_are_listed_until_they_leave a_pinned_call_reaches_its_instance_only
    a_pinned_stream_carries_thousands_of_messages_each_way a_pinned_call_to_nobody_is_unavailable
    a_drain_lets_a_pinned_stream_finish a_drain_loses_no_pinned_call a_dropped_offer_ends_its_pinned_calls
    dropping_a_pinned_call_drops_the_handler
}

async fn listed(world: &World, expected: &[&InstanceName]) {
    let expected: BTreeSet<InstanceName> = expected.iter().copied().cloned().collect();
    wait_until("the list to be right", LIMIT, async || world.calling.instances(&world.target).await == expected).await;
}

async fn instances_are_listed_until_they_leave(over: Over) {
    let world = World::new(over).await;
    assert_eq!(world.calling.instances(&world.target).await, BTreeSet::new());
    let elsewhere = Target::new("conformance", "another");
    let _other = world.serving.serve(elsewhere.clone(), Service::named("other").routes()).await.unwrap();
    assert_eq!(world.calling.instances(&world.target).await, BTreeSet::new());
    let [a, b] = [world.serve(&Service::named("a")).await, world.serve(&Service::named("b")).await];
    let c = world.another().await.serve(world.target.clone(), Service::named("c").routes()).await.unwrap();
    listed(&world, &[a.instance(), b.instance(), c.instance()]).await;
    let gone = b.instance().clone();
    b.drain(LIMIT).await;
    assert!(!world.calling.instances(&world.target).await.contains(&gone));
    listed(&world, &[a.instance(), c.instance()]).await;
    drop(a);
    listed(&world, &[c.instance()]).await;
    drop(c);
    listed(&world, &[]).await;
    assert_eq!(world.calling.instances(&elsewhere).await.len(), 1);
}

async fn a_pinned_call_reaches_its_instance_only(over: Over) {
    let world = World::new(over).await;
    let mesh = world.another().await;
    let services = ["a", "b", "c"].map(Service::named);
    let [a, b, c] = &services;
    let servings = [world.serve(a).await, world.serve(b).await, mesh.serve(world.target.clone(), c.routes()).await.unwrap()];
    let callers = services.iter().zip(&servings).map(async |(service, serving)| {
        let mut client = world.client_to(serving.instance());
        for _ in 0..20 {
            assert_eq!(client.unary(ask(b"x")).await.unwrap().into_inner().instance, service.instance);
            let mut answers = client.chat(stream::iter((0..20).map(|number| blob(number, 1000)))).await.unwrap().into_inner();
            for number in 0..20 {
                let answer = answers.message().await.unwrap().unwrap();
                assert_eq!((answer.number, &answer.instance), (number, &service.instance));
            }
            assert_eq!(answers.message().await.unwrap(), None);
        }
    });
    join_all(callers).await;
    for service in &services {
        assert_eq!(Watch::count(&service.watch.started), 40, "calls of {}", service.instance);
    }
    // The name that a channel is pinned to is that of an instance of its target.
    let elsewhere = world.calling.channel_to(&Target::new("conformance", "another"), servings[0].instance());
    assert_eq!(ConformanceClient::new(elsewhere).unary(ask(b"x")).await.unwrap_err().code(), Code::Unavailable);
}

async fn a_pinned_stream_carries_thousands_of_messages_each_way(over: Over) {
    const COUNT: u64 = 3000;
    const SIZE: usize = 16 << 10;
    let world = World::new(over).await;
    let servings = [world.serve(&Service::named("a")).await, world.serve(&Service::named("b")).await];
    let chats = servings.iter().map(async |serving| {
        let (sender, receiver) = tokio::sync::mpsc::channel(8);
        let mut answers = world.client_to(serving.instance()).chat(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        // In lockstep at first, as a caller does that needs each answer, then as fast as it goes.
        for number in 0..COUNT / 2 {
            sender.send(blob(number, SIZE)).await.unwrap();
            assert!(is_blob(&answers.message().await.unwrap().unwrap(), number, SIZE), "message {number} is another");
        }
        let sending = async move {
            for number in COUNT / 2..COUNT {
                sender.send(blob(number, SIZE)).await.unwrap();
            }
        };
        let reading = async {
            for number in COUNT / 2..COUNT {
                assert!(is_blob(&answers.message().await.unwrap().unwrap(), number, SIZE), "message {number} is another");
            }
            assert_eq!(answers.message().await.unwrap(), None);
        };
        tokio::join!(sending, reading);
    });
    join_all(chats).await;
}

async fn a_pinned_call_to_nobody_is_unavailable(over: Over) {
    let world = World::new(over).await;
    let [never, odd] = ["never", "no.such *> \r\n é"].map(InstanceName::from);
    let nobody = async |instance: &InstanceName| {
        let mut client = world.client_to(instance);
        for _ in 0..3 {
            let status = client.unary(ask(b"x")).await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            assert!(status.message().contains(&instance.to_string()), "{status}");
        }
        assert_eq!(client.chat(stream::pending()).await.unwrap_err().code(), Code::Unavailable);
    };
    nobody(&never).await;
    let service = Service::named("a");
    let stays = world.serve(&service).await;
    nobody(&never).await;
    nobody(&odd).await;
    let goes = world.serve(&Service::named("b")).await;
    let gone = goes.instance().clone();
    world.client_to(&gone).unary(ask(b"x")).await.unwrap();
    goes.drain(LIMIT).await;
    nobody(&gone).await;
    assert_eq!(Watch::count(&service.watch.started), 0);
    world.client_to(stays.instance()).unary(ask(b"x")).await.unwrap();
}

async fn a_drain_lets_a_pinned_stream_finish(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("stays");
    let _stays = world.serve(&service).await;
    let leaves = world.serve(&Service::named("leaves")).await;
    let instance = leaves.instance().clone();
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut answers = world.client_to(&instance).chat(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    let draining = tokio::spawn(leaves.drain(LIMIT));
    let mut client = world.client_to(&instance);
    wait_until("new calls to be refused", LIMIT, async || client.unary(ask(b"x")).await.is_err()).await;
    assert_eq!(client.unary(ask(b"x")).await.unwrap_err().code(), Code::Unavailable);
    for number in 0..100 {
        sender.send(Blob { number, ..Blob::default() }).await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!((answer.number, answer.instance.as_str()), (number, "leaves"));
    }
    assert!(!draining.is_finished());
    assert!(!world.calling.instances(&world.target).await.contains(&instance));
    drop(sender);
    assert_eq!(answers.message().await.unwrap(), None);
    draining.await.unwrap();
    assert_eq!(Watch::count(&service.watch.started), 0);
}

/// Calls come without a pause while their instance leaves: each is done, or was never begun and says so.
async fn a_drain_loses_no_pinned_call(over: Over) {
    let world = World::new(over).await;
    for _ in 0..5 {
        let service = Service::named("leaves");
        let serving = world.serve(&service).await;
        let stop = Arc::new(AtomicBool::new(false));
        let callers: Vec<_> = (0..8)
            .map(|_| {
                let (mut client, stop) = (world.client_to(serving.instance()), stop.clone());
                tokio::spawn(async move {
                    let mut done = 0;
                    while !stop.load(Ordering::SeqCst) {
                        match client.unary(ask(b"x")).await {
                            Ok(_) => done += 1,
                            Err(status) => assert!(status.message().ends_with("is gone"), "{status}"),
                        }
                        tokio::task::yield_now().await;
                    }
                    done
                })
            })
            .collect();
        wait_until("calls to run", LIMIT, async || Watch::count(&service.watch.started) >= 100).await;
        serving.drain(LIMIT).await;
        let seen = Watch::count(&service.watch.started);
        stop.store(true, Ordering::SeqCst);
        let done: usize = join_all(callers).await.into_iter().map(Result::unwrap).sum();
        assert_eq!(Watch::count(&service.watch.started), seen, "it is called after it has left");
        assert_eq!(done, seen, "calls that were begun are lost");
    }
}

async fn a_dropped_offer_ends_its_pinned_calls(over: Over) {
    let world = World::new(over).await;
    let _stays = world.serve(&Service::named("stays")).await;
    let serving = world.serve(&Service::named("leaves")).await;
    let instance = serving.instance().clone();
    let mut client = world.client_to(&instance);
    let hang = Ask { count: 1, size: 10, end: End::Hang.into(), ..Ask::default() };
    let mut answers = client.download(hang).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    drop(serving);
    assert_eq!(answers.message().await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(client.unary(ask(b"x")).await.unwrap_err().code(), Code::Unavailable);
}

/// Also one that has said nothing yet, so that its caller does not know who runs it.
async fn dropping_a_pinned_call_drops_the_handler(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let serving = world.serve(&service).await;
    for count in 1..=20 {
        let mut client = world.client_to(serving.instance());
        let call = tokio::spawn(async move { client.unary(Ask { end: End::Hang.into(), ..Ask::default() }).await });
        wait_until("the handler to start", LIMIT, async || Watch::count(&service.watch.started) == count).await;
        call.abort();
        wait_until("the handler to be dropped", LIMIT, async || Watch::count(&service.watch.dropped) == count).await;
    }
}
