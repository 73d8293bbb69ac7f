//! This process's one connection to the broker, and the calls that use it.
//!
//! A node listens on one subject of its own. A single task reads it and hands every message to the call it belongs to; it never
//! waits for anything, because all calls would wait with it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::client::{Client, RequestErrorKind};
use async_nats::{ConnectErrorKind, ConnectOptions, Event, Request, Subject, Subscriber};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Status;

use super::call::{ClientCall, ServerCall};
use super::frame::{Frame, Header, Kind, Message, NodeId, Refusal};
use super::probe;
use crate::call::lock;
use crate::config::MeshConfig;
use crate::error::MeshError;
use crate::spread::Spread;

/// How long a starting process waits for the broker to be there.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long a new call waits for a lost connection to come back, unless its deadline is earlier.
const RECONNECT_WAIT: Duration = Duration::from_secs(3);
/// The longest pause between two attempts to reconnect.
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);
/// Publishes that may wait for the socket; a publisher beyond them waits too.
const QUEUED_COMMANDS: usize = 512;
/// What the windows of all calls of one kind may come to. More would only wait in the broker, which drops a connection that
/// lets 64 MiB wait.
const ALL_WINDOWS_BYTES: u64 = 32 << 20;
/// The smallest window, however many calls share the sum above.
const LEAST_WINDOW_BYTES: u64 = 64 << 10;
/// The shortest `max_payload` that this protocol works with.
const LEAST_PAYLOAD_BYTES: usize = 4 << 10;

pub(crate) struct Node {
    pub client: Client,
    pub id: NodeId,
    link: Arc<Link>,
    window: u64,
    next_call: AtomicU64,
    /// Calls made by this node, by id.
    pub made: Mutex<HashMap<u64, Arc<ClientCall>, Spread>>,
    /// Calls run by this node, by caller and id.
    pub run: Mutex<HashMap<(NodeId, u64), Arc<ServerCall>, Spread>>,
}

/// The state of the connection.
#[derive(Default)]
struct Link {
    down: AtomicBool,
    /// How often it was lost.
    lost: AtomicU32,
    changed: Notify,
}

/// A [`Node`] and the tasks that serve it, which end when this is dropped.
pub(crate) struct Connected {
    pub node: Arc<Node>,
    _tasks: JoinSet<()>,
}

impl Node {
    /// Connects, and listens on the node's own subject.
    pub(crate) async fn connect(url: &str, config: &MeshConfig) -> Result<Connected, MeshError> {
        let link = Arc::new(Link::default());
        let client = connect(url, &link).await?;
        let max_payload = client.max_payload();
        if max_payload < LEAST_PAYLOAD_BYTES {
            return Err(MeshError::PayloadTooSmall { url: url.to_owned(), max_payload, least: LEAST_PAYLOAD_BYTES });
        }
        let node = Arc::new(Self {
            id: new_id(&client),
            client,
            link,
            window: (config.window_bytes as u64).max(LEAST_WINDOW_BYTES),
            next_call: AtomicU64::new(1),
            made: Mutex::default(),
            run: Mutex::default(),
        });
        let inbox = node.subscribe(node_subject(node.id), None).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(dispatch(node.clone(), inbox));
        tasks.spawn(watch_link(node.clone()));
        tasks.spawn(probe::watch_peers(node.clone()));
        node.settle().await?;
        Ok(Connected { node, _tasks: tasks })
    }

    pub(crate) async fn subscribe(&self, subject: Subject, queue: Option<&str>) -> Result<Subscriber, MeshError> {
        let subscribed = match queue {
            Some(queue) => self.client.queue_subscribe(subject.clone(), queue.to_owned()).await,
            None => self.client.subscribe(subject.clone()).await,
        };
        subscribed.map_err(|source| MeshError::Subscribe { subject: subject.into_string(), source })
    }

    /// Resolves when the broker has acted on everything sent so far: a message to oneself has made the round.
    pub(crate) async fn settle(&self) -> Result<(), MeshError> {
        let request = Request::new().payload(self.header(Kind::Probe, 0).message(&[])).timeout(Some(CONNECT_LIMIT));
        self.client.send_request(node_subject(self.id), request).await.map_err(MeshError::Settle)?;
        Ok(())
    }

    pub(crate) fn max_payload(&self) -> usize {
        self.client.max_payload()
    }

    /// How often the connection was lost.
    pub(crate) fn epoch(&self) -> u32 {
        self.link.lost.load(Ordering::Acquire)
    }

    pub(crate) fn next_call(&self) -> u64 {
        self.next_call.fetch_add(1, Ordering::Relaxed)
    }

    /// A header in this node's name, for a control message unless a number is set.
    pub(crate) fn header(&self, kind: Kind, call: u64) -> Header {
        Header { kind, node: self.id, epoch: self.epoch(), call, sequence: None }
    }

    /// The flow-control window of one of `calls` calls, in charged bytes.
    pub(crate) fn window(&self, calls: usize) -> u64 {
        (ALL_WINDOWS_BYTES / calls.max(1) as u64).clamp(LEAST_WINDOW_BYTES, self.window)
    }

    /// Sends without waiting: at once if the connection's queue has room, from a task of its own otherwise.
    pub(crate) fn post(&self, subject: &Subject, payload: Bytes) {
        let sent = self.client.publish(subject.clone(), payload.clone()).now_or_never();
        if sent.is_none()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (client, subject) = (self.client.clone(), subject.clone());
            runtime.spawn(async move { client.publish(subject, payload).await });
        }
    }

    /// Waits a moment for a lost connection.
    pub(crate) async fn up(&self) -> Result<(), Status> {
        let is_up = || !self.link.down.load(Ordering::Acquire);
        if is_up() {
            return Ok(());
        }
        let back = self.link.wait_for(is_up);
        tokio::time::timeout(RECONNECT_WAIT, back).await.map_err(|_| Status::unavailable("there is no connection to nats-server"))
    }

    /// Resolves when the connection was lost after it had been lost `epoch` times.
    pub(crate) async fn lost_after(&self, epoch: u32) {
        self.link.wait_for(|| self.epoch() != epoch).await;
    }

    /// Ends all calls: what was under way is lost, on both sides.
    fn fail_all(&self) {
        let status = Status::unavailable("the connection to nats-server was lost");
        let made: Vec<_> = lock(&self.made).values().cloned().collect();
        for call in made {
            call.response.fail(status.clone());
        }
        let run: Vec<_> = lock(&self.run).values().cloned().collect();
        for call in run {
            call.desert(status.clone());
        }
    }

    fn deliver(&self, message: async_nats::Message) {
        let reply = message.reply;
        let message = match Message::decode(message.payload) {
            Ok(message) => message,
            Err(error) => return tracing::warn!(%error, "a message is ignored"),
        };
        let header = message.header;
        match header.kind {
            Kind::Probe => {
                if let Some(reply) = reply {
                    self.post(&reply, self.header(Kind::Probe, 0).message(&[]));
                }
            }
            Kind::ToClient => {
                let call = lock(&self.made).get(&header.call).cloned();
                match call {
                    Some(call) => call.receive(message),
                    None => self.refuse(Kind::ToServer, &message),
                }
            }
            Kind::ToServer => {
                let call = lock(&self.run).get(&(header.node, header.call)).cloned();
                match call {
                    Some(call) => call.receive(message),
                    None => self.refuse(Kind::ToClient, &message),
                }
            }
            Kind::Open | Kind::Who | Kind::Locate | Kind::Void => {}
        }
    }

    /// Tells the sender of content that its call is not known here.
    fn refuse(&self, kind: Kind, message: &Message) {
        if message.frames.iter().any(Frame::is_content) {
            let refusal = Refusal::from(&Status::unavailable("the call is not known to the other side any more"));
            let header = self.header(kind, message.header.call);
            self.post(&node_subject(message.header.node), header.message(&[Frame::Reset(refusal)]));
        }
    }
}

/// Where `node` listens.
pub(crate) fn node_subject(node: NodeId) -> Subject {
    Subject::from(format!("janua-node.{}", node.as_str()))
}

impl Link {
    /// Keeps the state of the connection by what the client library reports.
    fn note(&self, event: &Event) {
        match event {
            Event::Connected => self.down.store(false, Ordering::Release),
            Event::Disconnected | Event::Closed => {
                self.down.store(true, Ordering::Release);
                self.lost.fetch_add(1, Ordering::AcqRel);
            }
            // The library has dropped a message because this process did not keep up: that is a loss too.
            Event::SlowConsumer(_) => {
                self.lost.fetch_add(1, Ordering::AcqRel);
            }
            _ => return,
        }
        self.changed.notify_waiters();
    }

    /// Resolves when `holds` after a change, or now.
    async fn wait_for(&self, holds: impl Fn() -> bool) {
        loop {
            let changed = self.changed.notified();
            if holds() {
                return;
            }
            changed.await;
        }
    }
}

async fn connect(url: &str, link: &Arc<Link>) -> Result<Client, MeshError> {
    let end = Instant::now() + CONNECT_LIMIT;
    loop {
        let link = link.clone();
        let options = ConnectOptions::new()
            .name("janua")
            .request_timeout(None)
            .client_capacity(QUEUED_COMMANDS)
            .reconnect_delay_callback(|attempt| RECONNECT_PAUSE.min(Duration::from_millis(10) * u32::try_from(attempt).unwrap_or(u32::MAX)))
            .event_callback(move |event| {
                link.note(&event);
                std::future::ready(())
            });
        let servers: Vec<&str> = url.split(',').map(str::trim).collect();
        match options.connect(servers).await {
            Ok(client) => return Ok(client),
            Err(source) if source.kind() == ConnectErrorKind::Io && Instant::now() < end => {
                tracing::info!(url, error = %source, "nats-server is not there yet");
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
            Err(source) => return Err(MeshError::Connect { url: url.to_owned(), source }),
        }
    }
}

/// Ends all calls whenever the connection was lost.
async fn watch_link(node: Arc<Node>) {
    let mut seen = 0;
    loop {
        node.lost_after(seen).await;
        seen = node.epoch();
        node.fail_all();
    }
}

async fn dispatch(node: Arc<Node>, mut inbox: Subscriber) {
    while let Some(message) = inbox.next().await {
        node.deliver(message);
    }
}

/// Whether a request failed because nobody listens.
pub(crate) fn nobody_listens(error: &async_nats::client::RequestError) -> bool {
    error.kind() == RequestErrorKind::NoResponders
}

/// The client library makes unique names for inboxes; the last token of one is a NUID.
fn new_id(client: &Client) -> NodeId {
    let inbox = client.new_inbox();
    let name = inbox.rsplit('.').next().unwrap_or_default();
    NodeId::parse(name).expect("a NUID has 22 letters and digits")
}
