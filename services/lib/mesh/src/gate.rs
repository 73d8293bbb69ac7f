use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::call::{Running, lock};
use crate::routes::Table;

/// One offered target in this process.
pub(crate) struct Instance {
    pub table: Table,
    pub gate: Arc<Gate>,
}

/// Counts the running calls of one served target, bounds them, and ends them on a drain.
pub(crate) struct Gate {
    limit: usize,
    state: Mutex<State>,
    /// How many calls run now.
    running: watch::Sender<usize>,
    withdrawn: CancellationToken,
}

struct State {
    next: u64,
    calls: HashMap<u64, Weak<Running>>,
    /// Once set, no call comes in any more, and this is why.
    closed: Option<Status>,
}

impl Gate {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let state = State { next: 0, calls: HashMap::new(), closed: None };
        Arc::new(Self { limit, state: Mutex::new(state), running: watch::Sender::new(0), withdrawn: CancellationToken::new() })
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
        let id = state.next;
        state.next += 1;
        state.calls.insert(id, Arc::downgrade(call));
        self.running.send_replace(state.calls.len());
        Ok(Permit { gate: self.clone(), id })
    }

    /// Tells the wires that the target is offered here no more. Calls that come nevertheless still run.
    pub(crate) fn withdraw(&self) {
        self.withdrawn.cancel();
    }

    /// Resolves after [`withdraw`](Self::withdraw).
    pub(crate) async fn withdrawn(&self) {
        self.withdrawn.cancelled().await;
    }

    /// Resolves when no call runs; `false` if `grace` passed first.
    pub(crate) async fn idle(&self, grace: Duration) -> bool {
        let mut running = self.running.subscribe();
        let idle = running.wait_for(|running| *running == 0);
        tokio::time::timeout(grace, idle).await.is_ok()
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

/// The place of one running call.
pub(crate) struct Permit {
    gate: Arc<Gate>,
    id: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = lock(&self.gate.state);
        state.calls.remove(&self.id);
        self.gate.running.send_replace(state.calls.len());
    }
}
