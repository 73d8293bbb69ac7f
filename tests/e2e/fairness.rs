//! Many streams share one model: none of them starves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proto::v1::generate_response::Event;
use tests::{Wire, World, request};
use tokio::sync::Barrier;

const STREAMS: usize = 64;
/// When the first stream has this many tokens, the race is over.
const GOAL: u32 = 240;

#[tokio::test(flavor = "multi_thread")]
async fn no_stream_starves() {
    let world = World::start(Wire::InProcess, &["llama"]).await;
    let counts: Arc<Vec<AtomicU32>> = Arc::new((0..STREAMS).map(|_| AtomicU32::new(0)).collect());
    let all_started = Arc::new(Barrier::new(STREAMS));
    let runners = (0..STREAMS).map(|i| {
        let (mut client, counts, all_started) = (world.client(), counts.clone(), all_started.clone());
        tokio::spawn(async move {
            let input = request::completion(vec![request::text(&format!("Stream number {i} tells a story."))]);
            let mut stream = client.generate(request::for_text("llama", input, request::greedy(4 * GOAL))).await.unwrap().into_inner();
            let mut waited = false;
            while let Some(message) = stream.message().await.unwrap() {
                let Some(Event::Text(delta)) = message.event else { continue };
                if !waited {
                    // Nobody counts before everybody has a first token.
                    all_started.wait().await;
                    waited = true;
                }
                let mine = counts[i].fetch_add(delta.token_ids.len() as u32, Ordering::Relaxed) + delta.token_ids.len() as u32;
                if mine >= GOAL {
                    return counts.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
                }
            }
            panic!("stream {i} ended early");
        })
    });
    let (first, _, rest) = futures::future::select_all(runners).await;
    let counts = first.unwrap();
    let (least, most) = (*counts.iter().min().unwrap(), *counts.iter().max().unwrap());
    assert!(f64::from(most) <= 1.5 * f64::from(least), "between {least} and {most} tokens: {counts:?}");
    // A stream that nobody reads any more is dropped, which cancels its work.
    rest.iter().for_each(|runner| runner.abort());
    world.stop().await;
}
