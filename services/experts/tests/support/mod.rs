//! Shards of the fixtures in the test's own process, batches for them, and what the whole model says to these.
#![allow(dead_code)] // each test program uses a part

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use checkpoint::Checkpoint;
use config::Config;
use experts::Entries;
use futures::StreamExt;
use layers::Share;
use mesh::{Channel, MAX_MESSAGE_BYTES, Mesh, Target};
use models::{ExpertShape, Shard, load_shard};
use placement::{ExpertRange, Manifest};
use process::{Doors, Host, LoadedModel, Progress, Served, Silent};
use proto::v1;
use proto::v1::activations::Encoding;
use proto::v1::expert_failure::Reason;
use proto::v1::expert_reply::Reply;
use proto::v1::experts_client::ExpertsClient;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use wire::activations::{pack, unpack};

/// Limit of everything that is waited for.
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const FIXTURES: [&str; 3] = ["moe_v1", "v2_lite", "v2_full"];
pub const MODEL: &str = "moe";

/// A host of one model, called [`MODEL`].
pub fn host(mesh: &Mesh, folder: &Path, settings: &[(&str, String)], progress: Arc<dyn Progress>) -> Host {
    let settings: Vec<_> = settings.iter().map(|(key, value)| (format!("experts.{key}"), value.clone())).collect();
    let config = Config::resolve(None, [], &settings).unwrap();
    let model = LoadedModel::new(MODEL, Arc::new(Checkpoint::open(folder).unwrap()));
    Host::new(config, mesh.clone(), vec![model], progress)
}

/// One replica of a shard.
pub struct Service {
    pub mesh: Mesh,
    pub range: ExpertRange,
    pub channel: Channel,
    entries: watch::Sender<Arc<BTreeMap<String, Bytes>>>,
    _served: Served,
}

impl Service {
    pub async fn start(mesh: &Mesh, folder: &Path, settings: &[(&str, String)]) -> Self {
        Self::start_with(mesh, folder, settings, Arc::new(Silent)).await
    }

    pub async fn start_with(mesh: &Mesh, folder: &Path, settings: &[(&str, String)], progress: Arc<dyn Progress>) -> Self {
        let (entries, follow): (_, Entries) = watch::channel(Arc::default());
        let host = host(mesh, folder, settings, progress);
        let mut opened = experts::open(&host, &follow).await.unwrap();
        let opened = opened.remove(0);
        let range = opened.name.shard;
        let target = Target::new("experts", MODEL).shard(range.to_string());
        assert_eq!(opened.offer.target, target);
        let served = process::serve(mesh, &Doors::default(), vec![opened.offer]).await.unwrap();
        Self { mesh: mesh.clone(), range, channel: mesh.channel(&target), entries, _served: served }
    }

    /// The whole model as one shard in this process.
    pub async fn whole(fixture: &str, settings: &[(&str, String)]) -> Self {
        Self::start(&Mesh::in_process(), &testkit::fixture(fixture), settings).await
    }

    pub fn client(&self) -> ExpertsClient<Channel> {
        client(&self.channel)
    }

    /// A new stream, with what it says first.
    pub async fn open(&self) -> (Talk, v1::Holdings) {
        let mut talk = Talk::open(self.client()).await;
        let Reply::Holdings(holdings) = talk.next().await.unwrap() else { panic!("holdings come first") };
        assert_eq!((holdings.first as usize, holdings.last as usize), (self.range.first, self.range.last));
        (talk, holdings)
    }

    /// What the bucket says from now on.
    pub fn extra(&self, extra: &[usize]) {
        self.entry(Manifest::value(&BTreeSet::from_iter(extra.iter().copied())));
    }

    pub fn entry(&self, value: Bytes) {
        self.entries.send_replace(Arc::new(BTreeMap::from([(Manifest::key(MODEL, self.range), value)])));
    }

    pub async fn inspect(&self) -> v1::InspectExpertsResponse {
        self.client().inspect(v1::InspectExpertsRequest {}).await.unwrap().into_inner()
    }
}

pub fn client(channel: &Channel) -> ExpertsClient<Channel> {
    ExpertsClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// An open stream.
pub struct Talk {
    pub batches: mpsc::Sender<v1::ExpertBatch>,
    replies: Streaming<v1::ExpertReply>,
}

impl Talk {
    pub async fn open(mut client: ExpertsClient<Channel>) -> Self {
        let (batches, receiver) = mpsc::channel(256);
        let replies = tokio::time::timeout(PATIENCE, client.compute(ReceiverStream::new(receiver))).await.expect("an answer comes");
        Self { batches, replies: replies.unwrap().into_inner() }
    }

    pub async fn send(&self, batch: &v1::ExpertBatch) {
        self.batches.send(batch.clone()).await.unwrap();
    }

    /// The next reply, or how the stream ended.
    pub async fn next(&mut self) -> Result<Reply, Option<Status>> {
        let reply = tokio::time::timeout(PATIENCE, self.replies.next()).await.expect("a reply comes");
        reply.ok_or(None)?.map(|reply| reply.reply.unwrap()).map_err(Some)
    }

    /// The reply to one batch alone.
    pub async fn ask(&mut self, batch: &v1::ExpertBatch) -> Reply {
        self.send(batch).await;
        self.next().await.unwrap()
    }

    pub async fn outputs(&mut self, batch: &v1::ExpertBatch) -> v1::Activations {
        self.send(batch).await;
        self.collect(batch).await
    }

    /// The outputs of a batch that was sent, alone: all pieces, which come in order.
    pub async fn collect(&mut self, batch: &v1::ExpertBatch) -> v1::Activations {
        let rows = if batch.weights.is_empty() { batch.places.len() as u32 } else { batch.rows.as_ref().unwrap().rows };
        let mut whole: Option<v1::Activations> = None;
        while whole.as_ref().is_none_or(|whole| whole.rows < rows) {
            let Reply::Outputs(outputs) = self.next().await.unwrap() else { panic!("outputs expected") };
            assert_eq!((outputs.id, outputs.first), (batch.id, whole.as_ref().map_or(0, |whole| whole.rows)));
            let piece = outputs.rows.unwrap();
            whole = Some(match whole {
                None => piece,
                Some(whole) => v1::Activations {
                    rows: whole.rows + piece.rows,
                    data: [whole.data, piece.data].concat().into(),
                    scales: [whole.scales, piece.scales].concat(),
                    ..piece
                },
            });
        }
        let whole = whole.unwrap();
        assert_eq!(whole.rows, rows);
        whole
    }

    /// The failure of a batch, whatever outputs come before it.
    pub async fn failure(&mut self, batch: &v1::ExpertBatch) -> (Reason, String) {
        self.send(batch).await;
        loop {
            match self.next().await.unwrap() {
                Reply::Outputs(outputs) => assert_eq!(outputs.id, batch.id),
                Reply::Failure(failure) => {
                    assert_eq!(failure.id, batch.id);
                    return (failure.reason(), failure.message);
                }
                other => panic!("a failure expected: {other:?}"),
            }
        }
    }
}

/// The experts of a fixture, all of them, computed in the test.
pub struct Whole(pub Shard);

impl Whole {
    pub fn open(fixture: &str) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(&testkit::fixture(fixture)).unwrap());
        let experts = models::expert_shape(&checkpoint).unwrap().unwrap().experts;
        Self(load_shard(&checkpoint, 0..experts, 1).unwrap())
    }

    pub fn shape(&self) -> &ExpertShape {
        self.0.shape()
    }

    /// Each expert's outputs for the rows of a question, as they are after their journey.
    pub fn outputs(&self, question: &Question) -> Vec<Vec<f32>> {
        let x = unpack("rows", &question.packed(), self.shape().hidden).unwrap();
        self.0.compute(question.layer, x, &question.shares).unwrap()
    }

    /// What the answer to a question is, before it is packed.
    pub fn answer(&self, question: &Question) -> Vec<f32> {
        let (hidden, outputs) = (self.shape().hidden, self.outputs(question));
        if !question.weighted {
            return outputs.concat();
        }
        let mut sums = vec![0.0f32; question.rows.len()];
        for (share, outputs) in question.shares.iter().zip(outputs) {
            for (place, (&row, weight)) in share.rows.iter().zip(&share.weights).enumerate() {
                for i in 0..hidden {
                    sums[row * hidden + i] += weight * outputs[place * hidden + i];
                }
            }
        }
        sums
    }
}

/// What a batch asks for.
#[derive(Debug, Clone)]
pub struct Question {
    pub layer: usize,
    pub hidden: usize,
    /// `[rows, hidden]`
    pub rows: Vec<f32>,
    pub shares: Vec<Share>,
    pub weighted: bool,
    pub encoding: Encoding,
}

impl Question {
    /// Random rows for some of the experts of a range, in f32 and without weights.
    pub fn random(random: &mut Random, shape: &ExpertShape, layer: usize, range: ExpertRange, rows: usize) -> Self {
        let values = (0..rows * shape.hidden).map(|_| 4.0 * random.number()).collect();
        let last = range.last;
        let mut shares = Vec::new();
        for expert in range.experts() {
            let places: Vec<usize> = (0..rows).filter(|_| random.number() > 0.0).collect();
            let places = if shares.is_empty() && expert == last && places.is_empty() { vec![rows - 1] } else { places };
            if !places.is_empty() {
                let weights = places.iter().map(|_| random.number()).collect();
                shares.push(Share { expert, rows: places, weights });
            }
        }
        Self { layer, hidden: shape.hidden, rows: values, shares, weighted: false, encoding: Encoding::F32 }
    }

    /// Every row for every expert of a range.
    pub fn full(random: &mut Random, shape: &ExpertShape, layer: usize, range: ExpertRange, rows: usize) -> Self {
        let values = (0..rows * shape.hidden).map(|_| random.number()).collect();
        let share = |expert| Share { expert, rows: (0..rows).collect(), weights: vec![0.5; rows] };
        let shares = range.experts().map(share).collect();
        Self { layer, hidden: shape.hidden, rows: values, shares, weighted: false, encoding: Encoding::F32 }
    }

    pub fn packed(&self) -> v1::Activations {
        pack(self.rows.clone(), self.hidden, self.encoding)
    }

    pub fn batch(&self, id: u64) -> v1::ExpertBatch {
        let all = |of: &dyn Fn(&Share) -> Vec<u32>| self.shares.iter().flat_map(of).collect::<Vec<_>>();
        v1::ExpertBatch {
            id,
            layer: self.layer as u32,
            rows: Some(self.packed()),
            experts: all(&|share| vec![share.expert as u32]),
            counts: all(&|share| vec![share.rows.len() as u32]),
            places: all(&|share| share.rows.iter().map(|&row| row as u32).collect()),
            weights: if self.weighted { self.shares.iter().flat_map(|share| share.weights.clone()).collect() } else { Vec::new() },
            traceparent: String::new(),
        }
    }
}

/// Numbers that are the same in every run.
pub struct Random(pub u64);

impl Random {
    /// In -1.0..1.0.
    pub fn number(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A copy of a fixture whose tensor `name` begins with a NaN.
pub fn with_nan(fixture: &str, name: &str) -> tempfile::TempDir {
    let (from, copy) = (testkit::fixture(fixture), tempfile::tempdir().unwrap());
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(file), copy.path().join(file)).unwrap();
    }
    let path: PathBuf = copy.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let begin = 8 + header + json[name]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[begin..begin + 4].fill(0xFF); // NaN in f32, and twice in bf16 and f16
    std::fs::write(&path, bytes).unwrap();
    copy
}
