use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::{error::Error, metrics};

/// Bounds the requests that run, and those that wait to run.
#[derive(Debug)]
pub(crate) struct Gate {
    places: Arc<Semaphore>,
    max_running: usize,
    waiting: AtomicUsize,
    max_waiting: usize,
}

/// A place among the running requests, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place(#[allow(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Drop for Place {
    fn drop(&mut self) {
        metrics::running(-1.0);
    }
}

impl Gate {
    pub(crate) fn new(max_running: usize, max_waiting: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(max_running)), max_running, waiting: AtomicUsize::new(0), max_waiting }
    }

    /// A place now, or after waiting in line until `deadline`. A full line is a refusal at once.
    pub(crate) async fn enter(&self, deadline: Instant) -> Result<Place, Error> {
        if let Ok(permit) = self.places.clone().try_acquire_owned() {
            return Ok(place(permit));
        }
        let _in_line = self.line_up()?;
        match timeout_at(deadline, self.places.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(place(permit)),
            // The semaphore is never closed, so an error is the deadline too.
            Ok(Err(_)) | Err(_) => Err(Error::Deadline),
        }
    }

    fn line_up(&self) -> Result<InLine<'_>, Error> {
        let free = |waiting| (waiting < self.max_waiting).then_some(waiting + 1);
        match self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free) {
            Ok(_) => {
                metrics::waiting(1.0);
                Ok(InLine(&self.waiting))
            }
            Err(waiting) => Err(Error::Overloaded { running: self.max_running, waiting }),
        }
    }
}

fn place(permit: OwnedSemaphorePermit) -> Place {
    metrics::running(1.0);
    Place(permit)
}

/// A place in the line. Dropped when the wait is over, also when the client gives up.
struct InLine<'a>(&'a AtomicUsize);

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
        metrics::waiting(-1.0);
    }
}
