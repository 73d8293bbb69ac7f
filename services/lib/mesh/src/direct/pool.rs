use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;

use super::line::Line;
use crate::nats::{self, Found, Located, Node};
use crate::target::{InstanceName, Named};

/// How often instances are looked for while calls are made: so late does a new one get its share.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Without a call for so long, nobody looks.
const IDLE_AFTER: Duration = Duration::from_secs(30);
/// An address that could not be dialled is tried again after so long, and twice as long each time up to the limit.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// An instance that has not been found for so long is not called over a connection that is still there.
const GONE_AFTER: Duration = Duration::from_secs(30);
/// How many connections one call tries that end under its hands.
const TRIES: usize = 4;

/// The connections to the instances of one target, or to one of them and no other.
///
/// A task of its own finds and dials instances; calls take a connection from what it has published, and wait for it only when
/// there is none.
pub(super) struct Pool {
    shared: Arc<Shared>,
    keeper: AbortHandle,
}

struct Shared {
    lines: watch::Sender<Lines>,
    /// Calls made so far: shows the keeper that the pool is in use, and whose turn it is.
    calls: AtomicUsize,
    wanted: Notify,
}

#[derive(Clone, Default)]
struct Lines {
    open: Vec<Arc<Line>>,
    /// How many times instances have been looked for.
    rounds: u64,
    /// Nobody looks any more.
    is_over: bool,
}

/// What became of a request.
pub(super) enum Sent {
    Done(Result<http::Response<Body>, Status>),
    /// No instance can be dialled.
    Unreachable(Box<http::Request<Body>>),
}

impl Pool {
    /// `window` is how many bytes of a stream may be under way to a reader here.
    pub(super) fn new(node: &Arc<Node>, target: &Named, instance: Option<&InstanceName>, window: u32) -> Arc<Self> {
        let shared = Arc::new(Shared { lines: watch::Sender::default(), calls: AtomicUsize::new(0), wanted: Notify::new() });
        let keeper = Keeper {
            node: node.clone(),
            target: target.clone(),
            instance: instance.cloned(),
            window,
            shared: shared.clone(),
            failed: HashMap::new(),
            gone_since: None,
        };
        Arc::new(Self { keeper: tokio::spawn(keeper.run()).abort_handle(), shared })
    }

    /// Whether its one instance is gone and no call to it runs: it will never have a connection again.
    pub(super) fn is_over(&self) -> bool {
        self.shared.lines.borrow().is_over
    }

    /// Makes one call. A request that a closing connection gives back goes to another one.
    pub(super) async fn send(&self, mut request: http::Request<Body>) -> Sent {
        for _ in 0..TRIES {
            let Some(line) = self.line().await else { break };
            match line.send(request).await {
                Ok(outcome) => return Sent::Done(outcome),
                Err(unsent) => {
                    request = unsent;
                    self.shared.forget(&line.located);
                }
            }
        }
        Sent::Unreachable(Box::new(request))
    }

    /// The connection with the fewest calls on it, each in its turn among equals. Waits for one look around if there is none.
    async fn line(&self) -> Option<Arc<Line>> {
        let turn = self.shared.calls.fetch_add(1, Ordering::Relaxed);
        if let Some(line) = self.shared.pick(turn) {
            return Some(line);
        }
        let mut lines = self.shared.lines.subscribe();
        let rounds = lines.borrow().rounds;
        self.shared.wanted.notify_one();
        // A round that is under way may miss an instance that has come just now; then the call goes over NATS.
        let _ = lines.wait_for(|lines| !lines.open.is_empty() || lines.rounds > rounds || lines.is_over).await;
        self.shared.pick(turn)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Shared {
    fn pick(&self, turn: usize) -> Option<Arc<Line>> {
        let lines = self.lines.borrow();
        let count = lines.open.len();
        let in_turn = (0..count).map(|step| &lines.open[(turn + step) % count]);
        in_turn.min_by_key(|line| line.load()).cloned()
    }

    /// No call is to be made on the connection to this instance any more.
    fn forget(&self, instance: &Located) {
        self.lines.send_modify(|lines| lines.open.retain(|line| line.located != *instance));
        self.wanted.notify_one();
    }
}

/// Keeps the pool's connections.
struct Keeper {
    node: Arc<Node>,
    target: Named,
    /// The only one to have a connection to.
    instance: Option<InstanceName>,
    window: u32,
    shared: Arc<Shared>,
    /// Instances that could not be dialled, and when to try them again.
    failed: HashMap<Located, Retry>,
    /// Since when the one instance takes no calls.
    gone_since: Option<Instant>,
}

#[derive(Clone, Copy)]
struct Retry {
    at: Instant,
    pause: Duration,
}

impl Keeper {
    async fn run(mut self) {
        let mut drivers = JoinSet::new();
        let mut seen = usize::MAX;
        loop {
            self.look(&mut drivers).await;
            while drivers.try_join_next().is_some() {}
            if self.gone_since.is_some() && drivers.is_empty() {
                return self.shared.lines.send_modify(|lines| lines.is_over = true);
            }
            // As long as calls are made there is a look now and then, otherwise when one is asked for.
            let calls = self.shared.calls.load(Ordering::Relaxed);
            let pause = if calls == seen { IDLE_AFTER } else { LOOK_EVERY };
            seen = calls;
            let _ = tokio::time::timeout(pause, self.shared.wanted.notified()).await;
        }
    }

    /// Looks for instances and dials those that there is no connection to.
    async fn look(&mut self, drivers: &mut JoinSet<()>) {
        let located = self.locate().await;
        let open: HashSet<Located> = self.shared.lines.borrow().open.iter().map(|line| line.located.clone()).collect();
        self.failed.retain(|instance, _| located.contains(instance));
        let now = Instant::now();
        let mut dials = JoinSet::new();
        for instance in located {
            let waits = self.failed.get(&instance).is_some_and(|retry| retry.at > now);
            if instance.address.is_some() && !waits && !open.contains(&instance) {
                let window = self.window;
                dials.spawn(async move { (Line::dial(&instance, window).await, instance) });
            }
        }
        while let Some(dialled) = dials.join_next().await {
            match dialled {
                Ok((Ok((line, driver)), instance)) => {
                    self.failed.remove(&instance);
                    // Before the driver can take it out again.
                    self.shared.lines.send_modify(|lines| lines.open.push(line));
                    let shared = self.shared.clone();
                    drivers.spawn(async move { driver.run(|| shared.forget(&instance)).await });
                }
                Ok((Err(reason), instance)) => self.note_failure(instance, &reason),
                // A dial that panicked: as if it had never been tried.
                Err(_) => {}
            }
        }
        let is_gone = self.gone_since.is_some_and(|since| since.elapsed() >= GONE_AFTER);
        self.shared.lines.send_modify(|lines| {
            if is_gone {
                lines.open.clear();
            }
            lines.rounds += 1;
        });
    }

    /// The instances to have connections to.
    async fn locate(&mut self) -> HashSet<Located> {
        let Some(instance) = &self.instance else { return nats::locate(&self.node, &self.target).await };
        match nats::find(&self.node, &self.target, instance).await {
            Found::Here(located) => {
                self.gone_since = None;
                HashSet::from([located])
            }
            Found::Gone => {
                self.gone_since.get_or_insert_with(Instant::now);
                HashSet::new()
            }
            Found::Silent => HashSet::new(),
        }
    }

    fn note_failure(&mut self, instance: Located, reason: &str) {
        tracing::warn!(called = %self.target.name, address = ?instance.address, reason, "an instance cannot be dialled");
        let pause = self.failed.get(&instance).map_or(FIRST_PAUSE, |retry| LONGEST_PAUSE.min(retry.pause * 2));
        self.failed.insert(instance, Retry { at: Instant::now() + pause, pause });
    }
}
