//! What a node knows of each open call, on either side of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use async_nats::Subject;
use tokio::sync::SetOnce;
use tokio::time::Instant;
use tonic::Status;

use super::flow::{Credit, Inbox};
use super::frame::{Frame, Header, Message, NodeId};
use super::node::node_subject;
use crate::call::Running;
use crate::target::Named;

/// The other end of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub node: NodeId,
    /// What was sent before the peer reached this epoch, or after it left it, is lost.
    pub epoch: u32,
}

impl Peer {
    pub(crate) fn of(header: &Header) -> Self {
        Self { node: header.node, epoch: header.epoch }
    }

    /// Where it listens.
    pub(crate) fn subject(&self) -> Subject {
        node_subject(self.node)
    }
}

/// A call that this node has made.
pub(crate) struct ClientCall {
    pub id: u64,
    pub target: Named,
    pub opened: Instant,
    /// The instance that runs the call, as soon as it has said anything.
    pub peer: SetOnce<Peer>,
    pub response: Inbox,
    /// For the body of the request.
    pub credit: Arc<Credit>,
}

impl ClientCall {
    pub(crate) fn receive(&self, message: Message) {
        if self.peer.get().is_none() {
            // Fails when another message was faster.
            let _ = self.peer.set(Peer::of(&message.header));
        }
        for frame in &message.frames {
            match frame {
                Frame::Credit(limit) => self.credit.raise(*limit),
                Frame::Reset(refusal) => self.response.fail(refusal.clone().into()),
                _ => {}
            }
        }
        if message.header.sequence.is_some() {
            // A failure is kept for the reader, and the caller's guard cancels the call.
            let _ = self.response.push(message, false);
        }
    }
}

/// A call that this node runs for another.
pub(crate) struct ServerCall {
    pub id: u64,
    pub peer: Peer,
    pub request: Inbox,
    /// For the body of the response.
    pub credit: Arc<Credit>,
    /// Where the first message of the response goes, until it has gone there.
    pub reply: Mutex<Option<Subject>>,
    /// The caller is gone: nothing is to be sent to it any more.
    pub deserted: AtomicBool,
    pub running: OnceLock<Weak<Running>>,
}

impl ServerCall {
    pub(crate) fn receive(&self, message: Message) {
        for frame in &message.frames {
            match frame {
                Frame::Credit(limit) => self.credit.raise(*limit),
                Frame::Cancel | Frame::Reset(_) => self.desert(Status::cancelled("the caller has cancelled the call")),
                _ => {}
            }
        }
        if message.header.sequence.is_some()
            && let Err(status) = self.request.push(message, false)
        {
            self.end(status);
        }
    }

    /// Drops the handler; the caller is told `status`.
    pub(crate) fn end(&self, status: Status) {
        self.request.fail(status.clone());
        if let Some(running) = self.running.get().and_then(Weak::upgrade) {
            running.end(status);
        }
    }

    /// Drops the handler of a caller that does not listen any more.
    pub(crate) fn desert(&self, status: Status) {
        self.deserted.store(true, Ordering::Release);
        self.end(status);
    }

    pub(crate) fn is_deserted(&self) -> bool {
        self.deserted.load(Ordering::Acquire)
    }
}
