//! What a client may ask for beside the prompt.

use proto::v1;
use tests::request::{chat, completion, for_image, for_text, greedy, text};
use tests::{Golden, Wire, World};

fn story(sampling: v1::Sampling) -> v1::GenerateRequest {
    for_text("llama", completion(vec![text("Once upon a time")]), sampling)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_gives_the_same_answer() {
    let world = World::start(Wire::InProcess, &["llama"]).await;
    let drawn = |seed| v1::Sampling {
        temperature: Some(1.0),
        top_p: Some(0.95),
        top_k: Some(50),
        seed,
        ignore_eos: true,
        max_tokens: Some(40),
        ..Default::default()
    };
    let first = world.ask(story(drawn(Some(11)))).await.unwrap();
    let again = world.ask(story(drawn(Some(11)))).await.unwrap();
    let other = world.ask(story(drawn(Some(12)))).await.unwrap();
    assert_eq!(first.ids(), again.ids());
    assert_ne!(first.ids(), other.ids());
    // A seed that the server drew is reported, and reproduces the answer.
    let free = world.ask(story(drawn(None))).await.unwrap();
    let seed = free.started.as_ref().unwrap().seed;
    assert_eq!(world.ask(story(drawn(Some(seed)))).await.unwrap().ids(), free.ids());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_are_independent_and_seeded_one_after_another() {
    let world = World::start(Wire::InProcess, &["llama"]).await;
    let drawn = |seed, n| v1::Sampling {
        temperature: Some(1.0),
        seed: Some(seed),
        n: Some(n),
        ignore_eos: true,
        max_tokens: Some(24),
        ..Default::default()
    };
    let three = world.ask(story(drawn(100, 3))).await.unwrap();
    for choice in 0..3 {
        let alone = world.ask(story(drawn(100 + u64::from(choice), 1))).await.unwrap();
        assert_eq!(three.ids[&choice], alone.ids(), "choice {choice}");
        assert_eq!(three.texts[&choice], alone.text(), "choice {choice}");
    }
    assert_eq!(three.usage.unwrap().output_tokens, 72);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_text_before_it() {
    let world = World::start(Wire::InProcess, &["llama"]).await;
    let whole = world.ask(story(greedy(60))).await.unwrap();
    // Any piece of the answer will do; the first place where it stands is where the text must end.
    let middle: String = whole.text().chars().skip(12).take(3).collect();
    let place = whole.text().find(&middle).unwrap();
    let stopped = world.ask(story(v1::Sampling { stop: vec![middle], ..greedy(60) })).await.unwrap();
    assert_eq!(stopped.text(), &whole.text()[..place]);
    assert_eq!(stopped.reasons[&0], v1::FinishReason::Stop);
    assert!(stopped.usage.unwrap().output_tokens < 60, "what nobody will read is not generated to the end");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_come_with_their_tokens() {
    let world = World::start(Wire::InProcess, &["llama"]).await;
    let answer = world.ask(story(v1::Sampling { top_logprobs: Some(5), ..greedy(10) })).await.unwrap();
    assert_eq!(answer.logprobs.len(), 10);
    let mut bytes = Vec::new();
    for (id, entry) in answer.ids().iter().zip(&answer.logprobs) {
        let chosen = entry.chosen.as_ref().unwrap();
        assert_eq!(chosen.token_id, *id);
        assert_eq!(entry.top.len(), 5);
        assert_eq!(entry.top[0].token_id, *id, "greedy takes the likeliest");
        assert!(entry.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob), "best first: {entry:?}");
        assert!(chosen.logprob <= 0.0);
        bytes.extend_from_slice(&chosen.bytes);
    }
    assert_eq!(String::from_utf8_lossy(&bytes), answer.text(), "the tokens' bytes are the text");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_are_drawn_with_seeds() {
    let world = World::start(Wire::InProcess, &["janus"]).await;
    let sampling = |seed, n| v1::ImageSampling { seed: Some(seed), n: Some(n), ..Default::default() };
    let lantern = || chat(vec![text("a red lantern by the quiet river")]);
    let two = world.ask(for_image("janus", lantern(), sampling(5, 2))).await.unwrap();
    assert_eq!(two.images.len(), 2);
    for image in &two.images {
        let alone = world.ask(for_image("janus", lantern(), sampling(5 + u64::from(image.image), 1))).await.unwrap();
        assert_eq!(alone.images[0].codes, image.codes, "image {}", image.image);
        assert_eq!(alone.images[0].data, image.data, "image {}", image.image);
        assert_eq!(image.seed, 5 + u64::from(image.image));
    }
    assert_ne!(two.images[0].codes, two.images[1].codes);
    world.stop().await;
}

/// A preview never holds up the codes, so where these come fast most previews are left out, but not all of them for ever.
#[tokio::test(flavor = "multi_thread")]
async fn previews_are_unfinished_pictures() {
    let world = World::start(Wire::InProcess, &["janus"]).await;
    let sampling = |seed| v1::ImageSampling { seed: Some(seed), n: Some(4), preview_every: Some(1), ..Default::default() };
    let mut previews = Vec::new();
    for seed in 0..50 {
        let answer = world.ask(for_image("janus", chat(vec![text("a lantern")]), sampling(seed))).await.unwrap();
        previews = answer.previews;
        if !previews.is_empty() {
            break;
        }
    }
    assert!(!previews.is_empty(), "200 pictures without a preview");
    for preview in previews {
        let unfinished = pixels::decode(&preview.data, &pixels::Limits::default()).unwrap();
        assert_eq!((unfinished.width, unfinished.height), (12, 12));
        assert!((1..36).contains(&preview.done), "{}", preview.done);
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn webp_holds_the_same_pixels() {
    let world = World::start(Wire::InProcess, &["janus"]).await;
    let drawing = Golden::read("janus").drawings.remove(0);
    let mut request = drawing.request;
    request.image.as_mut().unwrap().format = v1::ImageFormat::Webp.into();
    let answer = world.ask(request).await.unwrap();
    let image = &answer.images[0];
    assert_eq!(image.media_type, "image/webp");
    assert_eq!(pixels::decode(&image.data, &pixels::Limits::default()).unwrap(), drawing.picture);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_those_that_generate_sees() {
    let world = World::start(Wire::InProcess, &["llama"]).await;
    let mut client = world.client();
    let text = "The quick river compiles a small theorem.";
    let golden: Vec<u32> = {
        let file = std::fs::read(testkit::fixture("llama").join("golden.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&file).unwrap();
        assert_eq!(json["prompts"][0]["prompt"], text);
        serde_json::from_value(json["prompts"][0]["input_ids"].clone()).unwrap()
    };
    let mut ask = async |omit_bos| {
        let input = Some(v1::tokenize_request::Input::Text(text.to_owned()));
        client.tokenize(v1::TokenizeRequest { model: "llama".into(), input, omit_bos }).await.unwrap().into_inner().token_ids
    };
    assert_eq!(ask(false).await, golden);
    assert_eq!(ask(true).await, golden[1..]);
    world.stop().await;
}
