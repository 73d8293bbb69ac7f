use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, Cmd, FromRedisValue};
use tokio::time::Instant;

use crate::config::{CacheConfig, CacheError};
use crate::metrics;

/// In front of every key, so that several users of one Redis do not meet. The number changes with the layout of the values.
const PREFIX: &str = "janua:1:";
/// How long a Redis that failed is left alone: a request pays for finding out at most once in this time.
const PAUSE: Duration = Duration::from_secs(1);
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Bytes of a digest in front of each value. A value that was cut or overwritten is not found rather than wrong.
const SEAL: usize = 16;

/// A Redis, reconnected in the background when it is lost. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Remote {
    connection: ConnectionManager,
    timeout: Duration,
    ttl_s: u64,
    health: Arc<Health>,
}

/// When Redis may be asked again.
struct Health {
    start: Instant,
    /// Milliseconds after `start`.
    silent_until: AtomicU64,
}

impl Remote {
    /// Fails only on an address that makes no sense.
    pub(crate) async fn connect(url: &str, config: &CacheConfig) -> Result<Self, CacheError> {
        let refuse = |error: redis::RedisError| CacheError { key: "redis_url", reason: error.to_string() };
        let client = Client::open(url).map_err(refuse)?;
        let settings = ConnectionManagerConfig::new()
            .set_number_of_retries(0) // the next command tries again, after the pause
            .set_connection_timeout(Some(CONNECT_LIMIT))
            .set_response_timeout(Some(config.timeout()));
        let connection = ConnectionManager::new_lazy_with_config(client, settings).map_err(refuse)?;
        let health = Health { start: Instant::now(), silent_until: AtomicU64::new(0) };
        let remote = Self { connection, timeout: config.timeout(), ttl_s: config.ttl_s, health: Arc::new(health) };
        if remote.ask::<String>("ping", &redis::cmd("PING")).await.is_none() {
            tracing::warn!("redis does not answer; embeddings are cached in memory alone until it does");
        }
        Ok(remote)
    }

    pub(crate) async fn get(&self, key: &str) -> Option<Bytes> {
        let mut command = redis::cmd("GET");
        command.arg(name(key));
        let sealed = self.ask::<Option<Bytes>>("get", &command).await.flatten()?;
        let value = opened(key, &sealed);
        if value.is_none() {
            metrics::failed("get");
            tracing::warn!("a value in redis is damaged and ignored");
        }
        value
    }

    pub(crate) async fn put(&self, key: &str, value: &Bytes) {
        let mut command = redis::cmd("SET");
        command.arg(name(key)).arg(&sealed(key, value)[..]).arg("EX").arg(self.ttl_s);
        let _: Option<()> = self.ask("set", &command).await; // a failure is counted there
    }

    /// Sends a command, unless Redis failed a moment ago. `None` on any failure, which is counted.
    async fn ask<T: FromRedisValue>(&self, what: &'static str, command: &Cmd) -> Option<T> {
        if self.health.is_silent() {
            metrics::skipped(what);
            return None;
        }
        let mut connection = self.connection.clone();
        let reason = match tokio::time::timeout(self.timeout, command.query_async(&mut connection)).await {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} ms", self.timeout.as_millis()),
        };
        self.health.pause();
        metrics::failed(what);
        tracing::warn!(command = what, reason, "redis failed; going on without it");
        None
    }
}

impl Health {
    fn is_silent(&self) -> bool {
        self.now() < self.silent_until.load(Ordering::Relaxed)
    }

    fn pause(&self) {
        self.silent_until.store(self.now() + PAUSE.as_millis() as u64, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }
}

fn name(key: &str) -> String {
    format!("{PREFIX}{key}")
}

fn sealed(key: &str, value: &Bytes) -> BytesMut {
    let mut sealed = BytesMut::with_capacity(SEAL + value.len());
    sealed.put_slice(&seal(key, value));
    sealed.put_slice(value);
    sealed
}

fn opened(key: &str, sealed: &Bytes) -> Option<Bytes> {
    let value = sealed.slice(SEAL.min(sealed.len())..);
    (sealed.len() >= SEAL && sealed[..SEAL] == seal(key, &value)).then_some(value)
}

/// A digest of key and value.
fn seal(key: &str, value: &[u8]) -> [u8; SEAL] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes()).update(key.as_bytes()).update(value);
    let mut seal = [0; SEAL];
    hasher.finalize_xof().fill(&mut seal);
    seal
}
