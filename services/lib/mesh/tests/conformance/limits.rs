//! Large messages, slow readers, bounded memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use testkit::wait_until;
use tokio::sync::Semaphore;
use tonic::{Code, Request};

use crate::basics::blobs;
use crate::generated::{Ask, Blob};
use crate::service::{Service, Watch};
use crate::world::{LIMIT, Over, World};

conformance! { [InProcess Nats NatsShort Direct]
    a_message_of_50_mb_goes_up_and_comes_back a_message_too_long_is_one_clear_status
    a_slow_reader_of_10_000_messages_holds_the_producer a_slow_handler_holds_the_caller
    metadata_too_long_is_one_clear_status
}

const LARGE: usize = 50_000_000;
const SIZE: usize = 4096;

/// How many messages of [`SIZE`] may lie between producer and consumer: the windows of the wire and what is being assembled.
fn most_under_way(over: Over) -> usize {
    let bytes = match over {
        Over::InProcess => 128 << 10,
        Over::Nats | Over::NatsShort => 4 << 20,
        // HTTP/2's window, what is buffered for sending, and the sockets.
        Over::Direct => 8 << 20,
    };
    bytes / SIZE
}

async fn a_message_of_50_mb_goes_up_and_comes_back(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let data: Bytes = (0..LARGE).map(|place| (place % 251) as u8).collect::<Vec<_>>().into();
    let answer = world.client().unary(Ask { data: data.clone(), ..Ask::default() }).await.unwrap().into_inner();
    assert!(answer.data == data, "{} bytes came back", answer.data.len());
}

async fn a_message_too_long_is_one_clear_status(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let mut client = world.client();
    let ask = Ask { data: vec![0; mesh::MAX_MESSAGE_BYTES].into(), ..Ask::default() };
    let status = client.unary(ask).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    client.unary(Ask::default()).await.unwrap();
}

async fn a_slow_reader_of_10_000_messages_holds_the_producer(over: Over) {
    let world = World::new(over).await;
    let service = Service::named("a");
    let _serving = world.serve(&service).await;
    let ask = Ask { count: 10_000, size: SIZE as u32, ..Ask::default() };
    let mut answers = world.client().download(ask).await.unwrap().into_inner();
    let ahead = most_under_way(over);
    for number in 0..10_000 {
        assert_eq!(answers.message().await.unwrap().unwrap().number, number);
        let produced = Watch::count(&service.watch.produced);
        assert!(produced <= number as usize + 1 + ahead, "{produced} messages are made, {number} are read");
        if number % 1000 == 0 {
            // The producer runs until it is held: that is when the count means something.
            settled(&service.watch.produced).await;
        }
    }
    assert_eq!(answers.message().await.unwrap(), None);
}

async fn a_slow_handler_holds_the_caller(over: Over) {
    let world = World::new(over).await;
    let gate = Arc::new(Semaphore::new(0));
    let service = Service { gate: Some(gate.clone()), ..Service::named("a") };
    let _serving = world.serve(&service).await;
    let sent = Arc::new(AtomicUsize::new(0));
    let blobs = stream::iter(0..10_000).map({
        let sent = sent.clone();
        move |number| {
            sent.fetch_add(1, Ordering::SeqCst);
            Blob { number, data: vec![0; SIZE].into(), ..Blob::default() }
        }
    });
    let mut client = world.client();
    let upload = tokio::spawn(async move { client.upload(blobs).await });
    for taken in 1..=4 {
        gate.add_permits(100);
        wait_until("the caller to send", LIMIT, async || sent.load(Ordering::SeqCst) >= taken * 100).await;
        settled(&sent).await;
        let count = sent.load(Ordering::SeqCst);
        assert!(count <= taken * 100 + most_under_way(over), "{count} messages are sent, {taken} hundred may be read");
    }
    gate.add_permits(10_000);
    assert_eq!(upload.await.unwrap().unwrap().into_inner().count, 10_000);
}

/// Waits until `counter` has stood still for a while.
async fn settled(counter: &AtomicUsize) {
    let (mut last, mut still) = (0, 0);
    wait_until("the sender to be held", LIMIT, async || {
        let now = counter.load(Ordering::SeqCst);
        still = if now == last { still + 1 } else { 0 };
        last = now;
        still >= 10
    })
    .await;
}

/// More metadata than any wire carries fails the call, and only that call.
async fn metadata_too_long_is_one_clear_status(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve(&Service::named("a")).await;
    let mut client = world.client();
    let mut request = Request::new(Ask::default());
    for _ in 0..32 {
        request.metadata_mut().append("x-echo", "m".repeat(64 << 10).parse().unwrap());
    }
    let outcome = client.unary(request).await;
    // A function call has no limit to enforce.
    if over == Over::InProcess {
        outcome.unwrap();
    } else {
        let status = outcome.unwrap_err();
        assert!(matches!(status.code(), Code::ResourceExhausted | Code::Internal | Code::Unknown), "{status}");
    }
    client.unary(Ask::default()).await.unwrap();
    assert_eq!(client.upload(stream::iter(blobs(3, 1))).await.unwrap().into_inner().count, 3);
}
