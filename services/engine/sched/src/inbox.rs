//! Where callers leave jobs for the engine thread, and the bell that wakes it.

use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use crate::{SubmitError, task::Task};

/// Shared by callers, readers and the engine thread.
#[derive(Debug)]
pub(crate) struct Inbox {
    state: Mutex<State>,
    bell: Condvar,
    queued: Arc<AtomicUsize>,
    queue_limit: usize,
}

#[derive(Debug)]
struct State {
    tasks: Vec<Task>,
    /// Something happened that the engine thread has not looked at.
    rung: bool,
    open: bool,
    /// Order of arrival of the next task.
    next_order: u64,
}

/// A place in the queue, given back when the task is admitted or dropped.
#[derive(Debug)]
pub(crate) struct Ticket(Arc<AtomicUsize>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Inbox {
    pub fn new(queue_limit: usize) -> Self {
        let state = State { tasks: Vec::new(), rung: false, open: true, next_order: 0 };
        Self { state: Mutex::new(state), bell: Condvar::new(), queued: Arc::default(), queue_limit }
    }

    /// A place in the queue, while there is one.
    pub fn ticket(&self) -> Result<Ticket, SubmitError> {
        if !self.is_open() {
            return Err(SubmitError::Stopped);
        }
        let take = |queued| (queued < self.queue_limit).then_some(queued + 1);
        match self.queued.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) {
            Ok(_) => Ok(Ticket(self.queued.clone())),
            Err(_) => Err(SubmitError::QueueFull { limit: self.queue_limit }),
        }
    }

    /// Leave a task for the engine thread.
    pub fn submit(&self, mut task: Task) -> Result<(), SubmitError> {
        let mut state = self.lock();
        if !state.open {
            return Err(SubmitError::Stopped);
        }
        task.order = state.next_order;
        state.next_order += 1;
        state.tasks.push(task);
        drop(state);
        self.bell.notify_one();
        Ok(())
    }

    /// Wake the engine thread: a reader caught up or went away.
    pub fn ring(&self) {
        self.lock().rung = true;
        self.bell.notify_one();
    }

    /// New tasks, oldest first; `None` when the inbox is closed. With `park` the call waits until there is a task or the bell rings.
    pub fn take(&self, park: bool) -> Option<Vec<Task>> {
        let mut state = self.lock();
        while park && state.open && !state.rung && state.tasks.is_empty() {
            state = self.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.rung = false;
        state.open.then(|| std::mem::take(&mut state.tasks))
    }

    /// Take nothing more. Returns what nobody has looked at yet.
    pub fn close(&self) -> Vec<Task> {
        let mut state = self.lock();
        state.open = false;
        let tasks = std::mem::take(&mut state.tasks);
        drop(state);
        self.bell.notify_one();
        tasks
    }

    pub fn is_open(&self) -> bool {
        self.lock().open
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing here panics while it holds the lock; if it ever did, the state would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
