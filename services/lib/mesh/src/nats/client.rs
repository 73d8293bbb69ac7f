//! Making a call over NATS.
//!
//! The first message is a NATS request to the target's subject, so the broker picks an instance and says at once when there is
//! none; or to the subject of the one instance that the call is for. The first message of the response is its reply; a unary call is over with that. Everything else goes between the two
//! nodes' own subjects and may therefore overtake the reply, which is why calls number their messages.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use async_nats::client::RequestError;
use async_nats::{Request, Subject};
use bytes::Bytes;
use http_body::{Frame as BodyFrame, SizeHint};
use tokio::sync::SetOnce;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;

use super::call::ClientCall;
use super::flow::{Credit, Inbox};
use super::frame::{Frame, Header, Kind, Malformed, Message};
use super::head;
use super::node::{Node, nobody_listens};
use super::offer::{everyone_subject, one_subject};
use super::outgoing::{Filled, Outgoing};
use crate::call::lock;
use crate::local::nobody;
use crate::target::{InstanceName, Named};

/// Calls any instance of `target`, or only the one that is named.
pub(crate) async fn call(
    node: &Arc<Node>,
    target: &Named,
    instance: Option<&InstanceName>,
    request: http::Request<Body>,
) -> Result<http::Response<Body>, Status> {
    node.up().await?;
    let (parts, mut body) = request.into_parts();
    let mut open = OpenCall::new(node, target, instance);
    let call = open.call.clone();
    let mut outgoing = Outgoing::new(node.header(Kind::Open, call.id), call.credit.clone());
    outgoing.head(node.max_payload(), |buffer| head::encode_request(buffer, parts.uri.path(), &parts.headers))?;
    outgoing.frame(&Frame::Credit(open.window));
    // Ready at once: there is a head to send.
    let filled = poll_fn(|cx| outgoing.poll_fill(cx, &mut body, node.max_payload(), |_| false)).await;
    let first = outgoing.take();
    match filled {
        Filled::Last => {}
        Filled::More => open.send_rest(outgoing, body),
        Filled::Failed(status) => return Err(status),
    }
    open.sent = true;
    let request = Request::new().payload(first).timeout(None);
    let reply = tokio::select! {
        reply = node.client.send_request(open.subject.clone(), request) => reply,
        status = poll_fn(|cx| call.response.poll_failed(cx)) => return Err(status),
    };
    open.take_reply(reply, instance)?;
    let (head, _) = poll_fn(|cx| call.response.poll_next(cx, open.window)).await?;
    let Frame::Head(head) = head else {
        return Err(Malformed("a response begins without a head").into());
    };
    Ok(head::decode_response(head)?.map(|()| Body::new(ResponseBody { open })))
}

/// A call that has not ended. Dropping it takes it off the node's list and cancels what is left of it.
struct OpenCall {
    node: Arc<Node>,
    call: Arc<ClientCall>,
    subject: Subject,
    window: u64,
    /// Whether any instance may know of the call.
    sent: bool,
    sending: Option<AbortHandle>,
}

impl OpenCall {
    fn new(node: &Arc<Node>, target: &Named, instance: Option<&InstanceName>) -> Self {
        let subject = instance.map_or_else(|| Subject::from(&*target.subject), |instance| one_subject(target, instance));
        let mut made = lock(&node.made);
        let window = node.window(made.len() + 1);
        let call = Arc::new(ClientCall {
            id: node.next_call(),
            target: target.clone(),
            opened: Instant::now(),
            peer: SetOnce::new(),
            response: Inbox::new(window),
            credit: Arc::new(Credit::default()),
        });
        made.insert(call.id, call.clone());
        drop(made);
        Self { node: node.clone(), call, subject, window, sent: false, sending: None }
    }

    /// Sends the rest of the request from a task of its own, as soon as it is known to whom.
    fn send_rest(&mut self, mut outgoing: Outgoing, mut body: Body) {
        let (node, call) = (self.node.clone(), self.call.clone());
        let send = async move {
            let subject = call.peer.wait().await.subject();
            loop {
                let filled = poll_fn(|cx| outgoing.poll_fill(cx, &mut body, node.max_payload(), |_| false)).await;
                if let Filled::Failed(status) = filled {
                    return call.response.fail(status);
                }
                if let Err(error) = node.client.publish(subject.clone(), outgoing.take()).await {
                    return call.response.fail(Status::unavailable(format!("the request cannot be sent: {error}")));
                }
                if let Filled::Last = filled {
                    return;
                }
            }
        };
        self.sending = Some(tokio::spawn(send).abort_handle());
    }

    fn take_reply(&self, reply: Result<async_nats::Message, RequestError>, instance: Option<&InstanceName>) -> Result<(), Status> {
        match reply {
            Ok(reply) => {
                self.call.response.forget_reader();
                self.call.receive(Message::decode(reply.payload)?);
                Ok(())
            }
            Err(error) if nobody_listens(&error) => Err(nobody(&self.call.target.target, instance)),
            Err(error) => Err(Status::unavailable(format!("the request cannot be sent: {error}"))),
        }
    }

    /// Says something about the call to the instance that runs it, or to all of the target's while that one is not known.
    fn tell(&self, frame: Frame) {
        let header: Header = self.node.header(Kind::ToServer, self.call.id);
        let message = header.message(&[frame]);
        match self.call.peer.get() {
            Some(peer) => self.node.post(&peer.subject(), message),
            None => self.node.post(&everyone_subject(&self.call.target), message),
        }
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        lock(&self.node.made).remove(&self.call.id);
        if let Some(sending) = self.sending.take() {
            sending.abort();
        }
        if self.sent && !self.call.response.is_complete() {
            self.tell(Frame::Cancel);
        }
    }
}

/// The body of a response; dropping it before its end cancels the call.
struct ResponseBody {
    open: OpenCall,
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<BodyFrame<Bytes>, Status>>> {
        let open = &self.open;
        let (frame, limit) = match ready!(open.call.response.poll_next(cx, open.window)) {
            Ok(next) => next,
            Err(status) => return Poll::Ready(Some(Err(status))),
        };
        if let Some(limit) = limit {
            open.tell(Frame::Credit(limit));
        }
        Poll::Ready(match frame {
            Frame::Data(bytes) => Some(Ok(BodyFrame::data(bytes))),
            Frame::Trailers(bytes) => Some(head::decode_trailers(bytes).map(BodyFrame::trailers).map_err(Status::from)),
            Frame::End => None,
            _ => Some(Err(Malformed("a response has two heads").into())),
        })
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
