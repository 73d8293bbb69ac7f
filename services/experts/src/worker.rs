use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use layers::Share;
use models::Shard;
use proto::v1::Activations;
use proto::v1::activations::Encoding;
use tokio::sync::{mpsc, watch};
use tonic::Code;
use tracing::Span;
use wire::activations::pack;

use crate::batch::Batch;
use crate::error::Failure;
use crate::metrics::{Counts, Meters};
use crate::stage::{Held, Name};

/// Most numbers in a piece, unless a row has more: 1 MiB as f32.
const PIECE_NUMBERS: usize = 1 << 18;

/// A part of the outputs of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Which of all rows of the outputs it begins with.
    pub first: usize,
    pub rows: Activations,
}

/// What becomes of a batch: pieces until all rows are there, or a failure.
pub type Answer = Result<Piece, Failure>;

/// How a batch is computed: piece by piece, in order.
pub type Compute = fn(&Shard, &mut Batch, &mut dyn FnMut(Piece)) -> Result<(), Failure>;

/// A batch that waits for its turn.
pub(crate) struct Task {
    pub batch: Batch,
    /// What was held when the batch came: it is computed with that.
    pub held: Arc<Held>,
    /// Has room for all pieces and a failure.
    pub answers: mpsc::Sender<Answer>,
    /// Disabled for a batch that is not traced.
    pub span: Span,
}

/// The thread that computes, one batch after the other, until nobody can send any more or a computation crashes.
pub(crate) struct Worker {
    pub name: Arc<Name>,
    pub compute: Compute,
    pub counts: Arc<Counts>,
    pub meters: Arc<Meters>,
    /// `None` from the crash on.
    pub held: Arc<watch::Sender<Option<Arc<Held>>>>,
}

impl Worker {
    /// What the thread does.
    pub fn run(&self, tasks: Receiver<Task>) {
        let served = catch_unwind(AssertUnwindSafe(|| self.serve(tasks)));
        if !matches!(served, Ok(Ok(()))) {
            // What waited has learnt that it waited in vain: the queue is gone. Now everybody else does.
            self.meters.waiting.set(0.0);
            self.held.send_replace(None);
        }
    }

    /// Computes a batch on the caller's thread.
    pub fn work_here(&self, task: Task) {
        if self.work(task).is_err() {
            self.held.send_replace(None);
        }
    }

    fn serve(&self, tasks: Receiver<Task>) -> Result<(), Crashed> {
        while let Ok(task) = tasks.recv() {
            self.meters.waiting.decrement(1.0);
            if task.answers.is_closed() {
                self.meters.cancelled.increment(1);
            } else {
                self.work(task)?;
            }
        }
        Ok(())
    }

    /// Fails when the computation has crashed: in what state it left its threads nobody knows.
    fn work(&self, task: Task) -> Result<(), Crashed> {
        let Task { mut batch, held, answers, span } = task;
        // Fails when the stream has ended in the meantime, and then nobody misses the answer.
        let send = |answer| drop(answers.try_send(answer));
        let inner = self.span(&span, &batch);
        let begun = Instant::now();
        let result =
            inner.in_scope(|| catch_unwind(AssertUnwindSafe(|| (self.compute)(&held.shard, &mut batch, &mut |piece| send(Ok(piece))))));
        self.meters.compute.record(begun.elapsed());
        let (result, crashed) = match result {
            Ok(result) => (result, Ok(())),
            Err(payload) => {
                let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
                let message = format!("layer {}: the computation crashed: {}", batch.layer, text.unwrap_or("panic"));
                tracing::error!(model = self.name.model, shard = %self.name.shard, %message, "the experts stop");
                (Err(Failure::Compute(message)), Err(Crashed))
            }
        };
        match &result {
            Ok(_) => self.counts.batch(batch.position, &batch.shares, &self.meters),
            Err(failure) => self.meters.failed(failure),
        }
        drop(inner);
        note(&span, result.as_ref().err());
        if let Err(failure) = result {
            send(Err(failure));
        }
        crashed
    }

    fn span(&self, parent: &Span, batch: &Batch) -> Span {
        if parent.is_disabled() {
            return Span::none();
        }
        tracing::info_span!(
            parent: parent,
            "experts.compute",
            janua.model = self.name.model,
            janua.shard = %self.name.shard,
            janua.layer = batch.layer,
            janua.rows = batch.rows,
            janua.experts = batch.shares.len(),
        )
    }
}

/// A computation ended with a panic.
#[derive(Debug)]
pub(crate) struct Crashed;

/// Notes on the span of a batch how it ended.
pub(crate) fn note(span: &Span, failure: Option<&Failure>) {
    if span.is_disabled() {
        return;
    }
    match failure {
        None => telemetry::record_status(span, Code::Ok.into(), ""),
        Some(failure) => telemetry::record_status(span, failure.code().into(), &failure.to_string()),
    }
}

/// The experts' outputs, each a piece as soon as it is there; for weighted batches their sum by row, in the end. Packed as the rows came.
pub(crate) fn compute(shard: &Shard, batch: &mut Batch, send: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
    let failed = |error: layers::EngineError| Failure::Compute(error.to_string());
    let computation = shard.begin(batch.layer, std::mem::take(&mut batch.x)).map_err(failed)?;
    let hidden = shard.shape().hidden;
    let mut sums = if batch.weighted { vec![0.0f32; batch.rows * hidden] } else { Vec::new() };
    let mut first = 0;
    for share in &batch.shares {
        let output = computation.share(share).map_err(failed)?;
        if !all_finite(&output) {
            return Err(Failure::Compute(format!("layer {}: expert {}: outputs are NaN or infinite", batch.layer, share.expert)));
        }
        if batch.weighted {
            add(&mut sums, share, &output, hidden);
        } else {
            first = send_rows(first, output, hidden, batch.encoding, send);
        }
    }
    if !batch.weighted {
        return Ok(());
    }
    if !all_finite(&sums) {
        let experts: Vec<_> = batch.shares.iter().map(|share| share.expert).collect();
        return Err(Failure::Compute(format!("layer {}: experts {experts:?}: their weighted sum is NaN or infinite", batch.layer)));
    }
    send_rows(0, sums, hidden, batch.encoding, send);
    Ok(())
}

/// Sends rows in pieces of limited size, whose numbers begin at `first`. Gives the number behind them.
fn send_rows(first: usize, rows: Vec<f32>, hidden: usize, encoding: Encoding, send: &mut dyn FnMut(Piece)) -> usize {
    let count = rows.len() / hidden;
    let most = piece_rows(hidden);
    if count <= most {
        send(Piece { first, rows: pack(rows, hidden, encoding) });
        return first + count;
    }
    for (number, rows) in rows.chunks(most * hidden).enumerate() {
        send(Piece { first: first + number * most, rows: pack(rows.to_vec(), hidden, encoding) });
    }
    first + count
}

/// Most rows of a piece.
fn piece_rows(hidden: usize) -> usize {
    (PIECE_NUMBERS / hidden).max(1)
}

/// Most pieces that the outputs of a batch come in.
pub(crate) fn pieces(batch: &Batch, hidden: usize) -> usize {
    let most = piece_rows(hidden);
    if batch.weighted { batch.rows.div_ceil(most) } else { batch.shares.iter().map(|share| share.rows.len().div_ceil(most)).sum() }
}

/// Adds the outputs of a share, times its weights, to the sums of its rows.
fn add(sums: &mut [f32], share: &Share, output: &[f32], hidden: usize) {
    for ((&row, weight), values) in share.rows.iter().zip(&share.weights).zip(output.chunks_exact(hidden)) {
        let sums = &mut sums[row * hidden..][..hidden];
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
    }
}

/// Without a branch in the loop, so that it runs at the speed of memory.
fn all_finite(values: &[f32]) -> bool {
    values.iter().fold(true, |finite, value| finite & value.is_finite())
}
