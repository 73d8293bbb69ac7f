use std::io;
use std::net::SocketAddr;

/// Why the mesh could not be joined, a service not be offered on it, or a bucket not be used. Failures of single calls are `tonic::Status`.
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
    #[error("bucket `{0}` has a name with other characters than ASCII letters, digits, `-` and `_`")]
    BucketName(String),
    #[error("bucket `{bucket}` is kept in JetStream, which nats-server runs without; start it with `nats-server --jetstream`")]
    NoJetStream { bucket: String },
    #[error("bucket `{bucket}` cannot be opened")]
    BucketOpen { bucket: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("`{key}` cannot be written in bucket `{bucket}`")]
    BucketWrite { bucket: String, key: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("a key of {bytes} bytes as it is spelled in bucket `{bucket}` is too long, {most} are allowed")]
    BucketKey { bucket: String, bytes: usize, most: usize },
    #[error("a value of {bytes} bytes for `{key}` in bucket `{bucket}` is too long, {most} are allowed")]
    BucketValue { bucket: String, key: String, bytes: usize, most: usize },
}
