//! Noticing that the other end of a call has died.
//!
//! NATS answers a request to a subject that nobody listens on at once. So while calls are open, each end now and then sends a
//! request to the other's own subject: silence of a busy process is patience, "no responders" is death. The answer also tells how
//! often the peer has lost its connection; a call from before the last loss is lost as well.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::{Request, Subject};
use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::time::{Instant, MissedTickBehavior};
use tonic::Status;

use super::call::ClientCall;
use super::frame::{Frame, Kind, Message, NodeId};
use super::node::{Node, nobody_listens, node_subject};
use super::offer::everyone_subject;
use crate::call::lock;

const PERIOD: Duration = Duration::from_millis(250);
/// A peer that listens but does not answer for so long is stuck for good.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// A call that no instance knows so long after it was opened died with the instance that had taken it.
const UNKNOWN_LIMIT: Duration = Duration::from_secs(2);

/// Asks after the other ends of all open calls, for ever.
pub(crate) async fn watch_peers(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let asked = Arc::new(Asked::default());
    loop {
        ticks.tick().await;
        let (mut peers, strays) = survey(&node);
        peers.retain(|peer| lock(&asked.peers).insert(*peer));
        for peer in peers {
            let (node, asked) = (node.clone(), asked.clone());
            tokio::spawn(async move {
                ask_peer(&node, peer).await;
                lock(&asked.peers).remove(&peer);
            });
        }
        for (target, calls) in strays {
            if !lock(&asked.targets).insert(target.clone()) {
                continue;
            }
            let (node, asked) = (node.clone(), asked.clone());
            tokio::spawn(async move {
                ask_everyone(&node, &target, &calls).await;
                lock(&asked.targets).remove(&target);
            });
        }
    }
}

/// Whom a question is under way to: never two at a time to the same.
#[derive(Default)]
struct Asked {
    peers: Mutex<HashSet<NodeId>>,
    targets: Mutex<HashSet<String>>,
}

/// By the subject on which all instances of their target listen.
type Strays = HashMap<String, Vec<Arc<ClientCall>>>;

/// The nodes at the other end of calls, and the calls that have been open for a while without a word from any instance.
fn survey(node: &Node) -> (HashSet<NodeId>, Strays) {
    let mut peers: HashSet<NodeId> = lock(&node.run).values().map(|call| call.peer.node).collect();
    let mut strays = Strays::new();
    for call in lock(&node.made).values() {
        match call.peer.get() {
            Some(peer) => {
                peers.insert(peer.node);
            }
            None if call.opened.elapsed() >= PERIOD => {
                strays.entry(everyone_subject(&call.target).into_string()).or_default().push(call.clone())
            }
            None => {}
        }
    }
    (peers, strays)
}

async fn ask_peer(node: &Node, peer: NodeId) {
    let question = Request::new().payload(node.header(Kind::Probe, 0).message(&[])).timeout(Some(ANSWER_LIMIT));
    let lost_before = node.epoch();
    match node.client.send_request(node_subject(peer), question).await {
        Ok(answer) => {
            if let Ok(Message { header, .. }) = Message::decode(answer.payload) {
                fail_calls(node, peer, |epoch| epoch != header.epoch, "the other side lost its connection to nats-server");
            }
        }
        // Calls of an own lost connection have failed already, and the peer may be on its way back.
        Err(_) if node.epoch() != lost_before => {}
        Err(error) if nobody_listens(&error) => fail_calls(node, peer, |_| true, "the other side of the call is gone"),
        Err(error) => {
            tracing::warn!(?peer, %error, "a peer does not answer");
            fail_calls(node, peer, |_| true, "the other side of the call does not answer");
        }
    }
}

fn fail_calls(node: &Node, peer: NodeId, is_lost: impl Fn(u32) -> bool, reason: &str) {
    let made: Vec<_> = lock(&node.made).values().cloned().collect();
    for call in made {
        if call.peer.get().is_some_and(|end| end.node == peer && is_lost(end.epoch)) {
            call.response.fail(Status::unavailable(reason));
        }
    }
    let run: Vec<_> = lock(&node.run).values().cloned().collect();
    for call in run {
        if call.peer.node == peer && is_lost(call.peer.epoch) {
            call.desert(Status::unavailable(reason));
        }
    }
}

/// Asks all instances of a target who runs these calls: the one that does speaks up to the call itself.
async fn ask_everyone(node: &Node, target: &str, calls: &[Arc<ClientCall>]) {
    let ids = Frame::Calls(encode_ids(calls.iter().map(|call| call.id), node.max_payload()));
    let question = Request::new().payload(node.header(Kind::Who, 0).message(&[ids])).timeout(Some(ANSWER_LIMIT));
    let asked = Instant::now();
    let lost_before = node.epoch();
    let answer = node.client.send_request(Subject::from(target), question).await;
    if node.epoch() != lost_before {
        return;
    }
    let unknown = calls.iter().filter(|call| call.peer.get().is_none());
    match answer {
        // Some instance has answered, and after so many rounds the one that has the call would have as well.
        Ok(_) => {
            for call in unknown.filter(|call| asked.saturating_duration_since(call.opened) >= UNKNOWN_LIMIT) {
                call.response.fail(Status::unavailable("the instance that took the call is gone"));
            }
        }
        Err(error) if nobody_listens(&error) => {
            for call in unknown {
                call.response.fail(Status::unavailable("the last instance of the called target is gone"));
            }
        }
        Err(error) => tracing::warn!(subject = target, %error, "no instance answers"),
    }
}

/// As many ids as fit a message; the others have their turn in the next round.
fn encode_ids(ids: impl Iterator<Item = u64>, max_payload: usize) -> Bytes {
    let mut bytes = BytesMut::new();
    for id in ids.take(max_payload / 16) {
        bytes.put_u64(id);
    }
    bytes.freeze()
}
