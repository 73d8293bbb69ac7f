//! HTTP/2 in: connections, their settings, and their graceful end.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body::Frame;
use http_body_util::StreamBody;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::SetOnce;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;

use super::{CONNECTION_WINDOW_BYTES, FRAME_BYTES, HEADER_LIST_BYTES, stream_window};
use crate::call;
use crate::config::MeshConfig;
use crate::error::MeshError;
use crate::gate::{Gate, Instance, Visit};
use crate::routes::Routes;

/// Calls that one connection may carry at once; an instance's own limit answers with a status before this one makes callers wait.
const CALLS_PER_CONNECTION: u32 = 4096;
/// How long a connection may be silent before it is asked for a sign of life, and how long that may take.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Accepting fails for passing reasons (no file descriptor left): wait so long before the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `routes` to any gRPC client over plain HTTP/2, with the deadlines, spans and limits of the other wires.
///
/// After `shutdown` no connection is taken and clients are told to leave; this returns when the last running call has ended.
/// Dropping the future ends those calls.
pub async fn listen(listener: TcpListener, routes: Routes, shutdown: impl Future<Output = ()>) -> Result<(), MeshError> {
    let config = MeshConfig::default();
    let gate = Gate::new(config.max_calls);
    let instance = Arc::new(Instance { table: routes.table()?, gate });
    let pick: Pick = Arc::new(move |_, _| Some(instance.clone()));
    accept(listener, pick, stream_window(&config), shutdown).await;
    Ok(())
}

/// Asked by a peer before its first call: OK if the instance that its headers name is here.
pub(super) const HELLO: &str = "/janua-hello";

/// Finds the instance that a request is for by its path and headers.
pub(super) type Pick = Arc<dyn Fn(&str, &http::HeaderMap) -> Option<Arc<Instance>> + Send + Sync>;

/// The instance that a connection is used for, which therefore waits for it when it withdraws.
struct UsedFor {
    instance: Arc<Instance>,
    /// By a peer of the mesh.
    is_greeted: bool,
    _visit: Visit,
}

/// Takes connections until `shutdown`, then lets them end in their own time.
pub(super) async fn accept(listener: TcpListener, pick: Pick, window: u32, shutdown: impl Future<Output = ()>) {
    let leave = CancellationToken::new();
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
            // Reaps what has ended, so that the set holds live connections only.
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((socket, peer)) => {
                connections.spawn(serve(socket, peer, pick.clone(), window, leave.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    leave.cancel();
    while connections.join_next().await.is_some() {}
}

/// One connection. It is told to leave when the process stops listening, or when the instance that it is used for withdraws.
///
/// HTTP/2's way to say so, GOAWAY, can lose calls that are made while it is under way. A peer of the mesh has therefore greeted
/// first, learns of the withdrawal by the end of the answer to that, and closes the connection itself after its last call.
async fn serve(socket: TcpStream, peer: SocketAddr, pick: Pick, window: u32, leave: CancellationToken) {
    // Without it small frames wait for acknowledgements. It fails only on a socket that is dead already.
    let _ = socket.set_nodelay(true);
    let used_for = Arc::new(SetOnce::new());
    let service = service_fn({
        let used_for = used_for.clone();
        move |request: http::Request<Incoming>| answer(&pick, &used_for, request)
    });
    let connection = settings(window).serve_connection(TokioIo::new(socket), service);
    tokio::pin!(connection);
    let withdrawn = async {
        match used_for.wait().await {
            UsedFor { is_greeted: true, .. } => std::future::pending().await,
            UsedFor { instance, .. } => instance.gate.withdrawn().await,
        }
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = leave.cancelled() => None,
        () = withdrawn => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "a connection broke");
    }
}

fn answer(
    pick: &Pick,
    used_for: &SetOnce<UsedFor>,
    request: http::Request<Incoming>,
) -> impl Future<Output = Result<http::Response<Body>, Infallible>> + use<> {
    let picked = pick(request.uri().path(), request.headers());
    let is_greeted = request.uri().path() == HELLO;
    if let Some(instance) = &picked {
        // Fails on every request but the first: a peer uses one connection for one instance.
        let _ = used_for.set(UsedFor { instance: instance.clone(), is_greeted, _visit: instance.gate.visit() });
    }
    let call = match picked {
        _ if is_greeted => Err(greeting(picked)),
        Some(instance) => Ok(call::start(&instance.table, &instance.gate, request.map(Body::new))),
        None => Err(Status::unavailable("the called target is not offered here").into_http()),
    };
    async {
        Ok(match call {
            Ok(call) => call.await,
            Err(answer) => answer,
        })
    }
}

/// Says whether the instance is here, and later, by the end of the body, that it withdraws.
fn greeting(instance: Option<Arc<Instance>>) -> http::Response<Body> {
    let Some(instance) = instance.filter(|instance| !instance.gate.is_withdrawn()) else {
        let mut refusal = http::Response::new(Body::empty());
        *refusal.status_mut() = http::StatusCode::MISDIRECTED_REQUEST;
        return refusal;
    };
    let withdrawn =
        stream::once(async move { instance.gate.withdrawn().await }).filter_map(async |()| None::<Result<Frame<Bytes>, Status>>);
    http::Response::new(Body::new(StreamBody::new(withdrawn)))
}

fn settings(window: u32) -> http2::Builder<TokioExecutor> {
    let mut settings = http2::Builder::new(TokioExecutor::new());
    settings
        .timer(TokioTimer::new())
        .initial_stream_window_size(window)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_send_buf_size(window as usize)
        .max_header_list_size(HEADER_LIST_BYTES)
        .max_concurrent_streams(CALLS_PER_CONNECTION)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE);
    settings
}
