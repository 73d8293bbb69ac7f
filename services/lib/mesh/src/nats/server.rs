//! Running a call that came over NATS.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use async_nats::Subject;
use bytes::Bytes;
use http_body::{Frame as BodyFrame, SizeHint};
use tonic::Status;
use tonic::body::Body;

use super::call::{Peer, ServerCall};
use super::flow::{Credit, Inbox};
use super::frame::{Frame, Kind, Malformed, Message, Refusal};
use super::head;
use super::node::Node;
use super::outgoing::{Filled, Outgoing};
use crate::call::{self, Call, Running, lock};
use crate::gate::Instance;

/// A call without an answer for so long tells its caller who runs it, so that the caller can ask whether that one still lives.
/// Most calls are over before.
const SPEAK_UP_AFTER: Duration = Duration::from_millis(5);
/// Handlers whose first polls take longer are not polled by the task that takes calls for a while.
const QUICK_POLL: Duration = Duration::from_micros(200);
/// How many such polls in a row it takes: a single one may only have been interrupted.
const SLOW_IN_A_ROW: u32 = 3;
/// How many calls that while lasts.
const SLOW_PENALTY: u32 = 0;

/// Starts the calls of one offered target.
pub(crate) struct Starter {
    pub node: Arc<Node>,
    pub instance: Arc<Instance>,
    /// How many calls are started without polling them here first.
    penalty: u32,
    /// Polls in a row that took too long.
    slow: u32,
}

impl Starter {
    pub(crate) fn new(node: Arc<Node>, instance: Arc<Instance>) -> Self {
        Self { node, instance, penalty: 0, slow: 0 }
    }

    /// Starts the call that `message` opens. `more_wait` says that other calls are waiting to be started.
    ///
    /// The handler is polled here once before it gets a task of its own: a quick one is done with that, and saves the wake-up of
    /// another thread. When others wait, or handlers of this target have proved slow, the calls start side by side instead.
    pub(crate) fn start(&mut self, message: async_nats::Message, more_wait: bool) {
        let Some(reply) = message.reply else { return };
        let message = match Message::decode(message.payload) {
            Ok(message) if message.header.kind == Kind::Open => message,
            Ok(_) => return,
            Err(error) => return self.refuse(&reply, error),
        };
        let (call, request) = match self.admit(message, reply.clone()) {
            Ok(admitted) => admitted,
            Err(error) => return self.refuse(&reply, error),
        };
        let running = call::start(&self.instance.table, &self.instance.gate, request);
        // Set nowhere else.
        let _ = call.running.set(Arc::downgrade(&running.handle()));
        let incomplete = !call.request.is_complete();
        let mut run = Box::pin(run(self.node.clone(), call.clone(), running));
        if more_wait || self.penalty > 0 {
            self.penalty = self.penalty.saturating_sub(1);
        } else {
            let begun = Instant::now();
            // Woken by nobody: the task that takes over polls it again first of all.
            let polled = run.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            self.time(begun.elapsed());
            if polled.is_ready() {
                return;
            }
        }
        if incomplete {
            let window = self.node.window(lock(&self.node.run).len());
            call.tell(&self.node, &[Frame::Credit(call.request.allow(window))]);
        }
        tokio::spawn(run);
    }

    /// Learns from how long the first poll of a handler took.
    fn time(&mut self, took: Duration) {
        self.slow = if took > QUICK_POLL { self.slow + 1 } else { 0 };
        if self.slow == SLOW_IN_A_ROW {
            (self.slow, self.penalty) = (0, SLOW_PENALTY);
        }
    }

    /// Puts the call on the node's list and makes an HTTP request of it.
    fn admit(&self, mut message: Message, reply: Subject) -> Result<(Arc<ServerCall>, http::Request<Body>), Malformed> {
        let header = message.header;
        if !matches!(message.frames.first(), Some(Frame::Head(_))) {
            return Err(Malformed("a request begins without a head"));
        }
        let Frame::Head(head) = message.frames.remove(0) else { return Err(Malformed("a request begins without a head")) };
        let request = head::decode_request(head)?;
        let call = Arc::new(ServerCall {
            id: header.call,
            peer: Peer::of(&header),
            request: Inbox::new(0),
            credit: Arc::new(Credit::default()),
            reply: Mutex::new(Some(reply)),
            deserted: AtomicBool::new(false),
            running: OnceLock::new(),
        });
        for frame in &message.frames {
            if let Frame::Credit(limit) = frame {
                call.credit.raise(*limit);
            }
        }
        if call.request.push(message, true).is_err() {
            return Err(Malformed("a request begins in its middle"));
        }
        lock(&self.node.run).insert((header.node, header.call), call.clone());
        let body = Body::new(RequestBody { node: self.node.clone(), call: call.clone(), ended: false });
        Ok((call, request.map(|()| body)))
    }

    fn refuse(&self, reply: &Subject, error: Malformed) {
        tracing::warn!(%error, "a call is refused");
        let refusal = Refusal::from(&Status::from(error));
        self.node.post(reply, self.node.header(Kind::ToClient, 0).message(&[Frame::Reset(refusal)]));
    }
}

impl ServerCall {
    /// Says something about the call to its caller.
    pub(crate) fn tell(&self, node: &Node, frames: &[Frame]) {
        node.post(&self.peer.subject(), node.header(Kind::ToClient, self.id).message(frames));
    }
}

/// Takes the call off the node's list at its end, however that comes.
struct Listed {
    node: Arc<Node>,
    call: Arc<ServerCall>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        lock(&self.node.run).remove(&(self.call.peer.node, self.call.id));
        // The client library of the caller keeps a place for every request until it is answered.
        if let Some(reply) = lock(&self.call.reply).take() {
            let refusal = Refusal::from(&Status::cancelled("the call has ended without an answer"));
            self.node.post(&reply, self.node.header(Kind::ToClient, self.call.id).message(&[Frame::Reset(refusal)]));
        }
    }
}

/// Runs the handler and sends its response.
async fn run(node: Arc<Node>, call: Arc<ServerCall>, handler: Call) {
    let listed = Listed { node, call };
    let running = handler.handle();
    let response = respond(&listed, handler).await;
    let (parts, mut body) = response.into_parts();
    let mut outgoing = Outgoing::new(listed.node.header(Kind::ToClient, listed.call.id), listed.call.credit.clone());
    let limit = listed.node.max_payload();
    if let Err(status) = outgoing.head(limit, |buffer| head::encode_response(buffer, parts.status, &parts.headers)) {
        let (parts, refusal) = status.into_http::<Body>().into_parts();
        body = refusal;
        // A sentence without metadata fits any message.
        let _ = outgoing.head(limit, |buffer| head::encode_response(buffer, parts.status, &parts.headers));
    }
    loop {
        let filled = poll_fn(|cx| fill(cx, &listed, &running, &mut outgoing, &mut body)).await;
        if listed.call.is_deserted() {
            return;
        }
        let subject = lock(&listed.call.reply).take().unwrap_or_else(|| listed.call.peer.subject());
        if let Filled::Failed(status) = &filled {
            outgoing.frame(&Frame::Reset(Refusal::from(status)));
        }
        // Fails only when the connection is closed for good, and then nobody listens.
        if listed.node.client.publish(subject, outgoing.take()).await.is_err() || !matches!(filled, Filled::More) {
            return;
        }
    }
}

async fn respond(listed: &Listed, handler: Call) -> http::Response<Body> {
    let mut handler = pin!(handler);
    // Most are ready at once, and need no clock.
    if let Poll::Ready(response) = poll_fn(|cx| Poll::Ready(handler.as_mut().poll(cx))).await {
        return response;
    }
    tokio::select! {
        biased;
        response = &mut handler => return response,
        () = tokio::time::sleep(SPEAK_UP_AFTER) => {}
    }
    listed.call.tell(&listed.node, &[]);
    handler.await
}

fn fill(cx: &mut Context<'_>, listed: &Listed, running: &Running, outgoing: &mut Outgoing, body: &mut Body) -> Poll<Filled> {
    let filled = outgoing.poll_fill(cx, body, listed.node.max_payload(), |cx| running.poll_over(cx).is_ready());
    if listed.call.is_deserted() { Poll::Ready(Filled::Last) } else { filled }
}

/// The body of a request; the handler consumes it, and that gives the caller credit.
struct RequestBody {
    node: Arc<Node>,
    call: Arc<ServerCall>,
    ended: bool,
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<BodyFrame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let window = self.node.window(lock(&self.node.run).len());
        let (frame, limit) = match ready!(self.call.request.poll_next(cx, window)) {
            Ok(next) => next,
            Err(status) => {
                self.ended = true;
                return Poll::Ready(Some(Err(status)));
            }
        };
        if let Some(limit) = limit {
            self.call.tell(&self.node, &[Frame::Credit(limit)]);
        }
        Poll::Ready(match frame {
            Frame::Data(bytes) => Some(Ok(BodyFrame::data(bytes))),
            Frame::End | Frame::Trailers(_) => {
                self.ended = true;
                None
            }
            _ => Some(Err(Malformed("a request has two heads").into())),
        })
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
