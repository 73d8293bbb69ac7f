//! Routed experts that other processes compute: found over the mesh, called over streams that stay open.
//!
//! | File | Holds |
//! |---|---|
//! | `mod.rs` | [`Fleet`]: all replicas of all shards of a model, as a model calls them |
//! | `keeper.rs` | finding replicas, opening streams to them, letting go of them |
//! | `drive.rs` | the runtime that all of it lives on, driven by the engine while it waits |
//! | `replica.rs` | one replica: its stream and who waits for an answer |
//! | `table.rs` | which shard and which replica a share goes to |
//! | `step.rs` | one layer of one step: sent, repeated when a replica fails, sent twice when one is late |
//! | `batch.rs` | shares to messages and back |
//! | `answers.rs` | what has come for a step |
//! | `delays.rs` | how long batches take, and when one is late |

mod answers;
mod batch;
mod delays;
mod drive;
mod keeper;
mod replica;
mod step;
mod table;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context;
use layers::{Combine, EngineError, RemoteExperts, Rows, Share};
use mesh::{Mesh, MeshConfig, MeshError};
use models::ExpertShape;
use placement::{BUCKET, ExpertRange, Manifest};
use proto::v1::activations::Encoding;
use tokio::sync::{Notify, watch};
use tracing::Span;

use self::delays::Delays;
use self::drive::Drive;
use self::keeper::Keeper;
use self::replica::{Failed, Replica};
use self::step::Step;
use self::table::Table;
use crate::metrics;

/// The replicas of all shards of a model.
pub struct Fleet {
    model: String,
    shape: ExpertShape,
    /// Of the checkpoint that the gate belongs to.
    fingerprint: Vec<u8>,
    encoding: Encoding,
    table: RwLock<Arc<Table>>,
    manifest: RwLock<Manifest>,
    delays: Delays,
    /// Wakes the keeper before its time.
    wanted: Arc<Notify>,
    /// Batches sent to replicas so far.
    turn: AtomicU64,
    complete: watch::Sender<bool>,
    drive: Drive,
}

/// The mesh that replicas are found and called over.
#[derive(Clone)]
pub enum Link {
    /// The process's own, on which services call each other as functions.
    Shared(Mesh),
    /// One more connection for the fleet alone.
    Own(MeshConfig),
}

impl Link {
    async fn join(self) -> Result<Mesh, MeshError> {
        match self {
            Self::Shared(mesh) => Ok(mesh),
            Self::Own(config) => Mesh::connect(&config).await,
        }
    }
}

impl Fleet {
    /// Begins to look for the shards of `model`, and goes on as long as the fleet lives.
    pub async fn start(
        link: Link,
        model: &str,
        shape: ExpertShape,
        fingerprint: [u8; 32],
        encoding: Encoding,
    ) -> anyhow::Result<Arc<Self>> {
        let drive = Drive::start().context("starting a thread for the streams to experts")?;
        let tasks = drive.handle().context("starting the streams to experts")?;
        let join = async move {
            let mesh = link.join().await?;
            let entries = mesh.bucket(BUCKET).await?.entries();
            Ok::<_, MeshError>((mesh, entries))
        };
        let (mesh, entries) = tasks.spawn(join).await??;
        let fleet = Arc::new(Self {
            model: model.to_owned(),
            table: RwLock::new(Arc::new(Table::new(shape.experts, &[]))),
            shape,
            fingerprint: fingerprint.to_vec(),
            encoding,
            manifest: RwLock::default(),
            delays: Delays::default(),
            wanted: Arc::new(Notify::new()),
            turn: AtomicU64::new(1),
            complete: watch::Sender::new(false),
            drive,
        });
        tasks.spawn(Keeper::new(mesh, &fleet, entries).run());
        Ok(fleet)
    }

    /// Whether every expert has a replica that holds it; changes as replicas come and go.
    pub fn complete(&self) -> watch::Receiver<bool> {
        self.complete.subscribe()
    }

    /// Refuses work that could not be done now, naming what is missing.
    pub fn check(&self) -> Result<(), String> {
        self.table().missing().map_or(Ok(()), |expert| Err(self.unheld(expert)))
    }

    fn table(&self) -> Arc<Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replicas have come or gone, or hold something else.
    fn set_replicas(&self, replicas: &[Arc<Replica>]) {
        let table = Table::new(self.shape.experts, replicas);
        let complete = table.missing().is_none();
        metrics::replicas(&self.model, &self.manifest.read().unwrap_or_else(PoisonError::into_inner).shards, &table.replicas().collect());
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        if self.complete.send_replace(complete) != complete {
            let missing = self.check().err();
            tracing::info!(model = self.model, complete, missing, "the experts of a model");
        }
    }

    fn set_manifest(&self, manifest: Manifest) {
        *self.manifest.write().unwrap_or_else(PoisonError::into_inner) = manifest;
    }

    /// Says that nobody holds an expert, by the name of the shard that should.
    fn unheld(&self, expert: usize) -> String {
        let manifest = self.manifest.read().unwrap_or_else(PoisonError::into_inner);
        match manifest.shards.keys().find(|range| range.contains(expert)) {
            Some(range) => format!("no replica of expert shard {range} of {} is running", self.model),
            None => format!("no expert shard of {} holds expert {expert}", self.model),
        }
    }

    /// Has the keeper look for replicas now.
    fn look_again(&self) {
        self.wanted.notify_one();
    }

    /// A number that is another one each time.
    fn turn(&self) -> u64 {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    fn span(&self, shard: ExpertRange, layer: usize, rows: usize) -> Span {
        tracing::info_span!(
            "experts.call",
            otel.kind = "client",
            janua.model = self.model,
            janua.shard = %shard,
            janua.layer = layer,
            janua.rows = rows,
        )
    }

    fn count_failed(&self, shard: ExpertRange, failed: &Failed) {
        let reason = match failed {
            Failed::Gone => "gone",
            Failed::Busy => "busy",
            Failed::NotHeld => "not_held",
            Failed::Fatal(_) => "fatal",
        };
        metrics::shard_failed(&self.model, shard, reason);
    }

    fn count_hedged(&self, shard: ExpertRange) {
        metrics::shard_hedged(&self.model, shard);
    }
}

impl RemoteExperts for Fleet {
    fn dispatch<'a>(&'a self, layer: usize, x: Rows, shares: &'a [Share], may_lose: &[bool]) -> Result<Combine<'a, Vec<f32>>, EngineError> {
        let step = Step::begin(self, layer, x, shares, may_lose)?;
        Ok(Box::new(move || step.finish()))
    }
}
