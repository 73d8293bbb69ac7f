//! The direct wire: HTTP/2 to the address that an instance tells over NATS.
//!
//! NATS finds and watches, the socket carries. Every instance is on the nats wire as well, so a caller that cannot dial any
//! address goes that way; nothing but speed tells the two apart.
//!
//! | File | Holds |
//! |---|---|
//! | `listen.rs` | connections in, also those of clients from outside |
//! | `hall.rs` | the process's listener and the instances behind it |
//! | `line.rs`, `stream.rs` | one connection out, one call on it |
//! | `pool.rs` | the connections to the instances of one target |

mod hall;
mod line;
mod listen;
mod pool;
mod stream;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tonic::Status;
use tonic::body::Body;

pub use listen::listen;

use crate::call::lock;
use crate::config::MeshConfig;
use crate::error::MeshError;
use crate::nats::{self, Connected, Node};
use crate::target::{Named, Target};
use hall::Hall;
pub(crate) use hall::Place;
use pool::{Pool, Sent};

/// The window of a whole connection, in bytes: HTTP/2's largest. Credit of a connection comes back only as its streams are
/// read, so with less a few stalled readers would stop everybody else; each stream has its own window.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;
const FRAME_BYTES: u32 = 1 << 20;
/// The longest metadata of a call as HTTP/2 counts it: name, value and 32 bytes each.
const HEADER_LIST_BYTES: u32 = 64 << 10;

/// The window of one stream. HTTP/2's own 64 KiB would make a 900 KiB message take 3.6 ms instead of 1.5.
fn stream_window(config: &MeshConfig) -> u32 {
    u32::try_from(config.window_bytes).unwrap_or(u32::MAX).clamp(64 << 10, CONNECTION_WINDOW_BYTES)
}

/// A place in the mesh that dials instances directly.
pub(crate) struct Direct {
    connected: Connected,
    hall: Hall,
    pools: Mutex<HashMap<Target, Arc<Pool>>>,
    window: u32,
}

impl Direct {
    pub(crate) async fn connect(url: &str, config: &MeshConfig) -> Result<Self, MeshError> {
        let connected = Node::connect(url, config).await?;
        Ok(Self { connected, hall: Hall::new(config), pools: Mutex::default(), window: stream_window(config) })
    }

    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.connected.node
    }

    pub(crate) fn hall(&self) -> &Hall {
        &self.hall
    }

    /// Calls an instance of `target` over its connection, or over NATS when none can be dialled.
    pub(crate) async fn call(&self, target: &Named, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        check_metadata(request.headers())?;
        match self.pool(target).send(request).await {
            Sent::Done(outcome) => outcome,
            Sent::Unreachable(request) => nats::call(self.node(), target, *request).await,
        }
    }

    fn pool(&self, target: &Named) -> Arc<Pool> {
        let mut pools = lock(&self.pools);
        if let Some(pool) = pools.get(&*target.target) {
            return pool.clone();
        }
        let pool = Pool::new(self.node(), target, self.window);
        pools.insert((*target.target).clone(), pool.clone());
        pool
    }
}

/// Refuses what the other side would answer by breaking the connection.
fn check_metadata(headers: &http::HeaderMap) -> Result<(), Status> {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
    // Some room is left for what HTTP/2 adds.
    if bytes + 1024 > HEADER_LIST_BYTES as usize {
        return Err(Status::resource_exhausted(format!("metadata of {bytes} bytes does not fit {HEADER_LIST_BYTES} bytes of headers")));
    }
    Ok(())
}
