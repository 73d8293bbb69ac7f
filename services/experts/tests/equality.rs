//! What shards say is what the whole model says: on every wire that the machine has, however it is split.
#![allow(clippy::unwrap_used)]

mod support;

use mesh::{Mesh, MeshConfig};
use proto::v1::activations::Encoding;
use support::{FIXTURES, Question, Random, Service, Talk, Whole};
use testkit::NatsServer;
use wire::activations::unpack;

/// A shard of each split, as settings.
fn splits() -> Vec<Vec<Vec<(&'static str, String)>>> {
    let even = |shards: usize| (0..shards).map(|shard| vec![("shards", shards.to_string()), ("shard", shard.to_string())]).collect();
    let uneven = (0..3).map(|shard| vec![("starts", "0,1,9".to_owned()), ("shard", shard.to_string())]).collect();
    vec![even(1), even(2), even(3), even(8), uneven]
}

/// Every shard of a split of a fixture, each asked in every layer.
async fn check_split(mesh: &Mesh, fixture: &str, whole: &Whole, split: &[Vec<(&'static str, String)>], random: &mut Random) {
    let mut held = Vec::new();
    for settings in split {
        let settings: Vec<_> = settings.iter().cloned().chain([("threads", "1".to_owned())]).collect();
        let service = Service::start(mesh, &testkit::fixture(fixture), &settings).await;
        held.extend(service.range.experts());
        let (mut talk, holdings) = service.open().await;
        assert!(holdings.extra.is_empty() && holdings.fingerprint.len() == 32);
        for &layer in &whole.shape().layers.clone() {
            for rows in [1, 2, 33] {
                check_batches(&mut talk, whole, random, layer, rows, &service).await;
            }
        }
    }
    assert!(held.iter().copied().eq(0..whole.shape().experts), "{held:?}");
}

async fn check_batches(talk: &mut Talk, whole: &Whole, random: &mut Random, layer: usize, rows: usize, service: &Service) {
    let hidden = whole.shape().hidden;
    let plain = Question::random(random, whole.shape(), layer, service.range, rows);
    let answer = talk.outputs(&plain.batch(7)).await;
    let values = unpack("rows", &answer, hidden).unwrap();
    assert_eq!(answer.encoding(), Encoding::F32);
    let exact = |values: &[f32], expected: &[f32]| values.iter().map(|v| v.to_bits()).eq(expected.iter().map(|v| v.to_bits()));
    assert!(exact(&values, &whole.answer(&plain)), "layer {layer}, {rows} rows of shard {}", service.range);

    let sums = Question { weighted: true, ..plain.clone() };
    let answer = talk.outputs(&sums.batch(8)).await;
    assert_eq!(answer.rows as usize, rows);
    assert!(exact(&unpack("rows", &answer, hidden).unwrap(), &whole.answer(&sums)), "sums of layer {layer}");

    for encoding in [Encoding::Bf16, Encoding::Int8] {
        for weighted in [false, true] {
            let question = Question { encoding, weighted, ..plain.clone() };
            let answer = talk.outputs(&question.batch(9)).await;
            assert_eq!(answer.encoding(), encoding);
            check_near(&unpack("rows", &answer, hidden).unwrap(), &whole.answer(&question), hidden, encoding);
        }
    }
}

/// As near as the encoding says, row by row.
fn check_near(values: &[f32], expected: &[f32], hidden: usize, encoding: Encoding) {
    assert_eq!(values.len(), expected.len());
    for (values, expected) in values.chunks(hidden).zip(expected.chunks(hidden)) {
        let largest = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        for (value, expected) in values.iter().zip(expected) {
            let bound = if encoding == Encoding::Bf16 { expected.abs() / 256.0 } else { largest / 127.0 * 0.501 };
            assert!((value - expected).abs() <= bound, "{value} for {expected} in {encoding:?}");
        }
    }
}

async fn check_all(mesh: impl AsyncFn() -> Mesh, seed: u64) {
    let mut random = Random(seed);
    for fixture in FIXTURES {
        let whole = Whole::open(fixture);
        for split in splits() {
            check_split(&mesh().await, fixture, &whole, &split, &mut random).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_process() {
    check_all(async || Mesh::in_process(), 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_nats() {
    let server = NatsServer::start().await;
    check_all(async || Mesh::connect(&MeshConfig::nats(server.url())).await.unwrap(), 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_direct() {
    let server = NatsServer::start().await;
    check_all(async || Mesh::connect(&MeshConfig::direct(server.url())).await.unwrap(), 3).await;
}
