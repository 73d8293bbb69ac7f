//! Flow control by credit, and the queue between the dispatcher and the reader of a body.
//!
//! The reader of a body says how many bytes it takes in all since the start of the call, and raises that as it consumes. Each
//! piece is charged its length and [`PIECE_CHARGE`], so that a million empty messages are bounded like a few large ones. Limits
//! are absolute: a credit message that is lost or overtaken is made good by the next.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::task::AtomicWaker;
use tonic::Status;

use super::frame::{Frame, Message};
use crate::call::lock;

/// What a piece costs besides its bytes: about what it occupies in a queue.
pub(crate) const PIECE_CHARGE: u64 = 128;
/// Shorter pieces are copied when a reader is behind: a slice keeps alive the read buffer that it lies in, which is far longer.
const COPY_BYTES: usize = 8 << 10;
/// How many frames may wait before a reader counts as behind: a head, a piece and an end are a whole unary call.
const BEHIND_FRAMES: usize = 3;
/// How many messages may overtake the first one, which comes by another way (see `client.rs`).
const EARLY_MESSAGES: usize = 4096;

/// What the sender of a body may still send.
#[derive(Default)]
pub(crate) struct Credit {
    limit: AtomicU64,
    waker: AtomicWaker,
}

impl Credit {
    /// The peer takes `limit` charged bytes in all.
    pub(crate) fn raise(&self, limit: u64) {
        self.limit.fetch_max(limit, Ordering::AcqRel);
        self.waker.wake();
    }

    /// How much is left after `used`; registers for more when that is less than `least`.
    pub(crate) fn poll_left(&self, cx: &mut Context<'_>, used: u64, least: u64) -> Poll<u64> {
        let left = || self.limit.load(Ordering::Acquire).saturating_sub(used);
        if left() >= least {
            return Poll::Ready(left());
        }
        self.waker.register(cx.waker());
        // The credit may have come between the look and the registration.
        if left() >= least { Poll::Ready(left()) } else { Poll::Pending }
    }
}

/// Frames of one call and direction that have arrived and are not read yet.
pub(crate) struct Inbox {
    state: Mutex<State>,
    waker: AtomicWaker,
}

struct State {
    queue: VecDeque<(Frame, u64)>,
    /// Messages that came before the first one.
    early: VecDeque<Message>,
    next: u32,
    /// Charged bytes received, consumed, and allowed.
    received: u64,
    consumed: u64,
    limit: u64,
    /// The last frame is queued (or read): nothing can go wrong any more.
    complete: bool,
    failed: Option<Status>,
}

impl Inbox {
    /// An inbox that takes `limit` charged bytes until it says more.
    pub(crate) fn new(limit: u64) -> Self {
        let state = State {
            queue: VecDeque::new(),
            early: VecDeque::new(),
            next: 0,
            received: 0,
            consumed: 0,
            limit,
            complete: false,
            failed: None,
        };
        Self { state: Mutex::new(state), waker: AtomicWaker::new() }
    }

    /// Queues the content of a numbered message. `free` leaves it uncharged: the first message of a request comes before any credit.
    ///
    /// An error is the end of the call: the peer lost a message or sent more than it may.
    pub(crate) fn push(&self, message: Message, free: bool) -> Result<(), Status> {
        let mut state = lock(&self.state);
        let result = state.push(message, free);
        if let Err(status) = &result {
            state.fail(status.clone());
        }
        drop(state);
        self.waker.wake();
        result
    }

    /// The call cannot go on. What has arrived is still read first; no matter if all of it has.
    pub(crate) fn fail(&self, status: Status) {
        lock(&self.state).fail(status);
        self.waker.wake();
    }

    /// The next frame and, when the reader has consumed enough, the new limit to tell the sender, `window` ahead of it.
    pub(crate) fn poll_next(&self, cx: &mut Context<'_>, window: u64) -> Poll<Result<(Frame, Option<u64>), Status>> {
        if let ready @ Poll::Ready(_) = lock(&self.state).next(window) {
            return ready;
        }
        self.waker.register(cx.waker());
        lock(&self.state).next(window)
    }

    /// Resolves to the reason when the call fails before anything of it could be read.
    pub(crate) fn poll_failed(&self, cx: &mut Context<'_>) -> Poll<Status> {
        self.waker.register(cx.waker());
        match &lock(&self.state).failed {
            Some(status) => Poll::Ready(status.clone()),
            None => Poll::Pending,
        }
    }

    /// Forgets who waits: the reader itself is about to push, and need not be woken for that.
    pub(crate) fn forget_reader(&self) {
        drop(self.waker.take());
    }

    /// Allows `window` charged bytes more than have been consumed; the limit to tell the sender.
    pub(crate) fn allow(&self, window: u64) -> u64 {
        let mut state = lock(&self.state);
        state.limit = state.limit.max(state.consumed + window);
        state.limit
    }

    /// Whether the last frame has arrived.
    pub(crate) fn is_complete(&self) -> bool {
        lock(&self.state).complete
    }
}

impl State {
    fn push(&mut self, message: Message, free: bool) -> Result<(), Status> {
        if self.complete || self.failed.is_some() {
            return Ok(());
        }
        let sequence = message.header.sequence.unwrap_or_default();
        if self.next == 0 && sequence > 0 {
            if self.early.len() == EARLY_MESSAGES {
                return Err(lost());
            }
            self.early.push_back(message);
            return Ok(());
        }
        self.take(message, free)?;
        while let Some(message) = self.early.pop_front() {
            self.take(message, false)?;
        }
        Ok(())
    }

    fn take(&mut self, message: Message, free: bool) -> Result<(), Status> {
        if message.header.sequence != Some(self.next) {
            return Err(lost());
        }
        self.next += 1;
        for frame in message.frames {
            match frame {
                Frame::Data(bytes) => self.data(bytes, free)?,
                Frame::Head(_) => self.queue.push_back((frame, 0)),
                Frame::Trailers(_) | Frame::End => {
                    self.complete = true;
                    self.queue.push_back((frame, 0));
                }
                // Control frames have been acted on by the dispatcher.
                _ => {}
            }
        }
        Ok(())
    }

    fn data(&mut self, bytes: Bytes, free: bool) -> Result<(), Status> {
        let cost = if free { 0 } else { bytes.len() as u64 + PIECE_CHARGE };
        self.received += cost;
        if self.received > self.limit {
            return Err(Status::internal("the peer sent more than flow control allows"));
        }
        let is_behind = self.queue.len() >= BEHIND_FRAMES;
        let bytes = if is_behind && bytes.len() < COPY_BYTES { Bytes::copy_from_slice(&bytes) } else { bytes };
        self.queue.push_back((Frame::Data(bytes), cost));
        Ok(())
    }

    fn fail(&mut self, status: Status) {
        if !self.complete && self.failed.is_none() {
            self.failed = Some(status);
        }
    }

    fn next(&mut self, window: u64) -> Poll<Result<(Frame, Option<u64>), Status>> {
        if let Some((frame, cost)) = self.queue.pop_front() {
            self.consumed += cost;
            return Poll::Ready(Ok((frame, self.more(window))));
        }
        match &self.failed {
            Some(status) => Poll::Ready(Err(status.clone())),
            None => Poll::Pending,
        }
    }

    /// Credit is told in quarters of the window, lest every piece cost a message back.
    fn more(&mut self, window: u64) -> Option<u64> {
        let limit = self.consumed + window;
        if self.complete || limit < self.limit + window / 4 {
            return None;
        }
        self.limit = limit;
        Some(limit)
    }
}

fn lost() -> Status {
    Status::unavailable("a message of the call was lost")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::task::Waker;

    use super::*;
    use crate::nats::frame::{Header, Kind, NodeId};

    const WINDOW: u64 = 4096;

    fn message(sequence: u32, frames: Vec<Frame>) -> Message {
        let node = NodeId::parse("0123456789abcdefghijKL").unwrap();
        Message { header: Header { kind: Kind::ToClient, node, epoch: 0, call: 1, sequence: Some(sequence) }, frames }
    }

    fn data(length: usize) -> Frame {
        Frame::Data(Bytes::from(vec![1; length]))
    }

    fn next(inbox: &Inbox) -> Poll<Result<(Frame, Option<u64>), Status>> {
        inbox.poll_next(&mut Context::from_waker(Waker::noop()), WINDOW).map_err(|status| Status::new(status.code(), status.message()))
    }

    #[test]
    fn a_gap_in_the_numbers_fails_the_call_after_what_came_before() {
        let inbox = Inbox::new(WINDOW);
        inbox.push(message(0, vec![data(1)]), false).unwrap();
        assert!(inbox.push(message(2, vec![data(1)]), false).is_err());
        assert!(matches!(next(&inbox), Poll::Ready(Ok((Frame::Data(_), None)))));
        let Poll::Ready(Err(status)) = next(&inbox) else { panic!("the call has failed") };
        assert_eq!(status.code(), tonic::Code::Unavailable);
    }

    #[test]
    fn messages_that_overtook_the_first_wait_for_it() {
        let inbox = Inbox::new(WINDOW);
        inbox.push(message(1, vec![data(2)]), false).unwrap();
        inbox.push(message(2, vec![Frame::End]), false).unwrap();
        assert!(next(&inbox).is_pending());
        inbox.push(message(0, vec![data(1)]), false).unwrap();
        let mut lengths = Vec::new();
        while let Poll::Ready(Ok((Frame::Data(bytes), _))) = next(&inbox) {
            lengths.push(bytes.len());
        }
        assert_eq!(lengths, [1, 2]);
        assert!(inbox.is_complete());
    }

    #[test]
    fn more_than_the_credit_is_refused_whatever_its_shape() {
        for pieces in [vec![data(WINDOW as usize + 1)], (0..40).map(|_| data(0)).collect()] {
            let inbox = Inbox::new(WINDOW);
            assert!(inbox.push(message(0, pieces), false).is_err());
        }
        let inbox = Inbox::new(WINDOW);
        inbox.push(message(0, vec![data(WINDOW as usize * 4)]), true).unwrap();
    }

    #[test]
    fn consuming_raises_the_limit_in_quarters_of_the_window() {
        let inbox = Inbox::new(WINDOW);
        let piece = WINDOW as usize / 8 - PIECE_CHARGE as usize;
        inbox.push(message(0, (0..8).map(|_| data(piece)).collect()), false).unwrap();
        let told: Vec<_> = (0..8).map(|_| next(&inbox)).map(|frame| matches!(frame, Poll::Ready(Ok((_, Some(_)))))).collect();
        assert_eq!(told, [false, true, false, true, false, true, false, true]);
    }

    #[test]
    fn a_failure_after_the_last_frame_is_no_failure() {
        let inbox = Inbox::new(WINDOW);
        inbox.push(message(0, vec![Frame::End]), false).unwrap();
        inbox.fail(Status::unavailable("too late"));
        assert!(matches!(next(&inbox), Poll::Ready(Ok((Frame::End, None)))));
    }
}
