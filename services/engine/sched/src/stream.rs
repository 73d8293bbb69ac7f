//! What a job's reader holds, and the other end that the engine writes to.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use domain::{Event, FinishReason};
use futures::{Stream, channel::mpsc};

use crate::{JobError, inbox::Inbox};

/// A reader this many events behind pauses its job; the job goes on when half of them are read.
pub const BUFFERED_EVENTS: usize = 256;
/// A job is paused between steps, and a step yields at most four events (`Prefilled`, `Degraded`, `Output` or `Flow`, `Finished`).
const EVENTS_PER_STEP: usize = 4;

/// The events of one job, in order. Ends after [`Event::Finished`] or an error. Dropping it cancels the job.
#[derive(Debug)]
pub struct JobStream {
    receiver: mpsc::Receiver<Result<Event, JobError>>,
    unread: Arc<AtomicUsize>,
    inbox: Arc<Inbox>,
    ended: bool,
}

/// The engine's end of a [`JobStream`].
#[derive(Debug)]
pub(crate) struct Outlet {
    sender: mpsc::Sender<Result<Event, JobError>>,
    unread: Arc<AtomicUsize>,
    paused: bool,
}

/// Both ends for a new job.
pub(crate) fn channel(inbox: Arc<Inbox>) -> (Outlet, JobStream) {
    let (sender, receiver) = mpsc::channel(BUFFERED_EVENTS + EVENTS_PER_STEP);
    let unread = Arc::new(AtomicUsize::new(0));
    let outlet = Outlet { sender, unread: unread.clone(), paused: false };
    (outlet, JobStream { receiver, unread, inbox, ended: false })
}

impl Outlet {
    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whether the reader is so far behind that the job must wait. The reader rings the engine's bell when that ends.
    pub fn is_paused(&mut self) -> bool {
        let limit = if self.paused { BUFFERED_EVENTS / 2 } else { BUFFERED_EVENTS - 1 };
        self.paused = self.unread.load(Ordering::SeqCst) > limit;
        self.paused
    }

    /// Hand an event over. The channel has room for all that one step yields; a reader that has gone is noticed before the next step.
    pub fn send(&mut self, event: Event) {
        self.put(Ok(event));
    }

    /// The job's last word.
    pub fn finish(mut self, reason: FinishReason) {
        self.put(Ok(Event::Finished(reason)));
    }

    /// The job's last word when it failed.
    pub fn fail(mut self, error: JobError) {
        self.put(Err(error));
    }

    fn put(&mut self, item: Result<Event, JobError>) {
        self.unread.fetch_add(1, Ordering::SeqCst);
        if let Err(error) = self.sender.try_send(item) {
            debug_assert!(error.is_disconnected(), "a paused job was run");
        }
    }
}

impl Stream for JobStream {
    type Item = Result<Event, JobError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let item = match Pin::new(&mut self.receiver).poll_next(cx) {
            Poll::Pending => return Poll::Pending,
            // Only an engine that died lets go of a job without a last word.
            Poll::Ready(None) => Err(JobError::Stopped),
            Poll::Ready(Some(item)) => {
                if self.unread.fetch_sub(1, Ordering::SeqCst) == BUFFERED_EVENTS / 2 + 1 {
                    self.inbox.ring();
                }
                item
            }
        };
        self.ended = !matches!(item, Ok(Event::Prefilled { .. } | Event::Degraded(_) | Event::Output { .. } | Event::Flow { .. }));
        Poll::Ready(Some(item))
    }
}

impl Drop for JobStream {
    fn drop(&mut self) {
        if !self.ended {
            self.receiver.close();
            self.inbox.ring();
        }
    }
}
