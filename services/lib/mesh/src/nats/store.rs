//! Buckets in the server's JetStream: a key-value store, and a task that follows it.
//!
//! After a lost connection the task reads everything anew instead of going on where it was, so that nothing depends on what the
//! server still knows of its reader.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::push::{Ordered, OrderedConfig};
use async_nats::jetstream::consumer::{DeliverPolicy, ReplayPolicy};
use async_nats::jetstream::context::RequestErrorKind;
use async_nats::jetstream::kv::{self, Operation, UpdateErrorKind};
use async_nats::jetstream::stream::{self, DiscardPolicy, StorageType};
use async_nats::jetstream::{self, Context, ErrorCode};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use serde_json::Value;
use tokio::sync::watch;

use super::node::Node;
use crate::bucket::Entries;
use crate::error::MeshError;
use crate::target::{escape, unescape};

/// How long reading all entries may take.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// The pause before the entries are read anew when that has failed.
const READ_PAUSE: Duration = Duration::from_millis(250);
/// What the headers of a message take at most, in bytes.
const HEADER_ROOM_BYTES: usize = 1024;
/// How often one `create` is overtaken by others that write and delete the same key.
const CREATE_TRIES: usize = 16;
/// The header that marks the end of a key's value.
const OPERATION: &str = "KV-Operation";

type Failure = Box<dyn Error + Send + Sync>;

/// A bucket to write in.
pub(crate) struct Store {
    node: Arc<Node>,
    values: kv::Store,
}

impl Store {
    /// Opens or makes a bucket, and follows its entries as long as anybody holds the receiver or a clone of it.
    pub(crate) async fn open(node: &Arc<Node>, name: &str) -> Result<(Self, watch::Receiver<Entries>), MeshError> {
        let failed = |source| MeshError::BucketOpen { bucket: name.to_owned(), source };
        node.up().await.map_err(|status| failed(status.into()))?;
        let context = jetstream::new(node.client.clone());
        if !has_jetstream(&context).await.map_err(failed)? {
            return Err(MeshError::NoJetStream { bucket: name.to_owned() });
        }
        let epoch = node.epoch();
        let (values, following, entries) = read(&context, name).await.map_err(failed)?;
        let (sender, receiver) = watch::channel(Arc::new(entries));
        let follower = Follower { node: node.clone(), context, name: name.to_owned(), sender };
        tokio::spawn(follower.run(epoch, following));
        Ok((Self { node: node.clone(), values }, receiver))
    }

    pub(crate) fn longest_value(&self) -> usize {
        self.node.max_payload().saturating_sub(HEADER_ROOM_BYTES)
    }

    pub(crate) async fn put(&self, key: &str, value: Bytes) -> Result<(), Failure> {
        self.node.up().await?;
        self.values.put(escape(key), value).await?;
        Ok(())
    }

    /// The client library's own `create` takes any failure for a reason to look at the entry, which may then be one's own.
    pub(crate) async fn create(&self, key: &str, value: &Bytes) -> Result<bool, Failure> {
        self.node.up().await?;
        let key = escape(key);
        for _ in 0..CREATE_TRIES {
            let revision = match self.values.entry(&key).await? {
                Some(entry) if entry.operation == Operation::Put => return Ok(false),
                Some(entry) => entry.revision,
                None => 0,
            };
            match self.values.update(&key, value.clone(), revision).await {
                Ok(_) => return Ok(true),
                // Somebody else was faster.
                Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err("others keep writing and deleting it".into())
    }

    pub(crate) async fn delete(&self, key: &str) -> Result<(), Failure> {
        self.node.up().await?;
        self.values.delete(escape(key)).await?;
        Ok(())
    }
}

/// Asked in the plain: the client library expects more of the answer than older servers say.
async fn has_jetstream(context: &Context) -> Result<bool, Failure> {
    let answer: Value = match context.request("INFO", b"").await {
        Ok(answer) => answer,
        Err(error) if error.kind() == RequestErrorKind::NoResponders => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let is_off =
        |code: u64| [ErrorCode::JETSTREAM_NOT_ENABLED, ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT].iter().any(|off| off.0 == code);
    Ok(!answer["error"]["err_code"].as_u64().is_some_and(is_off))
}

/// The bucket, made if it is not there.
async fn open(context: &Context, name: &str) -> Result<kv::Store, Failure> {
    if let Ok(values) = context.get_key_value(name).await {
        return Ok(values);
    }
    // What the client library calls a key-value store. Its own way to make one fails on servers before 2.10, see above.
    let config = stream::Config {
        name: format!("KV_{name}"),
        subjects: vec![format!("$KV.{name}.>")],
        max_messages_per_subject: 1,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        num_replicas: 1,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        ..stream::Config::default()
    };
    let made = context.create_stream(config).await;
    // Another process may have made it in the meantime, with settings of its own.
    match (context.get_key_value(name).await, made) {
        (Ok(values), _) => Ok(values),
        (Err(_), Err(error)) => Err(error.into()),
        (Err(error), Ok(_)) => Err(error.into()),
    }
}

/// All entries, and the stream of what changes after them.
async fn read(context: &Context, name: &str) -> Result<(kv::Store, Ordered, BTreeMap<String, Bytes>), Failure> {
    let read = async {
        let values = open(context, name).await?;
        let config = OrderedConfig {
            deliver_subject: context.client().new_inbox(),
            filter_subject: format!("{}>", values.prefix),
            deliver_policy: DeliverPolicy::LastPerSubject,
            replay_policy: ReplayPolicy::Instant,
            ..OrderedConfig::default()
        };
        let consumer = values.stream.create_consumer(config).await?;
        let mut pending = consumer.cached_info().num_pending;
        let mut following = consumer.messages().await?;
        let mut entries = BTreeMap::new();
        while pending > 0 {
            let change = following.next().await.ok_or("the subscription has ended")??;
            pending = change.info()?.pending;
            apply(&mut entries, &change, &values.prefix);
        }
        Ok((values, following, entries))
    };
    tokio::time::timeout(READ_LIMIT, read).await.map_err(|_| format!("its entries cannot be read within {READ_LIMIT:?}"))?
}

/// `prefix` is what precedes the key in the change's subject.
fn apply(entries: &mut BTreeMap<String, Bytes>, change: &jetstream::Message, prefix: &str) {
    let Some(key) = change.subject.strip_prefix(prefix).and_then(unescape) else {
        return tracing::debug!(subject = %change.subject, "a key that was written by somebody else is ignored");
    };
    // A put has no such header, or one that says so.
    let operation = change.headers.as_ref().and_then(|headers| headers.get(OPERATION));
    if operation.is_none_or(|operation| operation.as_str() == "PUT") {
        // A slice would keep alive the read buffer that it lies in, which is far longer.
        entries.insert(key, Bytes::copy_from_slice(&change.payload));
    } else {
        entries.remove(&key);
    }
}

/// Keeps a bucket's entries current.
struct Follower {
    node: Arc<Node>,
    context: Context,
    name: String,
    sender: watch::Sender<Entries>,
}

impl Follower {
    /// Follows from the state of the connection in which `following` was begun, until nobody watches any more.
    async fn run(self, epoch: u32, following: Ordered) {
        tokio::select! {
            () = self.sender.closed() => {}
            () = self.keep(epoch, following) => {}
        }
    }

    async fn keep(&self, mut epoch: u32, mut following: Ordered) {
        loop {
            tokio::select! {
                () = self.node.lost_after(epoch) => {}
                failure = self.follow(&mut following) => {
                    tracing::warn!(bucket = self.name, failure, "the entries of a bucket are read anew");
                }
            }
            (epoch, following) = self.catch_up().await;
        }
    }

    /// Publishes what changes; returns when it cannot go on, and says why.
    async fn follow(&self, following: &mut Ordered) -> String {
        let prefix = format!("$KV.{}.", self.name);
        while let Some(mut change) = following.next().await {
            let mut entries = BTreeMap::clone(&self.sender.borrow());
            // What has come together is published together.
            loop {
                match change {
                    Ok(change) => apply(&mut entries, &change, &prefix),
                    Err(error) => return error.to_string(),
                }
                change = match following.next().now_or_never().flatten() {
                    Some(next) => next,
                    None => break,
                };
            }
            self.publish(entries);
        }
        "the subscription has ended".to_owned()
    }

    /// Reads everything anew, as soon as that can be done.
    async fn catch_up(&self) -> (u32, Ordered) {
        loop {
            if self.node.up().await.is_ok() {
                let epoch = self.node.epoch();
                match read(&self.context, &self.name).await {
                    Ok((_, following, entries)) => {
                        self.publish(entries);
                        return (epoch, following);
                    }
                    Err(error) => tracing::warn!(bucket = self.name, %error, "the entries of a bucket cannot be read"),
                }
            }
            tokio::time::sleep(READ_PAUSE).await;
        }
    }

    fn publish(&self, entries: BTreeMap<String, Bytes>) {
        self.sender.send_if_modified(|known| {
            let is_changed = **known != entries;
            if is_changed {
                *known = Arc::new(entries);
            }
            is_changed
        });
    }
}
