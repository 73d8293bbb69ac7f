use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tonic::Status;

use crate::bucket::Bucket;
use crate::channel::Channel;
use crate::config::{MeshConfig, Wire};
use crate::direct::{Direct, Place};
use crate::error::MeshError;
use crate::gate::{Gate, Instance};
use crate::local::Registry;
use crate::nats::{self, Connected, Located, Node, Offer};
use crate::routes::Routes;
use crate::target::{InstanceName, Named, Target};

/// How long a closing instance takes for its last words.
const FAREWELL: Duration = Duration::from_secs(1);

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
    Nats(nats::Connected),
    Direct(Direct),
}

impl Wires {
    /// The connection to the broker, on the wires that have one.
    fn node(&self) -> Option<&Arc<Node>> {
        match self {
            Self::Local(_) => None,
            Self::Nats(connected) => Some(&connected.node),
            Self::Direct(direct) => Some(direct.node()),
        }
    }
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
            Wire::Nats => {
                let url = config.nats_url.as_deref().ok_or(MeshError::UrlMissing("nats"))?;
                Ok(Self::over(Wires::Nats(Node::connect(url, config).await?), config))
            }
            Wire::Direct => {
                let url = config.nats_url.as_deref().ok_or(MeshError::UrlMissing("direct"))?;
                Ok(Self::over(Wires::Direct(Direct::connect(url, config).await?), config))
            }
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
        let (mut offer, mut place) = (None, None);
        let name = match &self.shared.wires {
            Wires::Local(registry) => registry.add(target.clone(), instance.clone()),
            Wires::Nats(connected) => {
                let located = Located::new(&connected.node, None);
                let name = located.name();
                offer = Some(Offer::start(&connected.node, &Named::new(&target), &instance, located).await?);
                name
            }
            Wires::Direct(direct) => {
                let located = Located::new(direct.node(), Some(direct.hall().address().await?));
                let name = located.name();
                place = Some(direct.hall().admit(&located.instance, instance.clone()));
                offer = Some(Offer::start(direct.node(), &Named::new(&target), &instance, located).await?);
                name
            }
        };
        Ok(Serving { mesh: self.clone(), target, name, instance, offer, _place: place })
    }

    /// Calls to `target`, wherever it is served.
    pub fn channel(&self, target: &Target) -> Channel {
        Channel::new(self.clone(), target, None)
    }

    /// Calls to one instance of `target` and to no other: UNAVAILABLE at once when it is gone (killed, drained, or never was).
    pub fn channel_to(&self, target: &Target, instance: &InstanceName) -> Channel {
        Channel::new(self.clone(), target, Some(instance.clone()))
    }

    /// The instances of `target` that take calls now, as far as they answer within a moment. Empty at once when there is none.
    pub async fn instances(&self, target: &Target) -> BTreeSet<InstanceName> {
        let located = match &self.shared.wires {
            Wires::Local(registry) => return registry.instances(target),
            Wires::Nats(Connected { node, .. }) => nats::locate(node, &Named::new(target)).await,
            Wires::Direct(direct) => nats::locate(direct.node(), &Named::new(target)).await,
        };
        located.iter().map(Located::name).collect()
    }

    /// A set of small values that all processes of the mesh see, and that outlives them. It is made when nobody has used it
    /// before. `name` is made of ASCII letters, digits, `-` and `_`.
    ///
    /// Wires `nats` and `direct` keep it in the nats-server, which must run with JetStream; in-process it ends with the mesh.
    pub async fn bucket(&self, name: &str) -> Result<Bucket, MeshError> {
        Bucket::open(&self.shared.wires, name).await
    }

    /// Whether any instance takes calls for `target` now.
    pub async fn is_served(&self, target: &Target) -> bool {
        match &self.shared.wires {
            Wires::Local(registry) => registry.is_served(target),
            Wires::Nats(Connected { node, .. }) => nats::is_served(node, &Named::new(target)).await,
            Wires::Direct(direct) => nats::is_served(direct.node(), &Named::new(target)).await,
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
    name: InstanceName,
    instance: Arc<Instance>,
    offer: Option<Offer>,
    _place: Option<Place>,
}

impl Serving {
    /// Withdraws the offer without losing a call: health turns to NOT_SERVING, new calls go elsewhere, running ones have
    /// `grace` to finish. Those that do not are ended with UNAVAILABLE.
    pub async fn drain(self, grace: Duration) {
        self.instance.table.routes.set_serving(false);
        self.withdraw();
        let finished = async {
            if let Some(offer) = &self.offer {
                offer.left().await;
            }
            self.instance.gate.idle().await;
        };
        if tokio::time::timeout(grace, finished).await.is_err() {
            tracing::warn!(offer = %self.target, "calls are still running after the grace period, they are ended");
            self.close();
            // Their callers are told so; a moment is enough for that.
            let _ = tokio::time::timeout(FAREWELL, self.instance.gate.idle()).await;
        }
        if let Some(node) = self.mesh.shared.wires.node() {
            // Fails only when the connection is gone, and with it what was to be sent.
            let _ = tokio::time::timeout(FAREWELL, node.client.flush()).await;
        }
    }

    /// What is offered.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The name that this instance goes by.
    pub fn instance(&self) -> &InstanceName {
        &self.name
    }

    fn withdraw(&self) {
        self.instance.gate.withdraw();
        match &self.mesh.shared.wires {
            Wires::Local(registry) => registry.remove(&self.target, &self.name),
            Wires::Nats(_) | Wires::Direct(_) => {}
        }
    }

    fn close(&self) {
        self.instance.gate.close(Status::unavailable(format!("this instance of `{}` is shutting down", self.target)));
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.withdraw();
        self.close();
    }
}
