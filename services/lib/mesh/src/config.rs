use std::net::SocketAddr;

use serde::Deserialize;

/// How calls travel between services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wire {
    /// Function calls inside one process.
    #[default]
    InProcess,
    /// Messages through a nats-server.
    Nats,
    /// HTTP/2 straight to the instance, found through a nats-server.
    Direct,
}

/// Section `[mesh]` of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MeshConfig {
    pub wire: Wire,
    /// Where the nats-server is, as `nats://host:4222`; several separated by commas. Needed by wires `nats` and `direct`.
    pub nats_url: Option<String>,
    /// Wire `direct`: the address other processes dial, told to them over NATS. Port 0 takes a free one.
    pub advertise: Option<SocketAddr>,
    /// Wire `direct`: the address to listen on when it is not the advertised one, as inside a container.
    pub bind: Option<SocketAddr>,
    /// How many bytes of a stream may be under way to a reader that has not taken them yet, per call and direction.
    pub window_bytes: usize,
    /// How many calls an offered service runs at once; more are answered with RESOURCE_EXHAUSTED.
    pub max_calls: usize,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self { wire: Wire::InProcess, nats_url: None, advertise: None, bind: None, window_bytes: 2 << 20, max_calls: 1024 }
    }
}

impl MeshConfig {
    /// Wire `nats` over the server at `url`, everything else by default.
    pub fn nats(url: impl Into<String>) -> Self {
        Self { wire: Wire::Nats, nats_url: Some(url.into()), ..Self::default() }
    }

    /// Wire `direct` on a free port of the loopback interface, found through the server at `url`.
    pub fn direct(url: impl Into<String>) -> Self {
        Self { wire: Wire::Direct, nats_url: Some(url.into()), ..Self::default() }
    }
}
