use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode, Uri, uri};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, Connection, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tonic::Status;
use tonic::body::Body;

use super::hall::INSTANCE;
use super::listen::HELLO;
use super::{CONNECTION_WINDOW_BYTES, FRAME_BYTES, HEADER_LIST_BYTES, STREAM_WINDOW_BYTES};
use crate::nats::Located;

/// How long dialling may take, greeting included.
const DIAL_LIMIT: Duration = Duration::from_secs(2);
/// How long a connection with calls on it may be silent before it is asked for a sign of life, and how long that may take.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// One HTTP/2 connection to one instance.
pub(super) struct Line {
    pub located: Located,
    authority: uri::Authority,
    instance: HeaderValue,
    sender: SendRequest<Body>,
    /// How many calls it carries.
    running: AtomicUsize,
}

pub(super) type Driver = Connection<TokioIo<TcpStream>, Body, TokioExecutor>;

impl Line {
    /// Connects, and makes sure that the instance is there: the address may belong to somebody else by now.
    ///
    /// The connection lives as long as the returned driver is polled. Any failure is a sentence for the log.
    pub(super) async fn dial(located: &Located) -> Result<(Arc<Self>, Driver), String> {
        tokio::time::timeout(DIAL_LIMIT, Self::try_dial(located)).await.map_err(|_| format!("no answer within {DIAL_LIMIT:?}"))?
    }

    async fn try_dial(located: &Located) -> Result<(Arc<Self>, Driver), String> {
        let address = located.address.ok_or("it has no address")?;
        let socket = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        socket.set_nodelay(true).map_err(|error| error.to_string())?;
        let (sender, mut driver) = settings().handshake(TokioIo::new(socket)).await.map_err(|error| error.to_string())?;
        let line = Arc::new(Self {
            located: located.clone(),
            authority: uri::Authority::try_from(address.to_string()).map_err(|error| error.to_string())?,
            instance: HeaderValue::try_from(&located.instance).map_err(|error| error.to_string())?,
            sender,
            running: AtomicUsize::new(0),
        });
        let hello = line.sender.clone().send_request(line.address(http::Request::new(Body::empty()), HELLO));
        let answer = tokio::select! {
            answer = hello => answer.map_err(|error| error.to_string())?,
            ended = &mut driver => return Err(format!("the connection ended: {ended:?}")),
        };
        match answer.status() {
            StatusCode::OK => Ok((line, driver)),
            status => Err(format!("another process answers there, with {status}")),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    pub(super) fn load(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    /// Makes one call; gives the request back if the connection ended before it was sent.
    pub(super) async fn send(self: &Arc<Self>, request: http::Request<Body>) -> Result<Result<http::Response<Body>, Status>, http::Request<Body>> {
        let path = request.uri().path().to_owned();
        let failure = Arc::new(OnceLock::new());
        let request = request.map(|body| Body::new(Watched { body, failure: failure.clone() }));
        let on = OnLine::new(self);
        match self.sender.clone().try_send_request(self.address(request, &path)).await {
            Ok(response) => Ok(Ok(response.map(|body| Body::new(Answer { body, on })))),
            Err(mut error) => match error.take_message() {
                Some(request) => Err(request),
                None => Ok(Err(failure.get().cloned().unwrap_or_else(|| on.broken(&error.into_error())))),
            },
        }
    }

    fn address(&self, mut request: http::Request<Body>, path: &str) -> http::Request<Body> {
        let uri = Uri::builder().scheme(uri::Scheme::HTTP).authority(self.authority.clone()).path_and_query(path);
        // A path that was a path before stays one.
        *request.uri_mut() = uri.build().unwrap_or_default();
        *request.version_mut() = http::Version::HTTP_2;
        request.headers_mut().insert(INSTANCE, self.instance.clone());
        request
    }
}

fn settings() -> http2::Builder<TokioExecutor> {
    let mut settings = http2::Builder::new(TokioExecutor::new());
    settings
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE);
    settings
}

/// A call on a line, counted.
struct OnLine(Arc<Line>);

impl OnLine {
    fn new(line: &Arc<Line>) -> Self {
        line.running.fetch_add(1, Ordering::Relaxed);
        Self(line.clone())
    }

    /// Handlers end every call with a status, so whatever else ends one is a connection that broke, which may be tried again;
    /// only what this side has done wrong may not.
    fn broken(&self, error: &hyper::Error) -> Status {
        if error.is_user() {
            return Status::internal(format!("the call cannot be sent: {error}"));
        }
        Status::unavailable(format!("the connection to {} broke: {error}", self.0.authority))
    }
}

impl Drop for OnLine {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request body whose own failure is kept: HTTP/2 would tell the caller only that the stream was reset.
struct Watched {
    body: Body,
    failure: Arc<OnceLock<Status>>,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Err(status))) = &polled {
            // Set nowhere else.
            let _ = self.failure.set(status.clone());
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response body, with errors as gRPC knows them.
struct Answer {
    body: Incoming,
    on: OnLine,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        polled.map(|frame| frame.map(|frame| frame.map_err(|error| self.on.broken(&error))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
