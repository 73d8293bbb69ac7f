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
//! | `pool.rs` | the connections to the instances of one target, or to one of them |

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
use crate::target::{InstanceName, Named, Target};
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
    pools: Mutex<HashMap<Target, Pools>>,
    window: u32,
}

/// The connections that calls to one target use.
#[derive(Default)]
struct Pools {
    any: Option<Arc<Pool>>,
    /// Those of calls that only one instance may run. Instances come and go: see [`Pool::is_over`].
    one: HashMap<InstanceName, Arc<Pool>>,
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

    /// Calls any instance of `target`, or only the one that is named, over its connection, or over NATS when it cannot be dialled.
    pub(crate) async fn call(
        &self,
        target: &Named,
        instance: Option<&InstanceName>,
        request: http::Request<Body>,
    ) -> Result<http::Response<Body>, Status> {
        check_metadata(request.headers())?;
        match self.pool(target, instance).send(request).await {
            Sent::Done(outcome) => outcome,
            Sent::Unreachable(request) => nats::call(self.node(), target, instance, *request).await,
        }
    }

    fn pool(&self, target: &Named, instance: Option<&InstanceName>) -> Arc<Pool> {
        let mut pools = lock(&self.pools);
        let known = pools.get(&*target.target).and_then(|pools| match instance {
            None => pools.any.as_ref(),
            Some(instance) => pools.one.get(instance).filter(|pool| !pool.is_over()),
        });
        if let Some(pool) = known {
            return pool.clone();
        }
        let pool = Pool::new(self.node(), target, instance, self.window);
        // So there are never more than there were instances at a time.
        pools.values_mut().for_each(|pools| pools.one.retain(|_, pool| !pool.is_over()));
        let own = pools.entry((*target.target).clone()).or_default();
        match instance {
            None => own.any = Some(pool.clone()),
            Some(instance) => drop(own.one.insert(instance.clone(), pool.clone())),
        }
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use testkit::NatsServer;
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn instances_that_are_gone_leave_no_pool_behind() {
        let broker = NatsServer::start().await;
        let direct = Direct::connect(&broker.url(), &MeshConfig::default()).await.unwrap();
        let targets = ["a", "b"].map(|model| Named::new(&Target::new("test", model)));
        for number in 0..20 {
            for target in &targets {
                let instance = InstanceName::from(format!("gone-{number}").as_str());
                let request = http::Request::new(Body::empty());
                assert_eq!(direct.call(target, Some(&instance), request).await.unwrap_err().code(), Code::Unavailable);
                // Its keeper has yet to see that there is nothing to keep.
                let pool = direct.pool(target, Some(&instance));
                testkit::wait_until("it to be over", std::time::Duration::from_secs(20), async || pool.is_over()).await;
            }
            let pools: usize = lock(&direct.pools).values().map(|pools| pools.one.len()).sum();
            assert!(pools <= 2, "{pools} pools");
        }
    }
}
