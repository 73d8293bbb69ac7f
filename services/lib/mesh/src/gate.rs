use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::call::{Running, lock};
use crate::routes::Table;
use crate::spread::Spread;

/// One offered target in this process.
pub(crate) struct Instance {
    pub table: Table,
    pub gate: Arc<Gate>,
}

/// Counts the running calls of one served target, bounds them, and ends them on a drain.
pub(crate) struct Gate {
    limit: usize,
    state: Mutex<State>,
    /// Told when the last call or the last visit has ended.
    emptied: Notify,
    withdrawn: CancellationToken,
}

/// What an instance has done so far.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    pub calls: u64,
    /// Calls that ended with a status other than OK.
    pub errors: u64,
    /// The durations of all ended calls.
    pub busy: Duration,
}

struct State {
    calls: HashMap<u64, Weak<Running>, Spread>,
    /// How many connections are used for this target.
    visits: usize,
    counts: Counts,
    /// Once set, no call comes in any more, and this is why.
    closed: Option<Status>,
}

impl State {
    fn is_empty(&self) -> bool {
        self.calls.is_empty() && self.visits == 0
    }
}

impl Gate {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let state = State { calls: HashMap::default(), visits: 0, counts: Counts::default(), closed: None };
        Arc::new(Self { limit, state: Mutex::new(state), emptied: Notify::new(), withdrawn: CancellationToken::new() })
    }

    /// Lets one call in, or says why not: RESOURCE_EXHAUSTED over the limit, UNAVAILABLE after [`close`](Self::close).
    pub(crate) fn enter(self: &Arc<Self>, call: &Arc<Running>) -> Result<Permit, Status> {
        let mut state = lock(&self.state);
        if let Some(status) = &state.closed {
            return Err(status.clone());
        }
        if state.calls.len() >= self.limit {
            return Err(Status::resource_exhausted(format!("{} calls are running already, the limit of this instance", self.limit)));
        }
        let id = state.counts.calls;
        state.counts.calls += 1;
        state.calls.insert(id, Arc::downgrade(call));
        Ok(Permit { gate: self.clone(), id, begun: Instant::now() })
    }

    /// Tells the wires that the target is offered here no more. Calls that come nevertheless still run.
    pub(crate) fn withdraw(&self) {
        self.withdrawn.cancel();
    }

    pub(crate) fn is_withdrawn(&self) -> bool {
        self.withdrawn.is_cancelled()
    }

    pub(crate) fn counts(&self) -> Counts {
        lock(&self.state).counts
    }

    /// Resolves after [`withdraw`](Self::withdraw).
    pub(crate) async fn withdrawn(&self) {
        self.withdrawn.cancelled().await;
    }

    /// Counts a connection over which calls may come until it ends.
    pub(crate) fn visit(self: &Arc<Self>) -> Visit {
        lock(&self.state).visits += 1;
        Visit(self.clone())
    }

    /// Resolves when no call runs and none can come over a connection that is still there.
    pub(crate) async fn idle(&self) {
        loop {
            let emptied = self.emptied.notified();
            if lock(&self.state).is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// Refuses new calls and ends the running ones, all with `status`.
    pub(crate) fn close(&self, status: Status) {
        let calls = {
            let mut state = lock(&self.state);
            state.closed = Some(status.clone());
            state.calls.values().cloned().collect::<Vec<_>>()
        };
        for call in calls.iter().filter_map(Weak::upgrade) {
            call.end(status.clone());
        }
    }
}

/// A connection that brings calls.
pub(crate) struct Visit(Arc<Gate>);

impl Drop for Visit {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.visits -= 1;
        if state.is_empty() {
            self.0.emptied.notify_waiters();
        }
    }
}

/// The place of one running call.
pub(crate) struct Permit {
    gate: Arc<Gate>,
    id: u64,
    begun: Instant,
}

impl Permit {
    /// The call ends with an error.
    pub(crate) fn note_error(&self) {
        lock(&self.gate.state).counts.errors += 1;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = lock(&self.gate.state);
        state.calls.remove(&self.id);
        state.counts.busy += self.begun.elapsed();
        if state.is_empty() {
            self.gate.emptied.notify_waiters();
        }
    }
}
