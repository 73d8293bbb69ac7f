//! Data is flowing in all directions when something breaks: each stream ends complete or UNAVAILABLE, never short, never wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures::future::join_all;
use testkit::wait_until;
use tonic::{Code, Status};

use crate::generated::Ask;
use crate::script::{Census, Script, content, is_blob, numbered};
use crate::world::{Client, LIMIT, Over, World};

conformance! { [Nats NatsShort Direct]
    a_restart_of_nats_server_never_shortens_a_stream
}

conformance! { [InProcess Nats NatsShort Direct]
    a_drain_under_load_loses_nothing a_dropped_offer_never_shortens_a_stream
}

const SIZE: usize = 20_000;
const COUNT: u64 = 300;

/// Calls of all kinds without a pause, each checked to the byte.
struct Load {
    stop: Arc<AtomicBool>,
    tally: Arc<Tally>,
    callers: Vec<tokio::task::JoinHandle<()>>,
}

#[derive(Default)]
struct Tally {
    complete: AtomicUsize,
    unavailable: AtomicUsize,
    /// Messages read from streams so far: grows while data flows.
    read: AtomicUsize,
}

impl Load {
    fn start(world: &World) -> Self {
        let (stop, tally) = (Arc::new(AtomicBool::new(false)), Arc::new(Tally::default()));
        let callers = (0..8).map(|kind| {
            let (mut client, stop, tally) = (world.client(), stop.clone(), tally.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    match exchange(kind, &mut client, &tally).await {
                        Ok(()) => tally.complete.fetch_add(1, Ordering::SeqCst),
                        Err(status) if status.code() == Code::Unavailable => tally.unavailable.fetch_add(1, Ordering::SeqCst),
                        Err(status) => panic!("kind {kind} ends with {status}"),
                    };
                    tokio::task::yield_now().await;
                }
            })
        });
        let callers = callers.collect();
        Self { stop, tally, callers }
    }

    /// Waits until `calls` more calls have completed and data has flowed after that: streams are in their midst.
    async fn flows(&self, calls: usize) {
        let enough = self.tally.complete.load(Ordering::SeqCst) + calls;
        wait_until("calls to complete", LIMIT, async || self.tally.complete.load(Ordering::SeqCst) >= enough).await;
        let read = self.tally.read.load(Ordering::SeqCst);
        wait_until("data to flow", LIMIT, async || self.tally.read.load(Ordering::SeqCst) > read).await;
    }

    async fn stop(self) -> Arc<Tally> {
        self.stop.store(true, Ordering::SeqCst);
        for caller in join_all(self.callers).await {
            caller.unwrap();
        }
        self.tally
    }
}

/// One call of [`Script::random`]. Wrong or missing content panics; a status is for the caller to judge.
async fn exchange(kind: usize, client: &mut Client, tally: &Tally) -> Result<(), Status> {
    match kind % 4 {
        0 => {
            let data = content(kind as u64, SIZE);
            let answer = client.unary(Ask { data: data.clone(), ..Ask::default() }).await?.into_inner();
            assert!(answer.data == data, "an echo is another");
            tally.read.fetch_add(1, Ordering::SeqCst);
        }
        1 => {
            let sum = client.upload(numbered(0..COUNT, SIZE)).await?.into_inner();
            assert_eq!(sum.count, COUNT, "an upload ends short");
        }
        _ => {
            let mut answers = if kind % 4 == 2 {
                client.download(Ask { count: COUNT as u32, size: SIZE as u32, ..Ask::default() }).await?.into_inner()
            } else {
                client.chat(numbered(0..COUNT, SIZE)).await?.into_inner()
            };
            for number in 0..COUNT {
                let got = answers.message().await?.unwrap_or_else(|| panic!("kind {kind} ends short at {number}"));
                assert!(is_blob(&got, number, SIZE), "message {number} of kind {kind} is another");
                tally.read.fetch_add(1, Ordering::SeqCst);
            }
            assert_eq!(answers.message().await?, None);
        }
    }
    Ok(())
}

async fn a_restart_of_nats_server_never_shortens_a_stream(over: Over) {
    let mut world = World::new(over).await;
    let handlers = Census::new();
    let _serving = world.serve_routes(Script::random(&handlers, SIZE).routes()).await;
    let load = Load::start(&world);
    for _ in 0..3 {
        load.flows(20).await;
        let broker = world.broker.as_mut().unwrap();
        broker.kill();
        broker.restart().await;
    }
    load.flows(20).await;
    let tally = load.stop().await;
    if over != Over::Direct {
        assert!(tally.unavailable.load(Ordering::SeqCst) > 0, "streams go through the broker, its end must show");
    }
    handlers.reaches("handlers after the load", 0).await;
    let mut client = world.client();
    for kind in 0..4 {
        exchange(kind, &mut client, &tally).await.expect("everything works as before");
    }
}

async fn a_drain_under_load_loses_nothing(over: Over) {
    let world = World::new(over).await;
    let (staying, leaving) = (Census::new(), Census::new());
    let _serving = world.serve_routes(Script::random(&staying, SIZE).routes()).await;
    let load = Load::start(&world);
    load.flows(10).await;
    for _ in 0..3 {
        let mesh = world.another().await;
        let serving = mesh.serve(world.target.clone(), Script::random(&leaving, SIZE).routes()).await.unwrap();
        load.flows(30).await;
        serving.drain(LIMIT).await;
        leaving.reaches("handlers after the drain", 0).await;
        load.flows(10).await;
    }
    let tally = load.stop().await;
    assert_eq!(tally.unavailable.load(Ordering::SeqCst), 0, "calls are lost");
    staying.reaches("handlers after the load", 0).await;
}

async fn a_dropped_offer_never_shortens_a_stream(over: Over) {
    let world = World::new(over).await;
    let handlers = Census::new();
    let load = Load::start(&world);
    for _ in 0..3 {
        let serving = world.serve_routes(Script::random(&handlers, SIZE).routes()).await;
        load.flows(10).await;
        drop(serving);
        handlers.reaches("handlers of an offer taken back", 0).await;
        assert_eq!(world.client().unary(Ask::default()).await.unwrap_err().code(), Code::Unavailable);
    }
    let tally = load.stop().await;
    assert!(tally.unavailable.load(Ordering::SeqCst) > 0);
}
