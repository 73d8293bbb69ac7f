use std::io;
use std::net::SocketAddr;

/// Why the mesh could not be joined, or a service not be offered on it. Failures of single calls are `tonic::Status`.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    #[error("setting `nats_url` is missing, wire `{0}` needs it")]
    UrlMissing(&'static str),
    #[error("cannot connect to nats-server at {url}")]
    Connect { url: String, source: async_nats::ConnectError },
    #[error("nats-server at {url} allows messages of {max_payload} bytes, at least {least} are needed")]
    PayloadTooSmall { url: String, max_payload: usize, least: usize },
    #[error("cannot subscribe to `{subject}`")]
    Subscribe { subject: String, source: async_nats::SubscribeError },
    #[error("nats-server does not pass on messages")]
    Settle(#[source] async_nats::client::RequestError),
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot take connections")]
    Accept(#[source] io::Error),
    #[error("the descriptors handed to reflection cannot be read")]
    Reflection(#[from] tonic_reflection::server::Error),
}
