//! The server side of every wire: one running call, from its request to its last trailer.
//!
//! What a handler holds (its future, later its response stream) sits in a slot that three parties reach: the wire that polls it,
//! the deadline, and a drain that ran out of patience. The last two can take the handler out and drop it at a moment when nobody
//! polls, as when the reader of a stream has stalled and flow control keeps the wire from asking for more.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use http_body::{Body as _, Frame, SizeHint};
use tokio::task::{AbortHandle, coop};
use tokio::time::Instant;
use tonic::body::Body;
use tonic::{Code, Status};
use tracing::Span;

use crate::deadline;
use crate::gate::{Gate, Permit};
use crate::routes::{Table, split_path};

/// Starts a call on the server that its path names. The handler has not been polled yet.
///
/// Refusals (unknown service, malformed deadline, too many calls, drain) are answers like any other: calls without a handler.
pub(crate) fn start(table: &Table, gate: &Arc<Gate>, request: http::Request<Body>) -> Call {
    match begin(table, gate, request) {
        Ok(call) => call,
        Err(status) => Call::over(status),
    }
}

fn begin(table: &Table, gate: &Arc<Gate>, request: http::Request<Body>) -> Result<Call, Status> {
    let path = request.uri().path();
    let Some((server, service, method)) = table.find(path) else {
        let service = split_path(path).map_or(path, |(service, _)| service);
        return Err(Status::unimplemented(format!("service `{service}` is not offered here")));
    };
    let deadline = deadline::deadline(request.headers())?;
    let span = telemetry::server_span(request.headers(), service, method);
    let running = Arc::new(Running {
        work: Mutex::new(Work::Gone),
        over: OnceLock::new(),
        waker: AtomicWaker::new(),
        watchdog: Mutex::new(None),
        permit: Mutex::new(None),
        span,
    });
    *lock(&running.permit) = Some(gate.enter(&running)?);
    *lock(&running.work) = Work::Head(running.span.in_scope(|| server.call(request)));
    if let Some(deadline) = deadline {
        *lock(&running.watchdog) = Some(running.watch(deadline));
    }
    Ok(Call(running))
}

/// A call as its wire sees it: a future of the response. Dropping it (or the body of its response) drops the handler.
pub(crate) struct Call(Arc<Running>);

impl Call {
    /// A call that was refused: its response is `status`.
    fn over(status: Status) -> Self {
        Self(Arc::new(Running {
            work: Mutex::new(Work::Gone),
            over: OnceLock::from(status),
            waker: AtomicWaker::new(),
            watchdog: Mutex::new(None),
            permit: Mutex::new(None),
            span: Span::none(),
        }))
    }

    /// Access to the call from outside, whether it is being polled or not.
    pub(crate) fn handle(&self) -> Arc<Running> {
        self.0.clone()
    }
}

impl Future for Call {
    type Output = http::Response<Body>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_head(cx)
    }
}

/// What a running call consists of.
pub(crate) struct Running {
    work: Mutex<Work>,
    /// Set once when the call is ended from outside, before its handler is dropped.
    over: OnceLock<Status>,
    /// Whoever polls the call now.
    waker: AtomicWaker,
    watchdog: Mutex<Option<AbortHandle>>,
    permit: Mutex<Option<Permit>>,
    span: Span,
}

enum Work {
    Head(BoxFuture<'static, http::Response<Body>>),
    Body(Body),
    Gone,
}

impl Running {
    /// Resolves when the call was ended from outside.
    pub(crate) fn poll_over(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.waker.register(cx.waker());
        if self.over.get().is_some() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Ends the call with `status`: the handler is dropped now, or at the end of the poll that it is in.
    pub(crate) fn end(&self, status: Status) {
        if self.over.set(status).is_err() {
            return;
        }
        match self.work.try_lock() {
            Ok(work) => self.retire(work),
            Err(TryLockError::Poisoned(work)) => self.retire(work.into_inner()),
            // The poll under way looks at `over` when it is done.
            Err(TryLockError::WouldBlock) => {}
        }
        self.waker.wake();
    }

    fn poll_head(self: &Arc<Self>, cx: &mut Context<'_>) -> Poll<http::Response<Body>> {
        let polled = self.poll_work(cx, |work, cx| match work {
            Work::Head(future) => future.as_mut().poll(cx).map(Some),
            // Polled again after it was ready: there is nothing to give.
            Work::Body(_) | Work::Gone => Poll::Ready(None),
        });
        let response = match polled {
            Polled::Pending => return Poll::Pending,
            Polled::Over(status) => return Poll::Ready(status.into_http()),
            Polled::Ready(None) => return Poll::Ready(Status::internal("the call was polled after its end").into_http()),
            Polled::Ready(Some(response)) => response,
        };
        let (parts, body) = response.into_parts();
        if body.is_end_stream() {
            self.record(&parts.headers);
            self.retire(lock(&self.work));
            return Poll::Ready(http::Response::from_parts(parts, body));
        }
        *lock(&self.work) = Work::Body(body);
        Poll::Ready(http::Response::from_parts(parts, Body::new(CallBody { running: self.clone(), ended: false })))
    }

    fn poll_body(&self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        let polled = self.poll_work(cx, |work, cx| match work {
            Work::Body(body) => Pin::new(body).poll_frame(cx),
            Work::Head(_) | Work::Gone => Poll::Ready(None),
        });
        let status = match polled {
            Polled::Pending => return Poll::Pending,
            Polled::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.record(trailers);
                    self.retire(lock(&self.work));
                }
                return Poll::Ready(Some(frame));
            }
            Polled::Ready(None) => {
                self.retire(lock(&self.work));
                return Poll::Ready(None);
            }
            Polled::Ready(Some(Err(status))) => {
                self.retire(lock(&self.work));
                status
            }
            Polled::Over(status) => status,
        };
        let trailers = trailers(&status);
        self.record(&trailers);
        Poll::Ready(Some(Frame::trailers(trailers)))
    }

    /// Polls what the handler left, inside its span and shielded from its panics.
    fn poll_work<T>(&self, cx: &mut Context<'_>, poll: impl FnOnce(&mut Work, &mut Context<'_>) -> Poll<T>) -> Polled<T> {
        // Calls that are always ready, as in-process ones may be, must not keep their task running for ever.
        match coop::poll_proceed(cx) {
            Poll::Ready(budget) => budget.made_progress(),
            Poll::Pending => return Polled::Pending,
        }
        self.waker.register(cx.waker());
        let mut work = lock(&self.work);
        if self.over.get().is_none() {
            let entered = self.span.enter();
            // A handler that panicked is dropped below and never polled again, so nobody sees it half-way.
            let polled = std::panic::catch_unwind(AssertUnwindSafe(|| poll(&mut work, cx)));
            drop(entered);
            if polled.is_err() {
                // Fails only if the call was ended in the meantime, and then that is the reason to give.
                let _ = self.over.set(Status::internal("the handler panicked"));
            }
            if self.over.get().is_none() {
                match polled {
                    Ok(Poll::Ready(value)) => return Polled::Ready(value),
                    Ok(Poll::Pending) | Err(_) => return Polled::Pending,
                }
            }
        }
        self.retire(work);
        let status = self.over.get().cloned().unwrap_or_else(|| Status::internal("the call ended without a reason"));
        Polled::Over(status)
    }

    /// Drops the handler and everything that waits for it, outside of the lock: a destructor may do anything.
    fn retire(&self, mut work: MutexGuard<'_, Work>) {
        let gone = std::mem::replace(&mut *work, Work::Gone);
        drop(work);
        self.span.in_scope(|| drop(gone));
        if let Some(watchdog) = lock(&self.watchdog).take() {
            watchdog.abort();
        }
        drop(lock(&self.permit).take());
    }

    fn watch(self: &Arc<Self>, deadline: Instant) -> AbortHandle {
        let running = Arc::downgrade(self);
        let watchdog = async move {
            tokio::time::sleep_until(deadline).await;
            if let Some(running) = running.upgrade() {
                running.end(deadline::exceeded());
            }
        };
        tokio::spawn(watchdog).abort_handle()
    }

    /// Notes how the call ended, by the headers that say so.
    fn record(&self, headers: &http::HeaderMap) {
        if headers.get(Status::GRPC_STATUS).is_none_or(|code| code != "0")
            && let Some(permit) = &*lock(&self.permit)
        {
            permit.note_error();
        }
        if self.span.is_disabled() {
            return;
        }
        let status = Status::from_header_map(headers);
        let (code, message) = status.as_ref().map_or((Code::Unknown, "no grpc-status"), |status| (status.code(), status.message()));
        telemetry::record_status(&self.span, code.into(), message);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.retire(lock(&self.work));
    }
}

enum Polled<T> {
    Pending,
    Ready(T),
    Over(Status),
}

/// The response body of a call.
struct CallBody {
    running: Arc<Running>,
    ended: bool,
}

impl http_body::Body for CallBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let polled = self.running.poll_body(cx);
        if let Poll::Ready(frame) = &polled {
            self.ended = frame.as_ref().is_none_or(Frame::is_trailers);
        }
        polled.map(|frame| frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// `status` as the trailers that end a response.
pub(crate) fn trailers(status: &Status) -> http::HeaderMap {
    let mut trailers = http::HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        // Some part of the status is no legal header: the code alone always is.
        trailers.clear();
        trailers.insert(Status::GRPC_STATUS, http::HeaderValue::from(i32::from(status.code())));
    }
    trailers
}

/// A lock that a panic elsewhere does not take away: what it guards is replaced as a whole, never left half-way.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
