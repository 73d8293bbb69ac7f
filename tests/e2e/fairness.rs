//! Many streams share one model: none of them starves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proto::v1::generate_response::Event;
use testkit::wait_until;
use tests::{Wire, World, request};

const STREAMS: usize = 64;
/// When the fastest stream has had this many tokens since all had begun, the race is over.
const GOAL: u32 = 240;
/// Long enough that nobody ends before, short enough that all fit into the KV cache.
const LENGTH: u32 = 900;
const LIMIT: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread")]
async fn no_stream_starves() {
    let world = World::start(Wire::InProcess, &["llama"]).await;
    let counts: Arc<Vec<AtomicU32>> = Arc::new((0..STREAMS).map(|_| AtomicU32::new(0)).collect());
    let now = || counts.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<u32>>();
    let runners: Vec<_> = (0..STREAMS)
        .map(|i| {
            let (mut client, counts) = (world.client(), counts.clone());
            tokio::spawn(async move {
                let input = request::completion(vec![request::text(&format!("Stream number {i} tells a story."))]);
                let mut stream = client.generate(request::for_text("llama", input, request::greedy(LENGTH))).await.unwrap().into_inner();
                while let Some(message) = stream.message().await.unwrap() {
                    if let Some(Event::Text(delta)) = message.event {
                        counts[i].fetch_add(delta.token_ids.len() as u32, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    wait_until("the first token of every stream", LIMIT, async || now().iter().all(|&count| count > 0)).await;
    let before = now();
    let since = || now().iter().zip(&before).map(|(now, before)| now - before).collect::<Vec<u32>>();
    wait_until("the fastest stream", LIMIT, async || since().iter().any(|&count| count >= GOAL)).await;
    let counts = since();
    let (least, most) = (*counts.iter().min().unwrap(), *counts.iter().max().unwrap());
    assert!(f64::from(most) <= 1.5 * f64::from(least), "between {least} and {most} tokens: {counts:?}");
    // A stream that nobody reads any more is dropped, which cancels its work.
    runners.iter().for_each(|runner| runner.abort());
    world.stop().await;
}
