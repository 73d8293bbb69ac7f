//! Random calls of all kinds and lengths, many at once; some are dropped half-way, some end at a deadline. `CONFORMANCE_SEED`
//! repeats a run, `CONFORMANCE_SOAK` makes it longer.

use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use tonic::{Code, Request, Status};

use crate::generated::Ask;
use crate::script::{Census, Script, content, during, is_blob, mix, numbered};
use crate::world::{Client, Over, World};

conformance! { [InProcess Nats NatsShort Direct]
    random_calls_are_right_or_end_as_they_were_told
}

const CALLS: u64 = 400;
const AT_ONCE: usize = 24;
const SIZE: usize = 30_000;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0) % bound
    }

    /// Mostly small, seldom up to 4 MB.
    fn length(&mut self) -> usize {
        let bits = self.below(22);
        self.below(1 << bits) as usize + self.below(3) as usize
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().expect("a number"))
}

async fn random_calls_are_right_or_end_as_they_were_told(over: Over) {
    let world = World::new(over).await;
    let handlers = Census::new();
    let _serving = world.serve_routes(Script::random(&handlers, SIZE).routes()).await;
    let seed = setting("CONFORMANCE_SEED", 7);
    println!("CONFORMANCE_SEED={seed}");
    let calls = futures::stream::iter(0..setting("CONFORMANCE_SOAK", CALLS)).map(|number| {
        let (client, random) = (world.client(), Random(mix(seed) ^ mix(number)));
        let senders = Census::new();
        async move {
            let call = tokio::spawn(one(client, random, senders.clone()));
            call.await.unwrap_or_else(|error| panic!("call {number}: {error}"));
            senders.reaches("senders", 0).await;
        }
    });
    calls.buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
    handlers.reaches("handlers after all calls", 0).await;
}

async fn one(mut client: Client, mut random: Random, senders: Census) {
    let timeout = (random.below(8) == 0).then(|| Duration::from_micros(1 + random.below(20_000)));
    let patience = (random.below(5) == 0).then(|| random.below(40));
    let mut call: BoxFuture<'_, Result<(), Status>> =
        kind(&mut client, &mut random, &senders, timeout, patience.unwrap_or(u64::MAX)).boxed();
    let ended = match patience {
        // Dropped after that many turns, wherever it is then.
        Some(turns) => {
            let mut turn = 0;
            std::future::poll_fn(|cx| {
                turn += 1;
                if turn > turns { std::task::Poll::Ready(Ok(())) } else { call.as_mut().poll(cx) }
            })
            .await
        }
        None => call.await,
    };
    match ended {
        Ok(()) => {}
        Err(status) if timeout.is_some() && status.code() == Code::DeadlineExceeded => {}
        Err(status) => panic!("it ends with {status}"),
    }
}

/// One call, read up to message `last`.
async fn kind(client: &mut Client, random: &mut Random, senders: &Census, timeout: Option<Duration>, last: u64) -> Result<(), Status> {
    let count = random.below(120);
    match random.below(4) {
        0 => {
            let data = content(count, random.length());
            let answer = client.unary(timed(Ask { data: data.clone(), ..Ask::default() }, timeout)).await?.into_inner();
            assert!(answer.data == data, "{} bytes come back otherwise", data.len());
        }
        1 => {
            let blobs = during(senders.enter(), numbered(0..count, SIZE));
            assert_eq!(client.upload(timed(blobs, timeout)).await?.into_inner().count, count);
        }
        kind => {
            let mut answers = if kind == 2 {
                let ask = Ask { count: count as u32, size: SIZE as u32, ..Ask::default() };
                client.download(timed(ask, timeout)).await?.into_inner()
            } else {
                let blobs = during(senders.enter(), numbered(0..count, SIZE));
                client.chat(timed(blobs, timeout)).await?.into_inner()
            };
            for number in 0..count.min(last) {
                let got = answers.message().await?.unwrap_or_else(|| panic!("it ends at {number} of {count}"));
                assert!(is_blob(&got, number, SIZE), "message {number} is another");
            }
            if count <= last {
                assert_eq!(answers.message().await?, None);
            }
        }
    }
    Ok(())
}

fn timed<T>(message: T, timeout: Option<Duration>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(timeout) = timeout {
        request.set_timeout(timeout);
    }
    request
}
