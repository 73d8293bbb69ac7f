use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::Stream;
use http::{HeaderMap, HeaderValue};
use models::{ExpertShape, Shard};
use placement::{ExpertRange, Manifest};
use proto::v1;
use tokio::sync::{mpsc, watch};
use tracing::Span;

use crate::batch::{Batch, Place};
use crate::error::{Failure, Stopped};
use crate::metrics::{Counts, Meters};
use crate::worker::{Answer, Compute, Task, Worker, compute, note, pieces};

/// A batch is small with at most so many weights to read and products to compute: about 0.2 ms of one core.
const SMALL_WEIGHTS: usize = 1 << 20;
const SMALL_PRODUCTS: usize = 1 << 22;

/// What is served: a shard of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    pub model: String,
    pub shard: ExpertRange,
}

impl Name {
    /// Where it stands in the bucket.
    pub fn key(&self) -> String {
        Manifest::key(&self.model, self.shard)
    }
}

/// What a replica holds at a time.
pub struct Held {
    pub shard: Shard,
    /// The same, as callers are told.
    pub holdings: v1::Holdings,
    /// Of the experts held.
    pub weight_bytes: u64,
}

impl Held {
    /// `shard` holds the experts of `own`, and copies of others.
    pub fn new(shard: Shard, own: ExpertRange, fingerprint: Bytes) -> Self {
        let extra = shard.held().iter().filter(|&&expert| !own.contains(expert)).map(|&expert| expert as u32).collect();
        let holdings = v1::Holdings { first: own.first as u32, last: own.last as u32, extra, fingerprint };
        let weight_bytes = shard.weight_bytes();
        Self { shard, holdings, weight_bytes }
    }

    /// The same experts and `extra` instead of the copies there are now.
    pub(crate) fn with(&self, own: ExpertRange, extra: &BTreeSet<usize>) -> Result<Self, layers::EngineError> {
        let shard = self.shard.holding(own.experts().chain(extra.iter().copied()))?;
        Ok(Self::new(shard, own, self.holdings.fingerprint.clone()))
    }
}

/// What a replica has done, and what it is.
pub struct Report {
    pub held: Arc<Held>,
    /// Rows computed, `[layers, experts]`.
    pub rows: Vec<u64>,
    pub batches: u64,
}

/// The work of the service for one shard of one model. Cheap to clone; the last clone ends its thread.
#[derive(Clone)]
pub struct Stage(Arc<Inner>);

struct Inner {
    name: Arc<Name>,
    shape: ExpertShape,
    worker: Arc<Worker>,
    queue: SyncSender<Task>,
    queue_limit: usize,
    /// `None`: nothing is computed any more. Followed by every stream.
    held: Arc<watch::Sender<Option<Arc<Held>>>>,
    counts: Arc<Counts>,
    meters: Arc<Meters>,
}

impl Stage {
    /// Starts the thread. It sleeps while no batch waits. Fails when the system has no thread to give.
    pub fn new(name: Name, held: Held, queue_limit: usize) -> std::io::Result<Self> {
        Self::computing(name, held, queue_limit, compute)
    }

    /// As [`Stage::new`], with something else than the experts' arithmetic: for tests, and for measuring everything around it.
    pub fn computing(name: Name, held: Held, queue_limit: usize, compute: Compute) -> std::io::Result<Self> {
        let (queue, tasks) = sync_channel(queue_limit);
        let (name, shape) = (Arc::new(name), held.shard.shape().clone());
        let counts = Arc::new(Counts::new(&shape));
        let meters = Arc::new(Meters::new(&name.model, shape.experts));
        let held = Arc::new(watch::Sender::new(Some(Arc::new(held))));
        let worker = Worker { name: name.clone(), compute, counts: counts.clone(), meters: meters.clone(), held: held.clone() };
        let worker = Arc::new(worker);
        let thread = worker.clone();
        std::thread::Builder::new().name("janua-experts".into()).spawn(move || thread.run(tasks))?;
        Ok(Self(Arc::new(Inner { name, shape, worker, queue, queue_limit, held, counts, meters })))
    }

    pub fn name(&self) -> &Name {
        &self.0.name
    }

    pub fn shape(&self) -> &ExpertShape {
        &self.0.shape
    }

    /// What is held now and from now on; `None` when nothing is computed any more.
    pub fn held(&self) -> watch::Receiver<Option<Arc<Held>>> {
        self.0.held.subscribe()
    }

    /// Holds something else from the next batch on.
    pub(crate) fn hold(&self, held: Held) {
        let held = Arc::new(held);
        // One that has stopped stays so.
        self.0.held.send_if_modified(|now| now.as_mut().map(|now| *now = held).is_some());
    }

    pub(crate) fn downgrade(&self) -> WeakStage {
        WeakStage(Arc::downgrade(&self.0))
    }

    /// What streams end with when nothing is computed any more.
    pub fn crashed(&self) -> Stopped {
        Stopped { model: self.0.name.model.clone(), shard: self.0.name.shard }
    }

    /// What has been done so far; `None` when nothing is done any more.
    pub fn report(&self) -> Option<Report> {
        let held = self.0.held.borrow().clone()?;
        let (rows, batches) = self.0.counts.read();
        Some(Report { held, rows, batches })
    }

    /// Lets a batch wait for its turn, or says at once why not.
    pub fn submit(&self, message: &v1::ExpertBatch) -> Result<Waiting, Failure> {
        let span = span(&message.traceparent);
        let inner = &self.0;
        self.enqueue(message, &span).inspect_err(|failure| {
            inner.meters.failed(failure);
            note(&span, Some(failure));
        })
    }

    fn enqueue(&self, message: &v1::ExpertBatch, span: &Span) -> Result<Waiting, Failure> {
        let Inner { name, shape, worker, queue, queue_limit, meters, .. } = &*self.0;
        let waiting = |answers| Waiting { id: message.id, answers, left: 1 };
        // Stopped: the sender of the answers ends here, which `waiting` tells.
        let Some(held) = self.0.held.borrow().clone() else { return Ok(waiting(mpsc::channel(1).1)) };
        let batch = Batch::read(message, Place { shape, held: held.shard.held(), shard: name.shard })?;
        let (answers, receiver) = mpsc::channel(pieces(&batch, shape.hidden) + 1);
        let waiting = Waiting { left: batch.outputs(), ..waiting(receiver) };
        if is_small(&batch, shape) {
            worker.work_here(Task { batch, held, answers, span: span.clone() });
            return Ok(waiting);
        }
        // Counted before it can be taken.
        meters.waiting.increment(1.0);
        match queue.try_send(Task { batch, held, answers, span: span.clone() }) {
            Ok(()) => Ok(waiting),
            Err(error) => {
                meters.waiting.decrement(1.0);
                match error {
                    TrySendError::Full(_) => Err(Failure::Busy(*queue_limit)),
                    TrySendError::Disconnected(_) => Ok(waiting),
                }
            }
        }
    }
}

/// A stage that may be gone.
pub(crate) struct WeakStage(Weak<Inner>);

impl WeakStage {
    pub fn upgrade(&self) -> Option<Stage> {
        self.0.upgrade().map(Stage)
    }
}

/// Whether a batch is computed where it arrives: to wake a thread for it would take longer.
fn is_small(batch: &Batch, shape: &ExpertShape) -> bool {
    let weights = 3 * shape.hidden * shape.inner;
    let rows: usize = batch.shares.iter().map(|share| share.rows.len()).sum();
    weights.saturating_mul(batch.shares.len()) <= SMALL_WEIGHTS && weights.saturating_mul(rows) <= SMALL_PRODUCTS
}

/// A batch under way. Dropping it takes it out of the queue when its turn comes.
#[derive(Debug)]
pub struct Waiting {
    id: u64,
    answers: mpsc::Receiver<Answer>,
    /// Rows of outputs that have not come yet.
    left: usize,
}

impl Stream for Waiting {
    /// The batch's id with a piece of its outputs, or its failure; `None`: nothing is computed any more.
    type Item = Option<(u64, Answer)>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let answer = ready!(self.answers.poll_recv(cx));
        let missing = std::mem::take(&mut self.left);
        Poll::Ready(match answer {
            Some(Ok(piece)) => {
                self.left = missing.saturating_sub(piece.rows.rows as usize);
                Some(Some((self.id, Ok(piece))))
            }
            Some(Err(failure)) => Some(Some((self.id, Err(failure)))),
            None => (missing > 0).then_some(None),
        })
    }
}

/// The span of a batch, child of its caller's; none for a batch that is not traced.
fn span(traceparent: &str) -> Span {
    if traceparent.is_empty() {
        return Span::none();
    }
    let Ok(value) = HeaderValue::try_from(traceparent) else { return Span::none() };
    telemetry::server_span(&HeaderMap::from_iter([(http::HeaderName::from_static("traceparent"), value)]), "janua.v1.Experts", "Compute")
}
