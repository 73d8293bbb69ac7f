use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};

use http::HeaderName;
use tokio::net::TcpListener;
use tokio::sync::OnceCell;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::listen::{Pick, accept};
use super::stream_window;
use crate::config::MeshConfig;
use crate::error::MeshError;
use crate::gate::Instance;

/// Names the instance that a request is for: several share the process's one address.
pub(super) const INSTANCE: HeaderName = HeaderName::from_static("janua-instance");

/// This process's listener, and the instances behind it by name. It listens from the first offer on.
pub(crate) struct Hall {
    advertise: Option<SocketAddr>,
    bind: Option<SocketAddr>,
    window: u32,
    instances: Arc<RwLock<Instances>>,
    open: OnceCell<Open>,
}

type Instances = HashMap<String, Arc<Instance>>;

struct Open {
    address: SocketAddr,
    _leave: DropGuard,
}

impl Hall {
    pub(super) fn new(config: &MeshConfig) -> Self {
        Self {
            advertise: config.advertise,
            bind: config.bind,
            window: stream_window(config),
            instances: Arc::default(),
            open: OnceCell::new(),
        }
    }

    /// The address to tell others.
    pub(crate) async fn address(&self) -> Result<SocketAddr, MeshError> {
        Ok(self.open.get_or_try_init(|| self.listen()).await?.address)
    }

    /// Takes connections for `instance` under `name` until the returned place is dropped.
    pub(crate) fn admit(&self, name: &str, instance: Arc<Instance>) -> Place {
        self.instances.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), instance);
        Place { instances: self.instances.clone(), name: name.to_owned() }
    }

    async fn listen(&self) -> Result<Open, MeshError> {
        let wanted = self.advertise.unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 0).into());
        let address = self.bind.unwrap_or(wanted);
        let listener = TcpListener::bind(address).await.map_err(|source| MeshError::Listen { address, source })?;
        let bound = listener.local_addr().map_err(|source| MeshError::Listen { address, source })?;
        let address = if wanted.port() == 0 { SocketAddr::new(wanted.ip(), bound.port()) } else { wanted };
        let leave = CancellationToken::new();
        let left = leave.clone();
        tokio::spawn(accept(listener, pick(self.instances.clone()), self.window, async move { left.cancelled().await }));
        Ok(Open { address, _leave: leave.drop_guard() })
    }
}

/// By name; a client from outside, which gives none, gets any instance that offers the service it calls.
fn pick(instances: Arc<RwLock<Instances>>) -> Pick {
    Arc::new(move |path, headers| {
        let instances = instances.read().unwrap_or_else(PoisonError::into_inner);
        match headers.get(INSTANCE) {
            Some(name) => instances.get(name.to_str().ok()?).cloned(),
            None => instances.values().find(|instance| instance.table.find(path).is_some()).cloned(),
        }
    })
}

/// An instance's place behind the listener.
pub(crate) struct Place {
    instances: Arc<RwLock<Instances>>,
    name: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.instances.write().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}
