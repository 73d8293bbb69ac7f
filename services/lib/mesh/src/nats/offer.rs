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
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use super::frame::{Frame, Kind, Message};
use super::micro::{self, Card};
use super::node::{Node, nobody_listens};
use super::server::Starter;
use crate::call::lock;
use crate::error::MeshError;
use crate::gate::Instance;
use crate::target::{InstanceName, Named, escape};

/// The queue group that all instances of a target form.
pub(crate) const QUEUE: &str = "janua";
/// How long those who look for an instance wait for an answer: instances that are leaving give none.
const LOCATE_LIMIT: Duration = Duration::from_millis(500);
/// How long they wait for further answers after one.
const LOCATE_MOMENT: Duration = Duration::from_millis(30);
/// How many calls may be on their way to an instance that withdraws, see [`leave`].
const LEAVE_AFTER: u64 = 256;
/// How long an instance that withdraws goes on pushing itself off its subjects.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// The pause between two volleys of messages to that end.
const LEAVE_PAUSE: Duration = Duration::from_millis(2);

/// Where all instances of a target listen, each for itself.
pub(crate) fn everyone_subject(target: &Named) -> Subject {
    Subject::from(format!("janua-all.{}", target.name))
}

/// Where one instance of a target listens, and no other.
pub(crate) fn one_subject(target: &Named, instance: &InstanceName) -> Subject {
    Subject::from(format!("janua-one.{}.{}", target.name, escape(instance.as_str())))
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
        located.extend(read_located(answer.payload));
        end = end.min(Instant::now() + LOCATE_MOMENT);
    }
    located
}

/// What one instance says when it is looked for.
pub(crate) enum Found {
    Here(Located),
    /// It takes no calls, or is not there at all.
    Gone,
    /// It has not answered within a moment, or nobody could ask.
    Silent,
}

/// Looks for one instance of `target`.
pub(crate) async fn find(node: &Node, target: &Named, instance: &InstanceName) -> Found {
    let question = Request::new().payload(node.header(Kind::Locate, 0).message(&[])).timeout(Some(LOCATE_LIMIT));
    match node.client.send_request(one_subject(target, instance), question).await {
        Ok(answer) => read_located(answer.payload).map_or(Found::Gone, Found::Here),
        Err(error) if nobody_listens(&error) => Found::Gone,
        Err(_) => Found::Silent,
    }
}

fn read_located(answer: Bytes) -> Option<Located> {
    let message = Message::decode(answer).ok()?;
    message.frames.iter().find_map(|frame| match frame {
        Frame::Instance(json) => serde_json::from_slice(json).ok(),
        _ => None,
    })
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

    pub(crate) fn name(&self) -> InstanceName {
        InstanceName::from(self.instance.as_str())
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
        let everyone = node.subscribe(everyone_subject(target), None).await?;
        let own = Source::open(node, one_subject(target, &located.name()), None).await?;
        let queue = Source::open(node, Subject::from(&*target.subject), Some(QUEUE)).await?;
        let mut tasks = JoinSet::new();
        let card = Arc::new(Card::new(target, &located, instance.clone()));
        micro::announce(node, card, &mut tasks).await?;
        let left = Arc::new(SetOnce::new());
        let starter = Starter::new(node.clone(), instance.clone());
        let desk = Desk { starter, own, queue, everyone, located, left: left.clone(), leaving: JoinSet::new() };
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

/// A subscription that brings calls, until it has brought the last.
struct Source {
    subject: Subject,
    messages: Subscriber,
    /// How many messages have come out of it.
    taken: u64,
    is_open: bool,
    leaving: Option<AbortHandle>,
}

impl Source {
    async fn open(node: &Node, subject: Subject, queue: Option<&str>) -> Result<Self, MeshError> {
        let messages = node.subscribe(subject.clone(), queue).await?;
        Ok(Self { subject, messages, taken: 0, is_open: true, leaving: None })
    }

    async fn next(&mut self) -> Option<async_nats::Message> {
        let message = self.messages.next().await;
        self.taken += u64::from(message.is_some());
        message
    }

    /// What has come already.
    fn upcoming(&mut self) -> Option<async_nats::Message> {
        self.next().now_or_never().flatten()
    }

    /// Lets it end after what is on its way.
    async fn leave(&mut self, node: &Arc<Node>, tasks: &mut JoinSet<()>) {
        // Fails only when the connection is closed for good; the subscription ends with it.
        let _ = self.messages.unsubscribe_after(self.taken + LEAVE_AFTER).await;
        self.leaving = Some(tasks.spawn(leave(node.clone(), self.subject.clone())));
    }

    fn close(&mut self) {
        self.is_open = false;
        if let Some(leaving) = self.leaving.take() {
            leaving.abort();
        }
    }
}

/// Takes what comes for one offered target.
struct Desk {
    starter: Starter,
    /// Calls to this instance and no other, and questions to it.
    own: Source,
    /// This instance's share of the calls to its target.
    queue: Source,
    everyone: Subscriber,
    located: Located,
    left: Arc<SetOnce<()>>,
    leaving: JoinSet<()>,
}

impl Desk {
    async fn run(mut self) {
        let gate = self.starter.instance.gate.clone();
        let mut withdrawn = std::pin::pin!(gate.withdrawn());
        let mut is_leaving = false;
        loop {
            tokio::select! {
                biased;
                message = self.own.next(), if self.own.is_open => match message {
                    Some(message) => self.take_own(message),
                    None => {
                        self.own.close();
                        self.note_end();
                    }
                },
                open = self.queue.next(), if self.queue.is_open => match open {
                    Some(open) => self.take(open),
                    None => {
                        self.queue.close();
                        self.note_end();
                    }
                },
                message = self.everyone.next() => match message {
                    Some(message) => {
                        // What was sent before a question is dealt with before the answer.
                        while let Some(open) = self.queue.upcoming() {
                            self.take(open);
                        }
                        while let Some(message) = self.own.upcoming() {
                            self.take_own(message);
                        }
                        self.answer(message);
                    }
                    None => return,
                },
                () = &mut withdrawn, if !is_leaving => {
                    is_leaving = true;
                    let node = self.starter.node.clone();
                    self.queue.leave(&node, &mut self.leaving).await;
                    self.own.leave(&node, &mut self.leaving).await;
                }
            }
        }
    }

    fn note_end(&self) {
        if !self.own.is_open && !self.queue.is_open {
            // Set nowhere else.
            let _ = self.left.set(());
        }
    }

    /// Starts the call that `open` brings, and those that wait behind it.
    fn take(&mut self, open: async_nats::Message) {
        let mut upcoming = Some(open);
        while let Some(open) = upcoming {
            upcoming = self.queue.upcoming();
            self.starter.start(open, upcoming.is_some());
        }
    }

    /// Starts a call that only this instance may run, or says whether it takes such.
    fn take_own(&mut self, message: async_nats::Message) {
        if Kind::of(&message.payload) != Some(Kind::Locate) {
            return self.starter.start(message, false);
        }
        let Some(reply) = message.reply else { return };
        if self.starter.instance.gate.is_withdrawn() {
            let node = &self.starter.node;
            node.post(&reply, node.header(Kind::Locate, 0).message(&[]));
        } else {
            self.tell_place(&reply);
        }
    }

    fn tell_place(&self, reply: &Subject) {
        let node = &self.starter.node;
        let located = Bytes::from(serde_json::to_vec(&self.located).unwrap_or_default());
        node.post(reply, node.header(Kind::Locate, 0).message(&[Frame::Instance(located)]));
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
            (Kind::Locate, Some(reply)) if !self.starter.instance.gate.is_withdrawn() => self.tell_place(&reply),
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

/// Sees a withdrawn instance off one of its subjects.
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
