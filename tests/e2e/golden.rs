//! The ids of the reference come out of the public door, over every wire.

use proto::v1;
use tests::{Golden, Wire, World};

const MODELS: [&str; 4] = ["llama", "llama_gqa", "janus", "janusflow"];

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
        for prompt in golden.prompts {
            let answer = world.ask(prompt.request).await.unwrap();
            assert_eq!(answer.ids(), prompt.ids, "{model} over {}", wire.name());
            assert!(prompt.text.is_none_or(|text| text == answer.text()), "{model} over {}: {}", wire.name(), answer.text());
            assert_eq!(answer.started.unwrap().prompt_tokens as usize, prompt.prompt_tokens);
            let usage = answer.usage.unwrap();
            assert_eq!((usage.prompt_tokens as usize, usage.output_tokens as usize), (prompt.prompt_tokens, prompt.ids.len()));
            assert_eq!(answer.reasons[&0], v1::FinishReason::Length);
        }
        for drawing in golden.drawings {
            let answer = world.ask(drawing.request).await.unwrap();
            let [image] = &answer.images[..] else { panic!("one image, not {}", answer.images.len()) };
            assert_eq!(image.codes, drawing.codes, "{model} over {}", wire.name());
            let picture = pixels::decode(&image.data, &pixels::Limits::default()).unwrap();
            assert_eq!((picture.width, picture.height), (image.width, image.height));
            assert_eq!(picture, drawing.picture, "{model} over {}", wire.name());
            let total = drawing.codes.len() as u32;
            assert_eq!(answer.progress[&0], (total, total));
        }
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_with_what_they_can_do() {
    let world = World::start(Wire::InProcess, &MODELS).await;
    let models = world.client().list_models(v1::ListModelsRequest {}).await.unwrap().into_inner().models;
    let facts = |m: &v1::Model| (m.name.clone(), m.family.clone(), m.image_input, m.image_output, m.ready);
    let mut found: Vec<_> = models.iter().map(facts).collect();
    found.sort();
    let expected = [
        ("janus", "janus", true, true),
        ("janusflow", "multi_modality", true, true),
        ("llama", "llama", false, false),
        ("llama_gqa", "llama", false, false),
    ];
    assert_eq!(found, expected.map(|(name, family, sees, draws)| (name.to_owned(), family.to_owned(), sees, draws, true)));
    world.stop().await;
}
