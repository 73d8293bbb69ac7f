//! What rounded activations cost: the sum over a token's experts through shards, beside the same sum without rounding.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use ::config::Config;
use checkpoint::Checkpoint;
use language::{Fleet, Link};
use layers::{RemoteExperts, Rows, Share};
use mesh::Mesh;
use process::{Host, LoadedModel, Served, Silent};
use proto::v1::activations::Encoding;

/// Rows of a step.
const ROWS: usize = 64;
/// Experts of each row.
const TOP_K: usize = 4;

/// Largest root mean square of the error of a sum, as a part of the root mean square of the sums. Measured over the fixtures: 0.0029 to 0.0031.
const BF16: f64 = 0.004;
/// Measured over the fixtures: 0.0100 to 0.0106.
const INT8: f64 = 0.015;

#[tokio::test(flavor = "multi_thread")]
async fn rounded_activations_stay_close_and_exact_ones_are_exact() {
    for name in ["moe_v1", "v2_lite", "v2_full"] {
        for (encoding, range) in [(Encoding::F32, 0.0..=0.0), (Encoding::Bf16, 1e-4..=BF16), (Encoding::Int8, 1e-3..=INT8)] {
            let errors = errors(name, encoding).await;
            println!("{name} {}: {errors:.4?}", encoding.as_str_name());
            assert!(errors.iter().all(|error| range.contains(error)), "{name} {encoding:?}: {errors:?} not in {range:?}");
        }
    }
}

/// The error of every layer of experts, in two shards.
async fn errors(name: &str, encoding: Encoding) -> Vec<f64> {
    let checkpoint = Arc::new(Checkpoint::open(&testkit::fixture(name)).unwrap());
    let shape = models::expert_shape(&checkpoint).unwrap().unwrap();
    let mesh = Mesh::in_process();
    let _shards = [shard(&mesh, name, &checkpoint, 0).await, shard(&mesh, name, &checkpoint, 1).await];
    let fleet = Fleet::start(Link::Shared(mesh), name, shape.clone(), checkpoint.fingerprint(), encoding).await.unwrap();
    fleet.complete().wait_for(|complete| *complete).await.unwrap();
    let whole = models::load_shard(&checkpoint, 0..shape.experts, 1).unwrap();
    let x: Vec<f32> = (0..ROWS * shape.hidden).map(|i| noise(i as u64)).collect();
    let shares = shares(shape.experts);
    let compare = |layer: &usize| {
        let outputs = whole.compute(*layer, x.clone(), &shares).unwrap();
        let expected = sum(shape.hidden, shares.iter().zip(&outputs).map(|(share, values)| (&share.rows, &share.weights, values)));
        let mixture = fleet.dispatch(*layer, Rows { values: x.clone(), width: shape.hidden }, &shares, &[false; ROWS]).unwrap()().unwrap();
        let found = sum(shape.hidden, mixture.terms.iter().map(|term| (&term.rows, &term.weights, &term.values)));
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
        let error = square(&mut found.iter().zip(&expected).map(|(a, b)| f64::from(a - b)));
        (error / square(&mut expected.iter().map(|value| f64::from(*value)))).sqrt()
    };
    tokio::task::block_in_place(|| shape.layers.iter().map(compare).collect())
}

async fn shard(mesh: &Mesh, name: &str, checkpoint: &Arc<Checkpoint>, index: usize) -> Served {
    let settings = [("experts.shards", "2".to_owned()), ("experts.shard", index.to_string())].map(|(key, value)| (key.to_owned(), value));
    let config = Config::load(None, &settings).unwrap();
    let host = Host::new(config, mesh.clone(), vec![LoadedModel::new(name, checkpoint.clone())], Arc::new(Silent));
    let offers = experts::start(&host).await.unwrap();
    process::serve(&host.mesh, &host.doors, offers).await.unwrap()
}

/// Every row goes to some experts, with weights that add up to one.
fn shares(experts: usize) -> Vec<Share> {
    let chosen = |expert: usize, row: usize| (expert + 3 * row) % experts < TOP_K;
    let share = |expert| {
        let rows: Vec<usize> = (0..ROWS).filter(|&row| chosen(expert, row)).collect();
        Share { expert, weights: vec![1.0 / TOP_K as f32; rows.len()], rows }
    };
    (0..experts).map(share).filter(|share| !share.rows.is_empty()).collect()
}

fn sum<'a>(hidden: usize, terms: impl Iterator<Item = (&'a Vec<usize>, &'a Vec<f32>, &'a Vec<f32>)>) -> Vec<f32> {
    let mut sums = vec![0.0f32; ROWS * hidden];
    for (rows, weights, values) in terms {
        for ((row, weight), values) in rows.iter().zip(weights).zip(values.chunks_exact(hidden)) {
            let sums = &mut sums[row * hidden..][..hidden];
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
        }
    }
    sums
}

/// About normal, as normed activations are: the sum of a few uniform numbers.
fn noise(index: u64) -> f32 {
    let uniform = |part: u64| {
        let mixed = (index * 8 + part).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (((mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f32) / (1u64 << 24) as f32 - 0.5
    };
    (0..8).map(uniform).sum()
}
