use std::path::PathBuf;

use janua::local::{Local, LocalOptions};
use proto::v1;
use proto::v1::janua_client::JanuaClient;
use testkit::NatsServer;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::Answer;

/// A client of the public door, over HTTP/2.
pub type Client = JanuaClient<Channel>;

/// How services talk to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    InProcess,
    Nats,
    Direct,
}

impl Wire {
    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::InProcess => "in-process",
            Self::Nats => "nats",
            Self::Direct => "direct",
        }
    }
}

/// For all models of a world together.
const KV_CACHE_BYTES: &str = "268435456";

/// All services in this process, and the broker they need.
pub struct World {
    local: Local,
    channel: Channel,
    /// Stops when the world does.
    _nats: Option<NatsServer>,
}

impl World {
    /// Starts services for fixtures (`llama`, `janus`, ...), each under its folder's name.
    pub async fn start(wire: Wire, fixtures: &[&str]) -> Self {
        Self::start_with(wire, fixtures, &[]).await
    }

    /// As [`World::start`], with settings (`section.key`, value) changed.
    pub async fn start_with(wire: Wire, fixtures: &[&str], settings: &[(&str, &str)]) -> Self {
        Self::build(wire, fixtures, settings, true).await
    }

    /// As [`World::start`], with calls between services that lose their trace context on purpose.
    pub async fn without_trace_context(wire: Wire, fixtures: &[&str]) -> Self {
        Self::build(wire, fixtures, &[], false).await
    }

    /// Services that use a broker which is there already, or none, as the settings say.
    pub async fn beside(fixtures: &[&str], settings: &[(&str, &str)]) -> Self {
        Self::launch(fixtures, settings, true, None).await
    }

    async fn build(wire: Wire, fixtures: &[&str], settings: &[(&str, &str)], trace_context: bool) -> Self {
        let nats = match wire {
            Wire::InProcess => None,
            Wire::Nats | Wire::Direct => Some(NatsServer::start().await),
        };
        let url = nats.as_ref().map(NatsServer::url).unwrap_or_default();
        let mut settings = settings.to_vec();
        settings.push(("mesh.wire", wire.name()));
        if nats.is_some() {
            settings.push(("mesh.nats_url", &url));
        }
        Self::launch(fixtures, &settings, trace_context, nats).await
    }

    async fn launch(fixtures: &[&str], settings: &[(&str, &str)], trace_context: bool, nats: Option<NatsServer>) -> Self {
        // Many worlds live in one process, and one test watches its address space: a cache for the whole context of every sequence is too much.
        let settings = [("language.kv_cache_bytes", KV_CACHE_BYTES)].iter().chain(settings);
        let settings: Vec<(String, String)> = settings.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let models: Vec<(String, PathBuf)> = fixtures.iter().map(|name| ((*name).to_owned(), testkit::fixture(name))).collect();
        let mut options = LocalOptions::with_settings(models, &settings).unwrap().quiet();
        options.trace_context = trace_context;
        let local = Local::start(options).await.unwrap();
        let channel = Endpoint::from_shared(local.address()).unwrap().connect().await.unwrap();
        Self { local, channel, _nats: nats }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        self.local.address()
    }

    /// The connection to the door, for hand-made calls.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The way to the router over the wire between services, past the door.
    pub fn router(&self) -> mesh::Channel {
        self.local.router()
    }

    /// A client of the door.
    pub fn client(&self) -> Client {
        JanuaClient::new(self.channel())
            .max_decoding_message_size(mesh::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(mesh::MAX_MESSAGE_BYTES)
    }

    /// Sends a request and reads its answer to the end.
    pub async fn ask(&self, request: v1::GenerateRequest) -> Result<Answer, Status> {
        Answer::read(self.client().generate(request).await?.into_inner()).await
    }

    /// Stops everything in order.
    pub async fn stop(self) {
        self.local.drain().await;
    }
}
