//! The public door: takes a request, leads it through the stages, and streams the answer.
//!
//! | File | Holds |
//! |---|---|
//! | `life.rs` | the life of a request, top to bottom |
//! | `admission.rs` | how many requests run and wait |
//! | `request.rs` | a request after it was checked |
//! | `models.rs` | what is served, and what each model can do |
//! | `stages.rs` | the short calls: prepare, encode, decode, with deadline and retries |
//! | `language.rs` | the long call: outputs of the language model, carried over to another instance when one dies |
//! | `text.rs`, `picture.rs` | from outputs to text, from codes to pictures |
//! | `answer.rs` | the stream that a client reads; it drives everything above |
//! | `server.rs` | the tonic service |

mod admission;
mod answer;
mod config;
mod error;
mod language;
mod life;
mod metrics;
mod models;
mod picture;
mod request;
mod server;
mod stages;
mod text;

use mesh::{MAX_MESSAGE_BYTES, Routes, Target};
use process::{Host, Offer, Unreachable};
use proto::v1::janua_server::JanuaServer;
use tokio::net::TcpListener;

pub use config::RouterConfig;
pub use server::Router;

/// The router for the models of `host`'s configuration: offered on the mesh, and at the address `[router] listen` over plain HTTP/2.
pub async fn start(host: &Host) -> anyhow::Result<Vec<Offer>> {
    let config: RouterConfig = host.config.section("router")?;
    config.check()?;
    let listener = TcpListener::bind(config.listen)
        .await
        .map_err(|error| Unreachable { what: format!("router.listen: cannot listen on {}: {error}", config.listen) })?;
    let routes = routes(host)?;
    listen(host, listener, routes.clone());
    Ok(vec![Offer { target: Target::new("router", "janua"), routes }])
}

/// The public service, with health and reflection, for the models of `host`'s configuration.
pub fn routes(host: &Host) -> anyhow::Result<Routes> {
    let config: RouterConfig = host.config.section("router")?;
    config.check()?;
    let names: Vec<String> = host.config.models().into_iter().map(|model| model.name).collect();
    let server = JanuaServer::new(Router::new(&host.mesh, &names, config))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    Ok(Routes::new().service(server).reflection(proto::FILE_DESCRIPTOR_SET))
}

/// Serves `routes` to clients outside the mesh until the host's doors close.
pub fn listen(host: &Host, listener: TcpListener, routes: Routes) {
    let closing = host.doors.closing();
    match listener.local_addr() {
        Ok(address) => tracing::info!(%address, "listening for gRPC"),
        Err(error) => tracing::warn!(%error, "listening for gRPC on an unknown address"),
    }
    host.doors.open(async move {
        if let Err(error) = mesh::listen(listener, routes, closing).await {
            tracing::error!(%error, "the public listener failed");
        }
    });
}
