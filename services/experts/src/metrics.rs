//! Every metric of the experts service. Names end in their unit; `_total` marks counters. All are by model.

use std::sync::atomic::{AtomicU64, Ordering};

use layers::Share;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use models::ExpertShape;

use crate::error::Failure;

/// Batches that came, by outcome: `computed`, `failed`, `invalid`, `not_held`, `busy`, `cancelled` (the stream ended before its turn).
const BATCHES: &str = "janua_experts_batches_total";
/// Rows computed, by expert, all layers together.
const ROWS: &str = "janua_experts_rows_total";
/// From the beginning of a batch's work to its packed outputs.
const COMPUTE: &str = "janua_experts_compute_duration_seconds";
/// Batches that wait.
const WAITING: &str = "janua_experts_waiting_batches";

/// The metrics of one model, looked up once: a batch must not pay for names.
pub(crate) struct Meters {
    pub computed: Counter,
    pub cancelled: Counter,
    failed: Counter,
    invalid: Counter,
    not_held: Counter,
    busy: Counter,
    /// One per expert.
    rows: Vec<Counter>,
    pub compute: Histogram,
    pub waiting: Gauge,
}

impl Meters {
    pub fn new(model: &str, experts: usize) -> Self {
        let outcome = |outcome: &'static str| counter!(BATCHES, "model" => model.to_owned(), "outcome" => outcome);
        Self {
            computed: outcome("computed"),
            cancelled: outcome("cancelled"),
            failed: outcome("failed"),
            invalid: outcome("invalid"),
            not_held: outcome("not_held"),
            busy: outcome("busy"),
            rows: (0..experts).map(|expert| counter!(ROWS, "model" => model.to_owned(), "expert" => expert.to_string())).collect(),
            compute: histogram!(COMPUTE, "model" => model.to_owned()),
            waiting: gauge!(WAITING, "model" => model.to_owned()),
        }
    }

    pub fn failed(&self, failure: &Failure) {
        let counter = match failure {
            Failure::Invalid(_) => &self.invalid,
            Failure::NotHeld { .. } => &self.not_held,
            Failure::Busy(_) => &self.busy,
            Failure::Compute(_) => &self.failed,
        };
        counter.increment(1);
    }
}

/// What has been computed since the start.
pub(crate) struct Counts {
    experts: usize,
    /// `[layers, experts]`
    rows: Vec<AtomicU64>,
    batches: AtomicU64,
}

impl Counts {
    pub fn new(shape: &ExpertShape) -> Self {
        let rows = (0..shape.layers.len() * shape.experts).map(|_| AtomicU64::new(0)).collect();
        Self { experts: shape.experts, rows, batches: AtomicU64::new(0) }
    }

    /// A batch has been computed: these shares of the layer that is `layer`th among those with experts.
    pub fn batch(&self, layer: usize, shares: &[Share], meters: &Meters) {
        for share in shares {
            let rows = share.rows.len() as u64;
            self.rows[layer * self.experts + share.expert].fetch_add(rows, Ordering::Relaxed);
            meters.rows[share.expert].increment(rows);
        }
        self.batches.fetch_add(1, Ordering::Relaxed);
        meters.computed.increment(1);
    }

    /// Rows by layer and expert, and batches.
    pub fn read(&self) -> (Vec<u64>, u64) {
        let rows = self.rows.iter().map(|rows| rows.load(Ordering::Relaxed)).collect();
        (rows, self.batches.load(Ordering::Relaxed))
    }
}
