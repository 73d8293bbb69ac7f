//! One call on an HTTP/2 connection.
//!
//! HTTP/2 cancels a call when both of its halves are dropped. The receiving half is the response's body; the sending half sits in
//! a task that is aborted with it.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http_body::{Body as _, Frame, SizeHint};
use tokio::task::AbortHandle;
use tonic::Status;
use tonic::body::Body;

use super::line::OnLine;

/// Sends `body` and waits for the response.
pub(super) async fn exchange(
    answer: ResponseFuture,
    stream: SendStream<Bytes>,
    body: Body,
    on: OnLine,
) -> Result<http::Response<Body>, Status> {
    let failure = Arc::new(OnceLock::new());
    let mut upload = Upload { stream, body, rest: Bytes::new(), failure: failure.clone() };
    // A unary request is sent with that, and needs no task.
    let sent = poll_fn(|cx| Poll::Ready(Pin::new(&mut upload).poll(cx).is_ready())).await;
    let sending = if sent { None } else { Some(Sending(tokio::spawn(upload).abort_handle())) };
    let answered = answer.await;
    if let Some(status) = failure.get() {
        return Err(status.clone());
    }
    match answered {
        Ok(response) => {
            Ok(response.map(|stream| Body::new(Answer(Some(Open { stream, trailers: false, failure, on, _sending: sending })))))
        }
        Err(error) => Err(on.broken(&error)),
    }
}

/// The task that sends the rest of a request.
struct Sending(AbortHandle);

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The request's body on its way out, as fast as the other side takes it.
struct Upload {
    stream: SendStream<Bytes>,
    body: Body,
    /// What is left of the last piece.
    rest: Bytes,
    /// The body's own failure: HTTP/2 would tell the caller only that the call was reset.
    failure: Arc<OnceLock<Status>>,
}

impl Future for Upload {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        loop {
            while !this.rest.is_empty() {
                if !ready!(this.poll_send(cx)) {
                    return Poll::Ready(());
                }
            }
            let frame = match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(frame) => frame,
                // The other side may have ended the call without waiting for the rest.
                Poll::Pending => return this.stream.poll_reset(cx).map(|_| ()),
            };
            // Sending fails only when the call has ended, and then its reader knows why.
            let sent = match frame {
                None => this.stream.send_data(Bytes::new(), true),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        this.rest = data;
                        continue;
                    }
                    Err(frame) => this.stream.send_trailers(frame.into_trailers().unwrap_or_default()),
                },
                Some(Err(status)) => {
                    // Set nowhere else.
                    let _ = this.failure.set(status);
                    this.stream.send_reset(Reason::CANCEL);
                    Ok(())
                }
            };
            drop(sent);
            return Poll::Ready(());
        }
    }
}

impl Upload {
    /// Sends as much of the rest as the other side takes now; `false` if the call has ended.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        self.stream.reserve_capacity(self.rest.len());
        while self.stream.capacity() == 0 {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(false),
            }
        }
        let length = self.rest.len().min(self.stream.capacity());
        let piece = self.rest.split_to(length);
        Poll::Ready(self.stream.send_data(piece, false).is_ok())
    }
}

/// A response's body. At its end it lets go of the connection, which may be waiting for that to close.
struct Answer(Option<Open>);

struct Open {
    stream: RecvStream,
    /// The data has ended, trailers are next.
    trailers: bool,
    failure: Arc<OnceLock<Status>>,
    on: OnLine,
    _sending: Option<Sending>,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(open) = &mut self.0 else { return Poll::Ready(None) };
        let frame = ready!(open.poll_frame(cx));
        if !matches!(&frame, Some(Ok(frame)) if frame.is_data()) {
            self.0 = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|open| open.stream.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Open {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.trailers {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // The other side may send as much again. Fails only when it has reset the call, which is noticed next.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(self.broken(&error)))),
                None => self.trailers = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
            Err(error) => Poll::Ready(Some(Err(self.broken(&error)))),
        }
    }

    fn broken(&self, error: &h2::Error) -> Status {
        self.failure.get().cloned().unwrap_or_else(|| self.on.broken(error))
    }
}
