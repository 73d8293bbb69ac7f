use std::sync::Arc;
use std::time::Duration;

use tonic::Status;

use crate::channel::Channel;
use crate::config::{MeshConfig, Wire};
use crate::error::MeshError;
use crate::gate::{Gate, Instance};
use crate::local::Registry;
use crate::routes::Routes;
use crate::target::Target;

/// This process's place in the mesh: services are offered on it and called through it. Clones share one place.
#[derive(Clone)]
pub struct Mesh {
    shared: Arc<Shared>,
    trace_context: bool,
}

struct Shared {
    wires: Wires,
    max_calls: usize,
}

pub(crate) enum Wires {
    Local(Registry),
}

impl Mesh {
    /// A mesh that reaches no further than this process: no broker, no sockets.
    pub fn in_process() -> Self {
        Self::over(Wires::Local(Registry::default()), &MeshConfig::default())
    }

    /// Joins the mesh that `config` describes.
    pub async fn connect(config: &MeshConfig) -> Result<Self, MeshError> {
        match config.wire {
            Wire::InProcess => Ok(Self::over(Wires::Local(Registry::default()), config)),
            Wire::Nats => Err(MeshError::UrlMissing("nats")),
            Wire::Direct => Err(MeshError::UrlMissing("direct")),
        }
    }

    fn over(wires: Wires, config: &MeshConfig) -> Self {
        Self { shared: Arc::new(Shared { wires, max_calls: config.max_calls }), trace_context: true }
    }

    /// Offers `routes` under `target` until the returned [`Serving`] is drained or dropped. Several instances of one target,
    /// here or in other processes, share its calls.
    pub async fn serve(&self, target: Target, routes: Routes) -> Result<Serving, MeshError> {
        let gate = Gate::new(self.shared.max_calls);
        let instance = Arc::new(Instance { table: routes.table()?, gate });
        match &self.shared.wires {
            Wires::Local(registry) => registry.add(target.clone(), instance.clone()),
        }
        Ok(Serving { mesh: self.clone(), target, instance })
    }

    /// Calls to `target`, wherever it is served.
    pub fn channel(&self, target: &Target) -> Channel {
        Channel::new(self.clone(), target)
    }

    /// Whether any instance takes calls for `target` now.
    pub async fn is_served(&self, target: &Target) -> bool {
        match &self.shared.wires {
            Wires::Local(registry) => registry.is_served(target),
        }
    }

    /// The same place in the mesh, with calls that lose their trace context on purpose: what a tracing test must notice.
    #[doc(hidden)]
    pub fn without_trace_context(mut self) -> Self {
        self.trace_context = false;
        self
    }

    pub(crate) fn carries_trace_context(&self) -> bool {
        self.trace_context
    }

    pub(crate) fn wires(&self) -> &Wires {
        &self.shared.wires
    }
}

/// One offered target. Dropping it withdraws the offer and ends its running calls with UNAVAILABLE.
#[must_use = "dropping it withdraws the offer"]
pub struct Serving {
    mesh: Mesh,
    target: Target,
    instance: Arc<Instance>,
}

impl Serving {
    /// Withdraws the offer without losing a call: health turns to NOT_SERVING, new calls go elsewhere, running ones have
    /// `grace` to finish. Those that do not are ended with UNAVAILABLE.
    pub async fn drain(self, grace: Duration) {
        self.instance.table.routes.set_serving(false);
        self.withdraw();
        if !self.instance.gate.idle(grace).await {
            tracing::warn!(target = %self.target, "calls are still running after the grace period, they are ended");
        }
    }

    /// What is offered.
    pub fn target(&self) -> &Target {
        &self.target
    }

    fn withdraw(&self) {
        self.instance.gate.withdraw();
        match &self.mesh.shared.wires {
            Wires::Local(registry) => registry.remove(&self.target, &self.instance),
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.withdraw();
        self.instance.gate.close(Status::unavailable(format!("this instance of `{}` is shutting down", self.target)));
    }
}
