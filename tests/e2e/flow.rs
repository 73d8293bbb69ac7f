//! Pictures by a flow, from the public door to the file, over every wire.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::v1;
use proto::v1::generate_response::Event;
use tests::request::{chat, completion, for_image, text};
use tests::{Answer, Client, Wire, World};

const MODEL: &str = "janusflow";
/// Generous: the machines that run tests are busy.
const LIMIT: Duration = Duration::from_secs(60);

fn harbor(image: v1::ImageSampling) -> v1::GenerateRequest {
    for_image(MODEL, chat(vec![text("a blue harbor with bright clouds")]), image)
}

fn steps(steps: u32, seed: u64) -> v1::ImageSampling {
    v1::ImageSampling { steps: Some(steps), seed: Some(seed), ..v1::ImageSampling::default() }
}

fn picture(data: &[u8]) -> pixels::Rgb {
    pixels::decode(data, &pixels::Limits::default()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn in_process() {
    a_picture_is_drawn_in_steps(Wire::InProcess).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_nats() {
    a_picture_is_drawn_in_steps(Wire::Nats).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_direct() {
    a_picture_is_drawn_in_steps(Wire::Direct).await;
}

async fn a_picture_is_drawn_in_steps(wire: Wire) {
    let world = World::start(wire, &[MODEL]).await;
    let request = harbor(v1::ImageSampling { preview_every: Some(2), n: Some(2), ..steps(8, 5) });
    // Whichever of the two is finished first comes first.
    let ask = async || {
        let mut answer = world.ask(request.clone()).await.unwrap();
        answer.images.sort_by_key(|image| image.image);
        answer
    };
    let answer = ask().await;
    assert_eq!(answer.images.len(), 2);
    for image in &answer.images {
        assert_eq!((image.width, image.height, image.seed), (24, 24, 5 + u64::from(image.image)));
        assert!(image.codes.is_empty(), "a flow has no codes");
        assert_eq!(answer.progress[&image.image], (8, 8));
        // Alone, and without previews, it is the same picture.
        let alone = world.ask(harbor(steps(8, image.seed))).await.unwrap();
        assert_eq!(alone.images[0].data, image.data, "image {} over {}", image.image, wire.name());
    }
    assert_ne!(picture(&answer.images[0].data), picture(&answer.images[1].data));
    assert_eq!(answer.usage.unwrap().output_tokens, 16, "the steps of both");
    assert!(ask().await.images == answer.images, "the same seed gives the same pictures");
    // A preview never holds up the steps: where these come fast most are left out, but not all of them for ever.
    let mut previews = answer.previews;
    for _ in 0..50 {
        if previews.is_empty() {
            previews = ask().await.previews;
        }
    }
    assert!(!previews.is_empty(), "100 pictures without a preview");
    for preview in &previews {
        assert!([2, 4, 6].contains(&preview.done), "{}", preview.done);
        assert_eq!((picture(&preview.data).width, preview.media_type.as_str()), (24, "image/png"));
    }
    world.stop().await;
}

/// The estimate gets closer to the picture with every step.
#[tokio::test(flavor = "multi_thread")]
async fn previews_lead_to_the_picture() {
    let world = World::start(Wire::InProcess, &[MODEL]).await;
    let mut previews = BTreeMap::new();
    let mut last = None;
    // A preview is left out while the one before is being painted: some runs have those that others lack.
    for _ in 0..50 {
        let answer = world.ask(harbor(v1::ImageSampling { preview_every: Some(1), ..steps(12, 3) })).await.unwrap();
        previews.extend(answer.previews.into_iter().map(|preview| (preview.done, preview.data)));
        last = Some(answer.images[0].data.clone());
        if previews.len() == 11 {
            break;
        }
    }
    let last = picture(&last.unwrap());
    let distance = |data: &[u8]| {
        let levels = picture(data).data.into_iter().zip(&last.data).map(|(a, b)| f64::from(a.abs_diff(*b)));
        levels.sum::<f64>() / last.data.len() as f64
    };
    let distances: Vec<(u32, f64)> = previews.iter().map(|(done, data)| (*done, distance(data))).collect();
    let (first, nearest) = (distances[0], distances[distances.len() - 1]);
    assert!(distances.len() >= 2 && nearest.1 < first.1 / 2.0, "{distances:?}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_asks_for_decides_the_picture() {
    let world = World::start(Wire::InProcess, &[MODEL]).await;
    let draw = async |image| world.ask(harbor(image)).await.unwrap().images.remove(0).data;
    let plain = draw(steps(4, 1)).await;
    let solver = |solver: v1::FlowSolver| v1::ImageSampling { solver: solver.into(), ..steps(4, 1) };
    assert_eq!(draw(solver(v1::FlowSolver::Euler)).await, plain, "Euler is what nobody asks for");
    let mut others = vec![plain.clone()];
    for other in [
        solver(v1::FlowSolver::Heun),
        solver(v1::FlowSolver::Midpoint),
        steps(5, 1),
        steps(4, 2),
        v1::ImageSampling { guidance: Some(7.0), ..steps(4, 1) },
    ] {
        let data = draw(other).await;
        assert!(!others.iter().any(|known| picture(known) == picture(&data)));
        others.push(data);
    }
    // The defaults: 30 steps, guidance 2.
    let defaults = world.ask(harbor(v1::ImageSampling { seed: Some(1), ..Default::default() })).await.unwrap();
    assert_eq!(defaults.progress[&0], (30, 30));
    let spelt = draw(v1::ImageSampling { guidance: Some(2.0), solver: 1, ..steps(30, 1) }).await;
    assert_eq!(picture(&defaults.images[0].data), picture(&spelt));
    // The tag at the end of a raw prompt is where the time stands: with it or without, it is the same prompt.
    let raw = "<|User|>: a blue harbor with bright clouds\n\n<|Assistant|>:";
    for tag in ["", "<｜begin▁of▁generation｜>", "<begin_of_image>"] {
        let request = for_image(MODEL, completion(vec![text(&format!("{raw}{tag}"))]), steps(4, 1));
        assert_eq!(picture(&world.ask(request).await.unwrap().images[0].data), picture(&plain), "{tag:?}");
    }
    let webp = world.ask(harbor(v1::ImageSampling { format: v1::ImageFormat::Webp.into(), ..steps(4, 1) })).await.unwrap();
    assert_eq!(webp.images[0].media_type, "image/webp");
    assert_eq!(picture(&webp.images[0].data), picture(&plain));
    world.stop().await;
}

/// With room for one request, the next one gets in as soon as the first is dropped.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_drawing_ends_everywhere() {
    for wire in [Wire::InProcess, Wire::Nats, Wire::Direct] {
        let world = World::start_with(wire, &[MODEL], &[("router.max_concurrent", "1")]).await;
        let mut stream = world.client().generate(harbor(steps(1000, 1))).await.unwrap().into_inner();
        while let Some(message) = stream.message().await.unwrap() {
            if matches!(message.event, Some(Event::ImageProgress(progress)) if progress.done >= 3) {
                break;
            }
        }
        drop(stream);
        let after = tokio::time::timeout(LIMIT, world.ask(harbor(steps(3, 1)))).await.expect("the place is free again").unwrap();
        assert_eq!(after.progress[&0], (3, 3));
        tokio::time::timeout(LIMIT, world.stop()).await.expect("nothing is left to wait for");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_and_pictures_share_the_model() {
    let world = World::start(Wire::InProcess, &[MODEL]).await;
    let question = tests::Golden::read(MODEL).prompts.remove(0);
    let alone = world.ask(harbor(steps(6, 9))).await.unwrap().images.remove(0);
    let ask = async |mut client: Client, request| Answer::read(client.generate(request).await.unwrap().into_inner()).await.unwrap();
    let drawings = (0..6).map(|_| ask(world.client(), harbor(steps(6, 9))));
    let answers = (0..6).map(|_| ask(world.client(), question.request.clone()));
    let (drawings, answers) = futures::join!(futures::future::join_all(drawings), futures::future::join_all(answers));
    assert!(drawings.iter().all(|drawing| drawing.images[0].data == alone.data));
    assert!(answers.iter().all(|answer| answer.ids() == question.ids));
    world.stop().await;
}
