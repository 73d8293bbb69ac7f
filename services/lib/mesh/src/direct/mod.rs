//! The direct wire: HTTP/2 to the address that an instance tells over NATS.
//!
//! NATS finds and watches, the socket carries. Every instance is on the nats wire as well, so a caller that cannot dial any
//! address goes that way; nothing but speed tells the two apart.
//!
//! | File | Holds |
//! |---|---|
//! | `listen.rs` | connections in, also those of clients from outside |
//! | `hall.rs` | the process's listener and the instances behind it |
//! | `line.rs` | one connection out |
//! | `pool.rs` | the connections to the instances of one target |

mod hall;
mod line;
mod listen;
mod pool;

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

/// Flow-control windows in bytes: a 900 KiB unary message took 1.5 ms with these and 3.6 ms with HTTP/2's 64 KiB.
const STREAM_WINDOW_BYTES: u32 = 16 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
const FRAME_BYTES: u32 = 1 << 20;
/// The longest metadata of a call as HTTP/2 counts it: name, value and 32 bytes each.
const HEADER_LIST_BYTES: u32 = 64 << 10;

/// A place in the mesh that dials instances directly.
pub(crate) struct Direct {
    connected: Connected,
    hall: Hall,
    pools: Mutex<HashMap<Target, Arc<Pool>>>,
}

impl Direct {
    pub(crate) async fn connect(url: &str, config: &MeshConfig) -> Result<Self, MeshError> {
        let connected = Node::connect(url, config).await?;
        Ok(Self { connected, hall: Hall::new(config), pools: Mutex::default() })
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
        let pool = lock(&self.pools).entry((*target.target).clone()).or_insert_with(|| Pool::new(self.node(), target)).clone();
        match pool.send(request).await {
            Sent::Done(outcome) => outcome,
            Sent::Unreachable(request) => nats::call(self.node(), target, *request).await,
        }
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
