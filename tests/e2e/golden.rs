//! The ids of the reference come out of the public door, over every wire.

use proto::v1;
use tests::{Answer, Drawing, Golden, GoldenPrompt, Wire, World};

pub const MODELS: [&str; 8] = ["llama", "llama_gqa", "moe_v1", "v2_lite", "v2_full", "deepseek_vl", "deepseek_vl_hybrid", "janus"];

#[tokio::test(flavor = "multi_thread")]
async fn in_process() {
    golden_ids_come_out(Wire::InProcess).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_nats() {
    golden_ids_come_out(Wire::Nats).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_direct() {
    golden_ids_come_out(Wire::Direct).await;
}

async fn golden_ids_come_out(wire: Wire) {
    let world = World::start(wire, &MODELS).await;
    for model in MODELS {
        let golden = Golden::read(model);
        for prompt in &golden.prompts {
            assert_said(model, prompt, &world.ask(prompt.request.clone()).await.unwrap());
        }
        for drawing in &golden.drawings {
            assert_drawn(model, drawing, &world.ask(drawing.request.clone()).await.unwrap());
        }
    }
    world.stop().await;
}

/// The ids and the text of the reference, and the right account of them.
pub fn assert_said(model: &str, prompt: &GoldenPrompt, answer: &Answer) {
    assert_eq!(answer.ids(), prompt.ids, "{model}");
    assert_eq!(answer.text(), prompt.text, "{model}");
    assert_eq!(answer.started.as_ref().unwrap().prompt_tokens as usize, prompt.prompt_tokens);
    let usage = answer.usage.as_ref().unwrap();
    assert_eq!((usage.prompt_tokens as usize, usage.output_tokens as usize), (prompt.prompt_tokens, prompt.ids.len()));
    assert_eq!(answer.reasons[&0], v1::FinishReason::Length);
}

/// The codes and the picture of the reference.
pub fn assert_drawn(model: &str, drawing: &Drawing, answer: &Answer) {
    let [image] = &answer.images[..] else { panic!("one image, not {}", answer.images.len()) };
    assert_eq!(image.codes, drawing.codes, "{model}");
    let picture = pixels::decode(&image.data, &pixels::Limits::default()).unwrap();
    assert_eq!((picture.width, picture.height), (image.width, image.height));
    assert_eq!(picture, drawing.picture, "{model}");
    let total = drawing.codes.len() as u32;
    assert_eq!(answer.progress[&0], (total, total));
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_with_what_they_can_do() {
    let world = World::start(Wire::InProcess, &MODELS).await;
    let models = world.client().list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    let facts = |m: &v1::Model| (m.name.clone(), m.family.clone(), m.image_input, m.image_output, m.ready);
    let mut found: Vec<_> = models.iter().map(facts).collect();
    found.sort();
    let expected = [
        ("deepseek_vl", "deepseek_vl", true, false),
        ("deepseek_vl_hybrid", "deepseek_vl_hybrid", true, false),
        ("janus", "janus", true, true),
        ("llama", "llama", false, false),
        ("llama_gqa", "llama", false, false),
        ("moe_v1", "deepseek", false, false),
        ("v2_full", "deepseek_v2", false, false),
        ("v2_lite", "deepseek_v2", false, false),
    ];
    assert_eq!(found, expected.map(|(name, family, sees, draws)| (name.to_owned(), family.to_owned(), sees, draws, true)));
    world.stop().await;
}
