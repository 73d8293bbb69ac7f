//! One replica of a shard, and the stream that is open to it.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use mesh::InstanceName;
use placement::ExpertRange;
use proto::v1;
use proto::v1::expert_failure::Reason;
use tokio::sync::{Notify, mpsc};

use super::answers::{Answer, Answers, Piece};

/// Batches that may wait for the stream to take them. An engine has one batch under way for each replica, and seldom a second one.
const OUTBOX: usize = 16;

/// One replica of a shard.
#[derive(Debug)]
pub(super) struct Replica {
    pub name: InstanceName,
    pub shard: ExpertRange,
    held: RwLock<BTreeSet<usize>>,
    outbox: mpsc::Sender<v1::ExpertBatch>,
    waiting: Mutex<HashMap<u64, Waiter>>,
    next_id: AtomicU64,
    /// Batches under way.
    load: AtomicUsize,
    /// The number of the last batch that it was sent, of all that go to anybody.
    turn: AtomicU64,
    /// No new batch is to be sent: the stream has ended or is about to.
    closed: AtomicBool,
    /// Tells the stream's reader that it is closed and nothing is under way any more.
    released: Notify,
}

/// Who waits for a batch.
#[derive(Debug)]
pub(super) struct Waiter {
    pub part: usize,
    pub answers: Arc<Answers>,
    /// Rows of outputs that have not come yet.
    pub left: usize,
}

/// Why a replica gave no outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failed {
    /// The stream broke, or there is none: another replica may do it.
    Gone,
    /// Its queue is full.
    Busy,
    /// It does not hold one of the experts any more.
    NotHeld,
    /// It will fail everywhere.
    Fatal(String),
}

impl Replica {
    /// A replica, and the batches that its stream is to carry.
    pub fn new(name: InstanceName, shard: ExpertRange, held: BTreeSet<usize>) -> (Self, mpsc::Receiver<v1::ExpertBatch>) {
        let (outbox, batches) = mpsc::channel(OUTBOX);
        let replica = Self {
            name,
            shard,
            held: RwLock::new(held),
            outbox,
            waiting: Mutex::default(),
            next_id: AtomicU64::new(1),
            load: AtomicUsize::new(0),
            turn: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            released: Notify::new(),
        };
        (replica, batches)
    }

    /// The experts that it holds.
    pub fn held(&self) -> BTreeSet<usize> {
        self.held.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it holds all of these experts.
    pub fn holds(&self, experts: &[u32]) -> bool {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        experts.iter().all(|&expert| held.contains(&(expert as usize)))
    }

    pub fn hold(&self, held: BTreeSet<usize>) {
        *self.held.write().unwrap_or_else(PoisonError::into_inner) = held;
    }

    /// Batches under way.
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// The last turn that it took.
    pub fn last_turn(&self) -> u64 {
        self.turn.load(Ordering::Relaxed)
    }

    /// It is sent a batch, which is number `turn` of all.
    pub fn take_turn(&self, turn: u64) {
        self.turn.store(turn, Ordering::Relaxed);
    }

    pub fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Acquire)
    }

    /// Puts a batch on its way. The waiter is told what became of it, unless this returns an error.
    pub fn send(&self, mut batch: v1::ExpertBatch, waiter: Waiter) -> Result<(), Failed> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        batch.id = id;
        {
            let mut waiting = self.waiting();
            if !self.is_open() {
                return Err(Failed::Gone);
            }
            waiting.insert(id, waiter);
            self.load.store(waiting.len(), Ordering::Relaxed);
        }
        self.outbox.try_send(batch).map_err(|error| {
            self.take(id);
            match error {
                mpsc::error::TrySendError::Full(_) => Failed::Busy,
                mpsc::error::TrySendError::Closed(_) => {
                    self.leave();
                    Failed::Gone
                }
            }
        })
    }

    /// Hands a part of the outputs of a batch to whoever waits for it.
    pub fn outputs(&self, id: u64, first: usize, rows: v1::Activations) {
        let mut waiting = self.waiting();
        let Some(waiter) = waiting.get_mut(&id) else { return };
        waiter.left = waiter.left.saturating_sub(rows.rows as usize);
        let last = waiter.left == 0;
        let (part, answers) = (waiter.part, waiter.answers.clone());
        if last {
            waiting.remove(&id);
            self.load.store(waiting.len(), Ordering::Relaxed);
            self.release(&waiting);
        }
        drop(waiting);
        answers.put(Answer { part, from: self.name.clone(), outcome: Ok(Piece { first, rows, last }) });
    }

    /// A batch has no outputs, or no more.
    pub fn failure(&self, id: u64, failed: Failed) {
        if let Some(Waiter { part, answers, .. }) = self.take(id) {
            answers.put(Answer { part, from: self.name.clone(), outcome: Err(failed) });
        }
    }

    /// Takes no new batch from now on; those under way go on.
    pub fn leave(&self) {
        let waiting = self.waiting();
        self.closed.store(true, Ordering::Release);
        self.release(&waiting);
    }

    /// Waits until it takes no new batch and none is under way.
    pub async fn released(&self) {
        self.released.notified().await;
    }

    /// Nothing is sent to a replica that is closed, so what holds here holds from now on.
    fn release(&self, waiting: &HashMap<u64, Waiter>) {
        if waiting.is_empty() && !self.is_open() {
            self.released.notify_one();
        }
    }

    /// The stream has ended: whoever waits is told so.
    pub fn end(&self) {
        self.leave();
        let waiting = std::mem::take(&mut *self.waiting());
        self.load.store(0, Ordering::Relaxed);
        for Waiter { part, answers, .. } in waiting.into_values() {
            answers.put(Answer { part, from: self.name.clone(), outcome: Err(Failed::Gone) });
        }
    }

    fn take(&self, id: u64) -> Option<Waiter> {
        let mut waiting = self.waiting();
        let waiter = waiting.remove(&id);
        self.load.store(waiting.len(), Ordering::Relaxed);
        self.release(&waiting);
        waiter
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waiter>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A failure in the words of the wire.
pub(super) fn failed(failure: &v1::ExpertFailure) -> Failed {
    match failure.reason() {
        Reason::Busy => Failed::Busy,
        Reason::NotHeld => Failed::NotHeld,
        Reason::Invalid | Reason::Compute | Reason::Unspecified => Failed::Fatal(failure.message.clone()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn one_that_leaves_is_released_when_nothing_is_under_way() {
        let shard = ExpertRange { first: 0, last: 3 };
        let new = || Replica::new("r".into(), shard, shard.experts().collect());
        let (idle, _batches) = new();
        assert!(idle.released().now_or_never().is_none(), "it has not left");
        idle.leave();
        tokio::time::timeout(Duration::from_secs(60), idle.released()).await.expect("nothing is under way");

        let (busy, mut batches) = new();
        let answers = Arc::new(Answers::default());
        busy.send(v1::ExpertBatch::default(), Waiter { part: 3, answers: answers.clone(), left: 2 }).unwrap();
        busy.leave();
        assert!(busy.released().now_or_never().is_none(), "a batch is under way");
        let id = batches.recv().await.unwrap().id;
        let row = || wire::activations::pack(vec![1.0], 1, v1::activations::Encoding::F32);
        busy.outputs(id, 0, row());
        assert!(busy.released().now_or_never().is_none(), "another row is to come");
        busy.outputs(id, 1, row());
        let last: Vec<_> = answers.take().await.iter().map(|answer| answer.outcome.as_ref().map(|piece| piece.last).ok()).collect();
        assert_eq!(last, [Some(false), Some(true)]);
        tokio::time::timeout(Duration::from_secs(60), busy.released()).await.expect("it has been answered");
    }
}
