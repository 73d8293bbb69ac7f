//! Finds replicas and keeps a stream open to each.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::join_all;
use mesh::{InstanceName, MAX_MESSAGE_BYTES, Mesh, Target};
use placement::{ExpertRange, Manifest};
use proto::v1;
use proto::v1::expert_reply::Reply;
use proto::v1::experts_client::ExpertsClient;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::Fleet;
use super::replica::{Failed, Replica, failed};

/// How often replicas are looked for: so late does a new one get its share.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// While one is missing.
const LOOK_SOON: Duration = Duration::from_millis(100);
/// A replica that so many looks in a row did not find is leaving. One look may miss it when the machine is busy.
const MISSES: u32 = 2;
/// How long a replica may take to say what it holds.
const GREETING: Duration = Duration::from_secs(5);
/// A replica that was refused, or could not be reached, is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

/// The task behind a [`Fleet`]. Ends when the fleet is gone.
pub(super) struct Keeper {
    mesh: Mesh,
    fleet: Weak<Fleet>,
    /// Wakes the keeper before its time.
    wanted: Arc<Notify>,
    entries: watch::Receiver<Arc<BTreeMap<String, Bytes>>>,
    replicas: HashMap<InstanceName, Arc<Replica>>,
    /// How many looks in a row have missed a replica.
    missed: HashMap<InstanceName, u32>,
    /// Replicas whose stream is being opened, or that are left alone for a while.
    opening: BTreeSet<InstanceName>,
    streams: JoinSet<()>,
    news: (mpsc::Sender<News>, mpsc::Receiver<News>),
}

/// What streams tell the keeper.
enum News {
    Open(Arc<Replica>),
    /// A replica holds other experts now.
    Changed,
    Ended(InstanceName),
    /// May be tried again.
    Free(InstanceName),
}

impl Keeper {
    pub fn new(mesh: Mesh, fleet: &Arc<Fleet>, entries: watch::Receiver<Arc<BTreeMap<String, Bytes>>>) -> Self {
        let (replicas, missed, opening, streams) = (HashMap::new(), HashMap::new(), BTreeSet::new(), JoinSet::new());
        let wanted = fleet.wanted.clone();
        Self { mesh, fleet: Arc::downgrade(fleet), wanted, entries, replicas, missed, opening, streams, news: mpsc::channel(64) }
    }

    pub async fn run(mut self) {
        let mut soon = tokio::time::Instant::now();
        loop {
            // The fleet is not held meanwhile: whoever lets go of it ends its streams.
            let news = tokio::select! {
                () = tokio::time::sleep_until(soon) => None,
                () = self.wanted.notified() => None,
                changed = self.entries.changed() => {
                    // An error means that the mesh is gone: what is known stays, and is looked for as before.
                    if changed.is_err() {
                        tokio::time::sleep_until(soon).await;
                    }
                    None
                }
                news = self.news.1.recv() => news,
            };
            let Some(fleet) = self.fleet.upgrade() else { return };
            if let Some(news) = news {
                self.hear(&fleet, news);
                continue;
            }
            self.look(&fleet).await;
            let pause = if *fleet.complete.borrow() { LOOK_EVERY } else { LOOK_SOON };
            soon = tokio::time::Instant::now() + pause;
            while self.streams.try_join_next().is_some() {}
        }
    }

    fn hear(&mut self, fleet: &Arc<Fleet>, news: News) {
        match news {
            News::Open(replica) => {
                self.opening.remove(&replica.name);
                self.replicas.insert(replica.name.clone(), replica);
            }
            News::Changed => {}
            News::Ended(name) => {
                self.replicas.remove(&name);
                fleet.look_again();
            }
            News::Free(name) => drop(self.opening.remove(&name)),
        }
        self.publish(fleet);
    }

    fn publish(&self, fleet: &Fleet) {
        let mut replicas: Vec<_> = self.replicas.values().cloned().collect();
        replicas.sort_by(|a, b| a.name.cmp(&b.name));
        fleet.set_replicas(&replicas);
    }

    /// Looks for the replicas of every shard of the manifest.
    async fn look(&mut self, fleet: &Arc<Fleet>) {
        let (manifest, bad) = Manifest::read(&fleet.model, &self.entries.borrow_and_update());
        if !bad.is_empty() {
            tracing::warn!(?bad, "entries of the placement that cannot be read");
        }
        let ranges: Vec<ExpertRange> = manifest.shards.keys().copied().collect();
        fleet.set_manifest(manifest);
        let targets: Vec<_> = ranges.iter().map(|range| Target::new("experts", &fleet.model).shard(range.to_string())).collect();
        let found = join_all(targets.iter().map(|target| self.mesh.instances(target))).await;
        let mut seen = BTreeSet::new();
        for ((range, target), names) in ranges.into_iter().zip(&targets).zip(found) {
            for name in names {
                if !self.replicas.contains_key(&name) && self.opening.insert(name.clone()) {
                    self.open(fleet, range, target, name.clone());
                }
                seen.insert(name);
            }
        }
        self.let_go(fleet, &seen);
    }

    /// Sends nothing more to replicas that are not there any more for those who look: they are about to end.
    fn let_go(&mut self, fleet: &Fleet, seen: &BTreeSet<InstanceName>) {
        self.missed.retain(|name, _| self.replicas.contains_key(name) && !seen.contains(name));
        let mut left = false;
        for (name, replica) in self.replicas.iter().filter(|(name, replica)| !seen.contains(*name) && replica.is_open()) {
            let missed = self.missed.entry(name.clone()).or_default();
            *missed += 1;
            if *missed >= MISSES {
                tracing::info!(shard = %replica.shard, replica = %name, "a replica is leaving");
                replica.leave();
                left = true;
            }
        }
        if left {
            self.publish(fleet);
        }
    }

    fn open(&mut self, fleet: &Arc<Fleet>, range: ExpertRange, target: &Target, name: InstanceName) {
        let client = ExpertsClient::new(self.mesh.channel_to(target, &name))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (fleet, news) = (Arc::downgrade(fleet), self.news.0.clone());
        self.streams.spawn(async move {
            if let Err(reason) = carry(client, fleet, range, &name, &news).await {
                tracing::warn!(shard = %range, replica = %name, reason, "a replica is left alone");
                tokio::time::sleep(RETRY).await;
            }
            // Fails only when the keeper is gone, and then nobody needs to know.
            let _ = news.send(News::Free(name)).await;
        });
    }
}

/// Opens a stream and carries batches and replies until it ends.
async fn carry(
    mut client: ExpertsClient<mesh::Channel>,
    fleet: Weak<Fleet>,
    range: ExpertRange,
    name: &InstanceName,
    news: &mpsc::Sender<News>,
) -> Result<(), String> {
    let (replica, batches) = Replica::new(name.clone(), range, BTreeSet::new());
    let replica = Arc::new(replica);
    let answer = client.compute(ReceiverStream::new(batches)).await.map_err(|status| status.message().to_owned())?;
    let mut replies = answer.into_inner();
    let greeting = tokio::time::timeout(GREETING, replies.next()).await.map_err(|_| "it does not say what it holds")?;
    match greeting {
        Some(Ok(v1::ExpertReply { reply: Some(Reply::Holdings(holdings)) })) => replica.hold(check(&holdings, &fleet, range)?),
        Some(Ok(_)) => return Err("it does not say what it holds".into()),
        Some(Err(status)) => return Err(status.message().to_owned()),
        None => return Err("its stream ended at once".into()),
    }
    let _ = news.send(News::Open(replica.clone())).await;
    let ended = read(&mut replies, &replica, &fleet, news).await;
    replica.end();
    let _ = news.send(News::Ended(name.clone())).await;
    ended
}

/// Hands replies to whoever waits for them, until the stream ends or nothing is left to wait for.
async fn read(
    replies: &mut Streaming<v1::ExpertReply>,
    replica: &Arc<Replica>,
    fleet: &Weak<Fleet>,
    news: &mpsc::Sender<News>,
) -> Result<(), String> {
    loop {
        let next = tokio::select! {
            biased;
            next = replies.next() => next,
            // A replica that is idle when it leaves sends nothing more, and waits for its stream to end.
            () = replica.released() => return Ok(()),
        };
        let reply = match next {
            Some(Ok(reply)) => reply.reply,
            Some(Err(status)) => {
                tracing::info!(shard = %replica.shard, replica = %replica.name, reason = status.message(), "a replica is gone");
                return Ok(());
            }
            None => return Ok(()),
        };
        match reply {
            Some(Reply::Outputs(v1::ExpertOutputs { id, rows: Some(rows), first })) => replica.outputs(id, first as usize, rows),
            Some(Reply::Outputs(outputs)) => replica.failure(outputs.id, Failed::Fatal("outputs without rows".into())),
            Some(Reply::Failure(failure)) => replica.failure(failure.id, failed(&failure)),
            Some(Reply::Holdings(holdings)) => {
                replica.hold(check(&holdings, fleet, replica.shard)?);
                let _ = news.send(News::Changed).await;
            }
            None => return Err("it sent a message without content".into()),
        }
    }
}

/// The experts that a replica holds, if it is one of ours.
fn check(holdings: &v1::Holdings, fleet: &Weak<Fleet>, range: ExpertRange) -> Result<BTreeSet<usize>, String> {
    let Some(fleet) = fleet.upgrade() else { return Err("the model is gone".into()) };
    if holdings.fingerprint != fleet.fingerprint {
        return Err("its checkpoint has other weights than the language model's".into());
    }
    if (holdings.first as usize, holdings.last as usize) != (range.first, range.last) {
        return Err(format!("it holds experts {}-{}", holdings.first, holdings.last));
    }
    let held: BTreeSet<usize> = range.experts().chain(holdings.extra.iter().map(|&expert| expert as usize)).collect();
    match held.iter().find(|&&expert| expert >= fleet.shape.experts) {
        Some(expert) => Err(format!("it holds expert {expert}, the model has {}", fleet.shape.experts)),
        None => Ok(held),
    }
}
