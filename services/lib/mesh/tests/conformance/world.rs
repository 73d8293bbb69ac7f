//! Where a case runs: a wire, the broker it needs, a serving and a calling side.

use std::time::Duration;

use mesh::{InstanceName, Mesh, MeshConfig, Routes, Serving, Target};
use testkit::{NatsOptions, NatsServer};

use crate::generated::conformance_client::ConformanceClient;
use crate::service::Service;

pub type Client = ConformanceClient<mesh::Channel>;

/// How long anything may take before a case counts as stuck. It is no measurement: the machines that run this are busy.
pub const LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    InProcess,
    Nats,
    /// The nats wire over a broker that allows messages of 64 KiB only.
    NatsShort,
    Direct,
}

pub struct World {
    pub over: Over,
    pub broker: Option<NatsServer>,
    /// The serving side's place in the mesh, and the calling side's: two connections, unless in-process.
    pub serving: Mesh,
    pub calling: Mesh,
    pub target: Target,
}

impl World {
    pub async fn new(over: Over) -> Self {
        Self::with(over, |config| config).await
    }

    /// A world whose serving side is configured otherwise.
    pub async fn with(over: Over, adapt: impl Fn(MeshConfig) -> MeshConfig) -> Self {
        let max_payload = (over == Over::NatsShort).then_some(64 << 10);
        let options = NatsOptions { max_payload, ..NatsOptions::default() };
        let broker = if over == Over::InProcess { None } else { Some(NatsServer::start_with(options).await) };
        let url = broker.as_ref().map(NatsServer::url).unwrap_or_default();
        let config = config(over, &url);
        let serving = Mesh::connect(&adapt(config.clone())).await.expect("the serving side joins");
        let calling = match over {
            Over::InProcess => serving.clone(),
            _ => Mesh::connect(&config).await.expect("the calling side joins"),
        };
        Self { over, broker, serving, calling, target: Target::new("conformance", "test/1.0") }
    }

    pub async fn serve(&self, service: &Service) -> Serving {
        self.serve_routes(service.routes()).await
    }

    pub async fn serve_routes(&self, routes: Routes) -> Serving {
        self.serving.serve(self.target.clone(), routes).await.expect("the service is offered")
    }

    pub fn client(&self) -> Client {
        client(self.calling.channel(&self.target))
    }

    /// Calls to one instance of the target.
    pub fn client_to(&self, instance: &InstanceName) -> Client {
        client(self.calling.channel_to(&self.target, instance))
    }

    /// One more process's place in the mesh; in-process there is but one.
    pub async fn another(&self) -> Mesh {
        match self.over {
            Over::InProcess => self.serving.clone(),
            over => Mesh::connect(&config(over, &self.url())).await.expect("another side joins"),
        }
    }

    pub fn url(&self) -> String {
        self.broker.as_ref().map(NatsServer::url).unwrap_or_default()
    }
}

fn client(channel: mesh::Channel) -> Client {
    ConformanceClient::new(channel).max_decoding_message_size(mesh::MAX_MESSAGE_BYTES).max_encoding_message_size(mesh::MAX_MESSAGE_BYTES)
}

pub fn config(over: Over, url: &str) -> MeshConfig {
    match over {
        Over::InProcess => MeshConfig::default(),
        Over::Nats | Over::NatsShort => MeshConfig::nats(url),
        Over::Direct => MeshConfig::direct(url),
    }
}

/// Runs one case on one wire, and fails it when it is stuck.
pub fn run<F: Future<Output = ()>>(over: Over, case: impl FnOnce(Over) -> F) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        assert!(tokio::time::timeout(2 * LIMIT, case(over)).await.is_ok(), "the case is stuck");
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// Makes a test of each case for each wire named.
#[macro_export]
macro_rules! conformance {
    (@case $case:ident [$($over:ident)*]) => {
        mod $case {
            $(
                #[test]
                #[allow(non_snake_case)]
                fn $over() {
                    $crate::world::run($crate::world::Over::$over, super::$case);
                }
            )*
        }
    };
    // The list of wires is one token here, to be repeated as a whole.
    ($overs:tt $($case:ident)*) => {
        $(conformance!(@case $case $overs);)*
    };
}
