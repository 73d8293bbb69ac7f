use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use crate::error::MeshError;
use crate::mesh::Wires;
use crate::nats::{Node, Store};
use crate::target::escape;

/// All entries of a bucket.
pub(crate) type Entries = Arc<BTreeMap<String, Bytes>>;

/// The longest value, in bytes, unless the broker allows less.
const VALUE_BYTES: usize = 512 << 10;
/// The longest key as it is spelled on NATS, in bytes: a letter, digit, `-` or `_` takes one, any other byte three. The broker
/// drops the connection of a client that names a much longer subject.
const KEY_BYTES: usize = 1024;

/// A set of small values that all processes of the mesh see, and that outlives them. Clones are the same bucket.
///
/// Keys are any text of some hundred characters, values have at most 512 KiB. When a write fails because the connection was lost,
/// it may have been done nevertheless.
#[derive(Clone)]
pub struct Bucket {
    name: Arc<str>,
    entries: watch::Receiver<Entries>,
    place: Place,
}

#[derive(Clone)]
enum Place {
    Local(Arc<watch::Sender<Entries>>),
    Nats(Arc<Store>),
}

impl Bucket {
    pub(crate) async fn open(wires: &Wires, name: &str) -> Result<Self, MeshError> {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) {
            return Err(MeshError::BucketName(name.to_owned()));
        }
        let (entries, place) = match wires {
            Wires::Local(registry) => {
                let bucket = registry.bucket(name);
                (bucket.subscribe(), Place::Local(bucket))
            }
            Wires::Nats(connected) => in_nats(&connected.node, name).await?,
            Wires::Direct(direct) => in_nats(direct.node(), name).await?,
        };
        Ok(Self { name: name.into(), entries, place })
    }

    /// Writes, whatever value the key had.
    pub async fn put(&self, key: &str, value: Bytes) -> Result<(), MeshError> {
        self.check(key, &value)?;
        match &self.place {
            Place::Local(entries) => {
                entries.send_modify(|entries| drop(Arc::make_mut(entries).insert(key.to_owned(), value)));
                Ok(())
            }
            Place::Nats(store) => store.put(key, value).await.map_err(|source| self.failed(key, source)),
        }
    }

    /// Writes unless the key has a value; says whether it did.
    pub async fn create(&self, key: &str, value: Bytes) -> Result<bool, MeshError> {
        self.check(key, &value)?;
        match &self.place {
            Place::Local(entries) => Ok(entries.send_if_modified(|entries| {
                let is_new = !entries.contains_key(key);
                if is_new {
                    Arc::make_mut(entries).insert(key.to_owned(), value);
                }
                is_new
            })),
            Place::Nats(store) => store.create(key, &value).await.map_err(|source| self.failed(key, source)),
        }
    }

    /// Takes the key's value away, if it has one.
    pub async fn delete(&self, key: &str) -> Result<(), MeshError> {
        self.check(key, &Bytes::new())?;
        match &self.place {
            Place::Local(entries) => {
                entries.send_if_modified(|entries| entries.contains_key(key) && Arc::make_mut(entries).remove(key).is_some());
                Ok(())
            }
            Place::Nats(store) => store.delete(key).await.map_err(|source| self.failed(key, source)),
        }
    }

    /// All entries, kept current in the background for as long as any clone of the bucket or receiver of it lives. Complete when
    /// [`Mesh::bucket`](crate::Mesh::bucket) returns; after a lost connection it catches up by itself, and keeps the last known
    /// entries meanwhile. An own write shows a moment after it has returned.
    pub fn entries(&self) -> watch::Receiver<Entries> {
        self.entries.clone()
    }

    fn check(&self, key: &str, value: &Bytes) -> Result<(), MeshError> {
        let bucket = || self.name.to_string();
        let bytes = escape(key).len();
        if bytes > KEY_BYTES {
            return Err(MeshError::BucketKey { bucket: bucket(), bytes, most: KEY_BYTES });
        }
        let most = match &self.place {
            Place::Local(_) => VALUE_BYTES,
            Place::Nats(store) => VALUE_BYTES.min(store.longest_value()),
        };
        if value.len() > most {
            return Err(MeshError::BucketValue { bucket: bucket(), key: key.to_owned(), bytes: value.len(), most });
        }
        Ok(())
    }

    fn failed(&self, key: &str, source: Box<dyn std::error::Error + Send + Sync>) -> MeshError {
        MeshError::BucketWrite { bucket: self.name.to_string(), key: key.to_owned(), source }
    }
}

async fn in_nats(node: &Arc<Node>, name: &str) -> Result<(watch::Receiver<Entries>, Place), MeshError> {
    let (store, entries) = Store::open(node, name).await?;
    Ok((entries, Place::Nats(Arc::new(store))))
}
