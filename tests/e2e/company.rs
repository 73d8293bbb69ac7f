//! What one request is answered does not depend on what else is being answered: the reference outputs come out of a crowd, too.

use futures::future::join_all;
use proto::v1;
use tests::request::{completion, for_text, greedy, text};
use tests::{Golden, Wire, World};

use crate::golden::{MODELS, assert_drawn, assert_said};

/// Requests at a time.
const CROWD: usize = 16;
/// Settings under which a prompt is read in crumbs, so that every step holds pieces of many requests.
const CRUMBS: (&str, &str) = ("language.max_batch_tokens", "7");

#[tokio::test(flavor = "multi_thread")]
async fn in_process() {
    golden_ids_come_out_of_a_crowd(Wire::InProcess, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_crumbs() {
    golden_ids_come_out_of_a_crowd(Wire::InProcess, &[CRUMBS]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_nats() {
    golden_ids_come_out_of_a_crowd(Wire::Nats, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_direct() {
    golden_ids_come_out_of_a_crowd(Wire::Direct, &[]).await;
}

/// Twice: the second time the prefix cache knows every prompt.
async fn golden_ids_come_out_of_a_crowd(wire: Wire, settings: &[(&str, &str)]) {
    let world = World::start_with(wire, &MODELS, settings).await;
    for model in MODELS {
        let golden = Golden::read(model);
        for _ in 0..2 {
            crowd(&world, &golden).await;
        }
    }
    world.stop().await;
}

/// Every reference request of a model at once, among others of all lengths.
async fn crowd(world: &World, golden: &Golden) {
    let said =
        golden.prompts.iter().map(async |prompt| assert_said(&golden.model, prompt, &world.ask(prompt.request.clone()).await.unwrap()));
    let drawn = golden
        .drawings
        .iter()
        .map(async |drawing| assert_drawn(&golden.model, drawing, &world.ask(drawing.request.clone()).await.unwrap()));
    let others =
        (golden.prompts.len() + golden.drawings.len()..CROWD).map(async |i| drop(world.ask(other(&golden.model, i)).await.unwrap()));
    tokio::join!(join_all(said), join_all(drawn), join_all(others));
}

/// A request that is like no other: in its length, in what it draws, and in whether it is drawn at random.
fn other(model: &str, i: usize) -> v1::GenerateRequest {
    let words = "The river and the lantern. ".repeat(i % 5 + 1);
    let sampling = v1::Sampling { temperature: Some((i % 3) as f32 * 0.7), seed: Some(i as u64), ..greedy(5 + 3 * i as u32) };
    for_text(model, completion(vec![text(&words[i % 7..])]), sampling)
}
