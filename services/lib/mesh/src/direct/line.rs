use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use h2::{Ping, PingPong, RecvStream};
use http::{HeaderValue, StatusCode, Uri, uri};
use tokio::net::TcpStream;
use tonic::Status;
use tonic::body::Body;

use super::hall::INSTANCE;
use super::listen::HELLO;
use super::stream;
use super::{CONNECTION_WINDOW_BYTES, FRAME_BYTES, HEADER_LIST_BYTES};
use crate::nats::Located;

/// How long dialling may take, greeting included.
const DIAL_LIMIT: Duration = Duration::from_secs(2);
/// How often a connection with calls on it is asked for a sign of life, and how long that may take.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// One HTTP/2 connection to one instance. It closes when nobody holds the line any more.
///
/// On `h2` itself rather than on a client above it, because those keep the sending half of a call in a task that nobody can
/// reach: a caller that drops a call while its request is still under way would cancel nothing.
pub(super) struct Line {
    pub located: Located,
    authority: uri::Authority,
    instance: HeaderValue,
    sender: SendRequest<Bytes>,
    /// How many calls it carries.
    running: AtomicUsize,
}

/// What keeps a line going, to be run by its owner.
pub(super) struct Driver {
    connection: Connection<TcpStream, Bytes>,
    pings: Option<PingPong>,
    /// Ends when the instance withdraws.
    hello: RecvStream,
    line: Weak<Line>,
}

impl Line {
    /// Connects, and makes sure that the instance is there: the address may belong to somebody else by now.
    ///
    /// Any failure is a sentence for the log.
    pub(super) async fn dial(located: &Located, window: u32) -> Result<(Arc<Self>, Driver), String> {
        tokio::time::timeout(DIAL_LIMIT, Self::try_dial(located, window)).await.map_err(|_| format!("no answer within {DIAL_LIMIT:?}"))?
    }

    async fn try_dial(located: &Located, window: u32) -> Result<(Arc<Self>, Driver), String> {
        let address = located.address.ok_or("it has no address")?;
        let socket = TcpStream::connect(address).await.map_err(text)?;
        socket.set_nodelay(true).map_err(text)?;
        let (sender, mut connection) = settings(window).handshake::<_, Bytes>(socket).await.map_err(text)?;
        let line = Arc::new(Self {
            located: located.clone(),
            authority: uri::Authority::try_from(address.to_string()).map_err(text)?,
            instance: HeaderValue::try_from(&located.instance).map_err(text)?,
            sender,
            running: AtomicUsize::new(0),
        });
        let mut hello = http::Request::new(());
        *hello.uri_mut() = Uri::from_static(HELLO);
        let (answer, _) = line.sender.clone().send_request(line.address(hello), true).map_err(text)?;
        let answer = tokio::select! {
            answer = answer => answer.map_err(text)?,
            ended = &mut connection => return Err(format!("the connection ended: {ended:?}")),
        };
        if answer.status() != StatusCode::OK {
            return Err(format!("another process answers there, with {}", answer.status()));
        }
        let pings = connection.ping_pong();
        let driver = Driver { connection, pings, hello: answer.into_body(), line: Arc::downgrade(&line) };
        Ok((line, driver))
    }

    pub(super) fn load(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    /// Makes one call; gives the request back if the connection has ended already.
    pub(super) async fn send(
        self: &Arc<Self>,
        request: http::Request<Body>,
    ) -> Result<Result<http::Response<Body>, Status>, http::Request<Body>> {
        let Ok(mut sender) = self.sender.clone().ready().await else { return Err(request) };
        let on = OnLine::new(self);
        let (parts, body) = request.into_parts();
        let (answer, sending) = match sender.send_request(self.address(http::Request::from_parts(parts, ())), false) {
            Ok(halves) => halves,
            Err(error) => return Ok(Err(on.broken(&error))),
        };
        Ok(stream::exchange(answer, sending, body, on).await)
    }

    fn address(&self, mut request: http::Request<()>) -> http::Request<()> {
        let path = request.uri().path_and_query().cloned();
        let mut parts = uri::Parts::default();
        parts.scheme = Some(uri::Scheme::HTTP);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path.unwrap_or_else(|| uri::PathAndQuery::from_static("/")));
        // All three parts are there, so it cannot fail.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        *request.method_mut() = http::Method::POST;
        *request.version_mut() = http::Version::HTTP_2;
        request.headers_mut().insert(INSTANCE, self.instance.clone());
        request
    }
}

impl Driver {
    /// Carries what goes over the connection until it ends. `farewell` is called when no new call is to be made on it: because
    /// the instance withdraws, which leaves the running ones to end in peace, or because it has ended.
    pub(super) async fn run(self, farewell: impl Fn()) {
        let Self { mut connection, pings, mut hello, line } = self;
        let mut withdrawn = std::pin::pin!(async move { while let Some(Ok(_)) = hello.data().await {} });
        let mut dead = std::pin::pin!(fall_silent(pings, line));
        let mut is_leaving = false;
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection broke");
                    }
                    break;
                }
                () = &mut dead => {
                    tracing::warn!("a connection is given up: the other side gives no sign of life");
                    break;
                }
                () = &mut withdrawn, if !is_leaving => {
                    is_leaving = true;
                    farewell();
                }
            }
        }
        farewell();
    }
}

/// Resolves when the other side does not answer any more while calls are waiting for it.
async fn fall_silent(pings: Option<PingPong>, line: Weak<Line>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        tokio::time::sleep(KEEP_ALIVE).await;
        let is_used = line.upgrade().is_some_and(|line| line.load() > 0);
        // An error means that the connection has ended, which is noticed elsewhere.
        if is_used && tokio::time::timeout(KEEP_ALIVE, pings.ping(Ping::opaque())).await.is_err() {
            return;
        }
    }
}

fn settings(window: u32) -> h2::client::Builder {
    let mut settings = h2::client::Builder::new();
    settings
        .initial_window_size(window)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES)
        .enable_push(false);
    settings
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A call on a line, counted.
pub(super) struct OnLine(Arc<Line>);

impl OnLine {
    fn new(line: &Arc<Line>) -> Self {
        line.running.fetch_add(1, Ordering::Relaxed);
        Self(line.clone())
    }

    /// Handlers end every call with a status, so whatever else ends one is a connection that broke, which may be tried again.
    pub(super) fn broken(&self, error: &h2::Error) -> Status {
        Status::unavailable(format!("the connection to {} broke: {error}", self.0.authority))
    }
}

impl Drop for OnLine {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}
