//! What one request is answered does not depend on what else is being answered: the reference outputs come out of a crowd, too, and so
//! does a picture drawn at random.

use bytes::Bytes;
use futures::future::join_all;
use proto::v1;
use tests::request::{chat, completion, for_image, for_text, greedy, text};
use tests::{Golden, Wire, World};

use crate::golden::{MODELS, assert_drawn, assert_said};

/// Requests at a time.
const CROWD: usize = 16;
/// Models that draw.
const DRAW: [&str; 2] = ["janus", "janusflow"];
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
        let alone = if DRAW.contains(&model) { drawn(&world, model).await } else { Vec::new() };
        for _ in 0..2 {
            crowd(&world, &golden, &alone).await;
        }
    }
    world.stop().await;
}

/// Every reference request of a model at once, and the pictures that it drew alone, among others of all lengths.
async fn crowd(world: &World, golden: &Golden, alone: &[Bytes]) {
    let model = golden.model.as_str();
    let said = golden.prompts.iter().map(async |prompt| assert_said(model, prompt, &world.ask(prompt.request.clone()).await.unwrap()));
    let copied =
        golden.drawings.iter().map(async |drawing| assert_drawn(model, drawing, &world.ask(drawing.request.clone()).await.unwrap()));
    let drawn = alone.chunks(2).map(async |alone| assert!(drawn(world, model).await == alone, "{model}: pictures in company"));
    let others =
        (golden.prompts.len() + golden.drawings.len() + alone.len()..CROWD).map(async |i| drop(world.ask(other(model, i)).await.unwrap()));
    tokio::join!(join_all(said), join_all(copied), join_all(drawn), join_all(others));
}

/// Two pictures with seeds of their own, as files.
async fn drawn(world: &World, model: &str) -> Vec<Bytes> {
    let sampling = v1::ImageSampling { seed: Some(5), n: Some(2), ..v1::ImageSampling::default() };
    let mut images = world.ask(for_image(model, chat(vec![text("a lantern by the river")]), sampling)).await.unwrap().images;
    images.sort_by_key(|image| image.image);
    images.into_iter().map(|image| image.data).collect()
}

/// A request that is like no other: in its length, in what it draws, and in whether it is drawn at random.
fn other(model: &str, i: usize) -> v1::GenerateRequest {
    let words = "The river and the lantern. ".repeat(i % 5 + 1);
    let sampling = v1::Sampling { temperature: Some((i % 3) as f32 * 0.7), seed: Some(i as u64), ..greedy(5 + 3 * i as u32) };
    for_text(model, completion(vec![text(&words[i % 7..])]), sampling)
}
