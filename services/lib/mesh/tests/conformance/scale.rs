//! Several instances, many calls.

use futures::future::join_all;
use futures::{StreamExt as _, stream};
use testkit::wait_until;

use crate::basics::{ask, blobs};
use crate::generated::Ask;
use crate::service::{Service, Watch};
use crate::world::{LIMIT, Over, World};

conformance! { [InProcess Nats NatsShort Direct]
    calls_are_spread_over_the_instances two_hundred_mixed_calls_at_once
}

async fn calls_are_spread_over_the_instances(over: Over) {
    let world = World::new(over).await;
    let services = ["a", "b", "c"].map(Service::named);
    let mut servings = Vec::new();
    for service in &services {
        let mesh = world.another().await;
        let serving = mesh.serve(world.target.clone(), service.routes()).await.unwrap();
        servings.push((mesh, serving));
    }
    let mut client = world.client();
    let count = || services.each_ref().map(|service| Watch::count(&service.watch.started));
    wait_until("all instances to be found", LIMIT, async || {
        client.unary(ask(b"x")).await.unwrap();
        count().iter().all(|count| *count > 0)
    })
    .await;
    let before = count();
    for _ in 0..300 {
        client.unary(ask(b"x")).await.unwrap();
    }
    let after = count();
    let counts = [0, 1, 2].map(|number| after[number] - before[number]);
    assert_eq!(counts.iter().sum::<usize>(), 300);
    // With a fair coin 100 each, and fewer than 50 once in a hundred million runs.
    assert!(counts.iter().all(|count| *count >= 50), "{counts:?}");
}

async fn two_hundred_mixed_calls_at_once(over: Over) {
    let world = World::new(over).await;
    let services = ["a", "b"].map(Service::named);
    let mut servings = Vec::new();
    for service in &services {
        servings.push(world.serve(service).await);
    }
    let calls = (0..200).map(|number| {
        let mut client = world.client();
        tokio::spawn(async move {
            let size = (number * 997) % 70_000;
            match number % 4 {
                0 => {
                    let data = vec![number as u8; size];
                    let answer = client.unary(Ask { data: data.clone().into(), ..Ask::default() }).await.unwrap().into_inner();
                    assert!(answer.data == data);
                }
                1 => assert_eq!(client.upload(stream::iter(blobs(50, size / 50))).await.unwrap().into_inner().count, 50),
                2 => {
                    let ask = Ask { count: 50, size: (size / 50) as u32, ..Ask::default() };
                    let answers = client.download(ask).await.unwrap().into_inner();
                    let numbers: Vec<u64> = answers.map(|blob| blob.unwrap().number).collect().await;
                    assert_eq!(numbers, (0..50).collect::<Vec<_>>());
                }
                _ => {
                    let answers = client.chat(stream::iter(blobs(50, size / 50))).await.unwrap().into_inner();
                    assert_eq!(answers.count().await, 50);
                }
            }
        })
    });
    for call in join_all(calls).await {
        call.unwrap();
    }
    for service in &services {
        testkit::wait_until("all handlers to be done", crate::world::LIMIT, async || {
            Watch::count(&service.watch.started) == Watch::count(&service.watch.dropped)
        })
        .await;
    }
}
