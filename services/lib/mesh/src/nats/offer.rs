//! Offering a target on NATS: the subscriptions that bring its calls, and giving them up without losing one.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Request, Subject, Subscriber};
use bytes::{Buf as _, Bytes};
use futures::{FutureExt as _, StreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::sync::SetOnce;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::frame::{Frame, Kind, Message};
use super::micro::{self, Card};
use super::node::Node;
use super::server::Starter;
use crate::call::lock;
use crate::error::MeshError;
use crate::gate::Instance;
use crate::target::Named;

/// The queue group that all instances of a target form.
pub(crate) const QUEUE: &str = "janua";
/// How long those who look for an instance wait for an answer: instances that are leaving give none.
const LOCATE_LIMIT: Duration = Duration::from_millis(500);
/// How long they wait for further answers after one.
const LOCATE_MOMENT: Duration = Duration::from_millis(30);
/// How many calls may be on their way to an instance that withdraws, see [`leave`].
const LEAVE_AFTER: u64 = 256;
/// How long an instance that withdraws goes on pushing itself out of the queue group.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// The pause between two volleys of messages to that end.
const LEAVE_PAUSE: Duration = Duration::from_millis(2);

/// Where all instances of a target listen, each for itself.
pub(crate) fn everyone_subject(target: &Named) -> Subject {
    Subject::from(format!("janua-all.{}", target.name))
}

/// What an instance says of itself to those who look for one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Located {
    /// Unlike the node's, one name for each offer.
    pub instance: String,
    /// Where it takes HTTP/2 connections, if it does.
    pub address: Option<SocketAddr>,
}

/// All instances of `target` that take calls, as far as they answer within a moment of the first.
pub(crate) async fn locate(node: &Node, target: &Named) -> HashSet<Located> {
    let mut located = HashSet::new();
    let inbox = Subject::from(node.client.new_inbox());
    let Ok(mut answers) = node.client.subscribe(inbox.clone()).await else { return located };
    let question = node.header(Kind::Locate, 0).message(&[]);
    if node.client.publish_with_reply(everyone_subject(target), inbox, question).await.is_err() {
        return located;
    }
    let mut end = Instant::now() + LOCATE_LIMIT;
    while let Ok(Some(answer)) = tokio::time::timeout_at(end, answers.next()).await {
        // Nobody listens on the subject.
        if answer.status.is_some() {
            break;
        }
        let Ok(message) = Message::decode(answer.payload) else { continue };
        for frame in message.frames {
            if let Frame::Instance(json) = frame
                && let Ok(instance) = serde_json::from_slice(&json)
            {
                located.insert(instance);
            }
        }
        end = end.min(Instant::now() + LOCATE_MOMENT);
    }
    located
}

/// Whether any instance of `target` takes calls.
pub(crate) async fn is_served(node: &Node, target: &Named) -> bool {
    let question = Request::new().payload(node.header(Kind::Locate, 0).message(&[])).timeout(Some(LOCATE_LIMIT));
    node.client.send_request(everyone_subject(target), question).await.is_ok()
}

impl Located {
    /// A new instance of this process.
    pub(crate) fn new(node: &Node, address: Option<SocketAddr>) -> Self {
        // The last token of an inbox is unique.
        Self { instance: node.client.new_inbox().rsplit('.').next().unwrap_or_default().to_owned(), address }
    }
}

/// A target offered on NATS; dropping it takes the offer back at once.
pub(crate) struct Offer {
    instance: Arc<Instance>,
    left: Arc<SetOnce<()>>,
    _tasks: JoinSet<()>,
}

impl Offer {
    pub(crate) async fn start(node: &Arc<Node>, target: &Named, instance: &Arc<Instance>, located: Located) -> Result<Self, MeshError> {
        let subject = Subject::from(&*target.subject);
        let everyone = node.subscribe(everyone_subject(target), None).await?;
        let opens = node.subscribe(subject.clone(), Some(QUEUE)).await?;
        let mut tasks = JoinSet::new();
        let card = Arc::new(Card::new(target, &located, instance.clone()));
        micro::announce(node, card, &mut tasks).await?;
        let left = Arc::new(SetOnce::new());
        let starter = Starter::new(node.clone(), instance.clone());
        let desk = Desk { starter, subject, opens, everyone, located, taken: 0, left: left.clone() };
        tasks.spawn(desk.run());
        node.settle().await?;
        Ok(Self { instance: instance.clone(), left, _tasks: tasks })
    }

    /// Resolves when no new call can reach this instance any more, having been told so by `Gate::withdraw`.
    pub(crate) async fn left(&self) {
        debug_assert!(self.instance.gate.is_withdrawn());
        self.left.wait().await;
    }
}

/// Takes what comes for one offered target.
struct Desk {
    starter: Starter,
    subject: Subject,
    opens: Subscriber,
    everyone: Subscriber,
    located: Located,
    /// How many messages have come out of `opens`.
    taken: u64,
    left: Arc<SetOnce<()>>,
}

impl Desk {
    async fn run(mut self) {
        let gate = self.starter.instance.gate.clone();
        let mut withdrawn = std::pin::pin!(gate.withdrawn());
        let (mut is_open, mut is_leaving) = (true, false);
        let mut leaving = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                open = self.opens.next(), if is_open => match open {
                    Some(open) => self.take(open),
                    None => {
                        is_open = false;
                        leaving.abort_all();
                        // Set nowhere else.
                        let _ = self.left.set(());
                    }
                },
                message = self.everyone.next() => match message {
                    Some(message) => {
                        // What was sent before a question is dealt with before the answer.
                        while let Some(Some(open)) = self.opens.next().now_or_never() {
                            self.take(open);
                        }
                        self.answer(message);
                    }
                    None => return,
                },
                () = &mut withdrawn, if !is_leaving => {
                    is_leaving = true;
                    // Fails only when the connection is closed for good; the subscription ends with it.
                    let _ = self.opens.unsubscribe_after(self.taken + LEAVE_AFTER).await;
                    leaving.spawn(leave(self.starter.node.clone(), self.subject.clone()));
                }
            }
        }
    }

    /// Starts the call that `open` brings, and those that wait behind it.
    fn take(&mut self, open: async_nats::Message) {
        let mut upcoming = Some(open);
        while let Some(open) = upcoming {
            self.taken += 1;
            upcoming = self.opens.next().now_or_never().flatten();
            self.starter.start(open, upcoming.is_some());
        }
    }

    /// Answers what was asked of all instances.
    fn answer(&self, message: async_nats::Message) {
        let node = &self.starter.node;
        let reply = message.reply;
        let message = match Message::decode(message.payload) {
            Ok(message) => message,
            Err(error) => return tracing::warn!(%error, "a message is ignored"),
        };
        let header = message.header;
        match (header.kind, reply) {
            (Kind::Who, Some(reply)) => {
                for id in message.frames.iter().filter_map(ids).flatten() {
                    if let Some(call) = lock(&node.run).get(&(header.node, id)) {
                        call.tell(node, &[]);
                    }
                }
                node.post(&reply, node.header(Kind::Who, 0).message(&[]));
            }
            (Kind::Locate, Some(reply)) if !self.starter.instance.gate.is_withdrawn() => {
                let located = Bytes::from(serde_json::to_vec(&self.located).unwrap_or_default());
                node.post(&reply, node.header(Kind::Locate, 0).message(&[Frame::Instance(located)]));
            }
            // A caller that does not know yet which instance has its call.
            (Kind::ToServer, _) => {
                let call = lock(&node.run).get(&(header.node, header.call)).cloned();
                if let Some(call) = call {
                    call.receive(message);
                }
            }
            _ => {}
        }
    }
}

fn ids(frame: &Frame) -> Option<Vec<u64>> {
    match frame {
        Frame::Calls(bytes) => Some(bytes.chunks_exact(8).map(|mut id| id.get_u64()).collect()),
        _ => None,
    }
}

/// Sees a withdrawn instance out of its queue group.
///
/// To unsubscribe plainly would lose calls: the client library forgets a subscription before the broker does, and drops what
/// arrives in between. So the subscription has been told to end after [`LEAVE_AFTER`] further messages, which both sides count
/// alike, and here those messages are sent: they say nothing, and whatever instance they reach ignores them.
async fn leave(node: Arc<Node>, subject: Subject) {
    let nothing = node.header(Kind::Void, 0).message(&[]);
    let push = async {
        loop {
            for _ in 0..LEAVE_AFTER {
                if node.client.publish(subject.clone(), nothing.clone()).await.is_err() {
                    return;
                }
            }
            tokio::time::sleep(LEAVE_PAUSE).await;
        }
    };
    // This task is aborted when the subscription has ended; the limit is for a broker that is away.
    let _ = tokio::time::timeout(LEAVE_LIMIT, push).await;
}
