use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use tonic::Status;
use tonic::body::Body;

use super::flow::{Credit, PIECE_CHARGE};
use super::frame::{FRAME_HEADER_BYTES, Frame, HEADER_BYTES, Header, Kind};
use super::head;

/// Messages of a long stream are this long at most: broker and peers handle other calls between two of them.
const MESSAGE_BYTES: usize = 512 << 10;
/// A piece is not cut shorter than this for want of credit: more is under way.
const LEAST_PIECE_BYTES: usize = 16 << 10;
/// What a message without data usually takes.
const FIRST_BYTES: usize = 224;
/// Room kept for a frame without content behind a piece.
const RESERVE_BYTES: usize = FRAME_HEADER_BYTES;

/// One direction of a call on its way out: frames are gathered into messages, as many as are ready and fit.
pub(crate) struct Outgoing {
    header: Header,
    credit: Arc<Credit>,
    /// Charged bytes sent so far.
    used: u64,
    /// The message being gathered; empty or starting with a header.
    buffer: BytesMut,
    /// What is left of the piece of body that did not fit.
    rest: Bytes,
    /// Trailers that did not fit behind the last piece.
    end: Option<Bytes>,
}

/// Why a message is handed over for sending.
#[derive(Debug)]
pub(crate) enum Filled {
    /// It is full, or nothing more is ready.
    More,
    /// The body has ended.
    Last,
    /// The body has failed, nothing of it is to be sent any more.
    Failed(Status),
}

impl Outgoing {
    /// The direction that `header` begins; its messages are numbered from 0.
    pub(crate) fn new(header: Header, credit: Arc<Credit>) -> Self {
        let header = Header { sequence: Some(0), ..header };
        Self { header, credit, used: 0, buffer: BytesMut::new(), rest: Bytes::new(), end: None }
    }

    /// Adds the head that `write` writes, or says that a message of `limit` bytes cannot hold it.
    pub(crate) fn head(&mut self, limit: usize, write: impl FnOnce(&mut BytesMut)) -> Result<(), Status> {
        self.begin();
        let before = self.buffer.len();
        Frame::encode_head(&mut self.buffer, write);
        // Behind the head there may be a credit and an end.
        if self.buffer.len() + 2 * FRAME_HEADER_BYTES + 8 > limit {
            let bytes = self.buffer.len() - before;
            self.buffer.clear();
            return Err(Status::resource_exhausted(format!("metadata of {bytes} bytes does not fit a message of {limit} bytes")));
        }
        Ok(())
    }

    pub(crate) fn frame(&mut self, frame: &Frame) {
        self.begin();
        frame.encode(&mut self.buffer);
    }

    fn begin(&mut self) {
        if self.buffer.is_empty() {
            self.buffer.reserve(FIRST_BYTES);
            self.header.encode(&mut self.buffer);
        }
    }

    /// The gathered message; the next one gets the next number.
    pub(crate) fn take(&mut self) -> Bytes {
        self.header.sequence = self.header.sequence.map(|number| number.wrapping_add(1));
        if self.header.kind == Kind::Open {
            self.header.kind = Kind::ToServer;
        }
        self.buffer.split().freeze()
    }

    /// Gathers frames of `body` until a message of at most `limit` bytes should be sent: at once when something was gathered before.
    ///
    /// `over` says that the body has been cut off: what is left of a piece is then dropped instead of waiting for credit.
    pub(crate) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut Body,
        limit: usize,
        over: impl Fn(&mut Context<'_>) -> bool,
    ) -> Poll<Filled> {
        let limit = if self.header.sequence == Some(0) { limit } else { limit.min(MESSAGE_BYTES) };
        if let Some(end) = self.end.take() {
            self.frame(&Frame::Trailers(end));
            return Poll::Ready(Filled::Last);
        }
        loop {
            if !self.rest.is_empty() && over(cx) {
                self.rest.clear();
            }
            if !self.rest.is_empty() {
                match self.poll_piece(cx, limit) {
                    Poll::Ready(true) => continue,
                    Poll::Ready(false) => return Poll::Ready(Filled::More),
                    Poll::Pending => return self.pause(),
                }
            }
            let frame = match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Pending => return self.pause(),
                Poll::Ready(Some(Err(status))) => return Poll::Ready(Filled::Failed(status)),
                Poll::Ready(None) => {
                    self.frame(&Frame::End);
                    return Poll::Ready(Filled::Last);
                }
                Poll::Ready(Some(Ok(frame))) => frame,
            };
            match frame.into_data() {
                Ok(data) => self.rest = data,
                Err(frame) => return Poll::Ready(self.trailers(&frame.into_trailers().unwrap_or_default(), limit)),
            }
        }
    }

    /// Moves as much of the rest into the message as fits; `false` if the message is full.
    fn poll_piece(&mut self, cx: &mut Context<'_>, limit: usize) -> Poll<bool> {
        let taken = self.buffer.len().max(HEADER_BYTES) + FRAME_HEADER_BYTES + RESERVE_BYTES;
        let mut length = self.rest.len().min(limit.saturating_sub(taken));
        let cut = length < self.rest.len();
        if length == 0 || (cut && !self.buffer.is_empty() && length < LEAST_PIECE_BYTES) {
            return Poll::Ready(false);
        }
        // The first message of a request cannot wait for credit: nobody is there yet who could give it.
        if self.header.kind != Kind::Open {
            let least = length.min(LEAST_PIECE_BYTES) as u64 + PIECE_CHARGE;
            let left = ready!(self.credit.poll_left(cx, self.used, least)) - PIECE_CHARGE;
            length = length.min(usize::try_from(left).unwrap_or(usize::MAX));
            self.used += length as u64 + PIECE_CHARGE;
        }
        let piece = self.rest.split_to(length);
        self.buffer.reserve(HEADER_BYTES + FRAME_HEADER_BYTES + RESERVE_BYTES + length);
        self.frame(&Frame::Data(piece));
        Poll::Ready(true)
    }

    /// Nothing more is ready: sends what there is, if there is anything.
    fn pause(&self) -> Poll<Filled> {
        if self.buffer.is_empty() { Poll::Pending } else { Poll::Ready(Filled::More) }
    }

    fn trailers(&mut self, trailers: &http::HeaderMap, limit: usize) -> Filled {
        let mut bytes = head::encode_trailers(trailers);
        if HEADER_BYTES + FRAME_HEADER_BYTES + bytes.len() > limit {
            let short = Status::resource_exhausted(format!("trailers of {} bytes do not fit a message of {limit} bytes", bytes.len()));
            bytes = head::encode_trailers(&crate::call::trailers(&short));
        }
        if self.buffer.len() + FRAME_HEADER_BYTES + bytes.len() > limit {
            self.end = Some(bytes);
            return Filled::More;
        }
        self.frame(&Frame::Trailers(bytes));
        Filled::Last
    }
}
