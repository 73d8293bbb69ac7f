//! A service whose handlers each test writes itself, for what `service.rs` cannot be asked for, and content that shows every
//! misplaced byte.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, Stream, StreamExt as _, stream};
use mesh::{MAX_MESSAGE_BYTES, Routes};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming};

use crate::generated::conformance_server::{Conformance, ConformanceServer};
use crate::generated::{Ask, Blob, Sum};
use crate::world::LIMIT;

pub type Blobs = BoxStream<'static, Result<Blob, Status>>;
type Answer<T> = Result<Response<T>, Status>;
type Handler<Q, A> = Arc<dyn Fn(Request<Q>) -> BoxFuture<'static, Answer<A>> + Send + Sync>;

/// Handlers by method; those not given answer UNIMPLEMENTED.
#[derive(Clone)]
pub struct Script {
    unary: Handler<Ask, Blob>,
    upload: Handler<Streaming<Blob>, Sum>,
    download: Handler<Ask, Blobs>,
    chat: Handler<Streaming<Blob>, Blobs>,
}

impl Script {
    pub fn new() -> Self {
        Self { unary: handler(nothing), upload: handler(nothing), download: handler(nothing), chat: handler(nothing) }
    }

    /// Echoes what it is sent, in Unary and Chat; Download makes `count` random blobs of `size` bytes at most, numbered from 0;
    /// Upload checks that it gets such blobs. `census` counts its handlers and `size` is that of Upload's blobs.
    pub fn random(census: &Census, size: usize) -> Self {
        let counts = [(); 4].map(|()| census.clone());
        let [unary, upload, download, chat] = counts;
        Self::new()
            .unary(move |request| {
                let present = unary.enter();
                async move {
                    let _present = present;
                    Ok(Response::new(Blob { data: request.into_inner().data, ..Blob::default() }))
                }
            })
            .upload(move |request| {
                let present = upload.enter();
                async move {
                    let _present = present;
                    Ok(Response::new(sum(request.into_inner(), size).await?))
                }
            })
            .download(move |request| {
                let present = download.enter();
                let ask = request.into_inner();
                let blobs = numbered(0..u64::from(ask.count), ask.size as usize).map(Ok);
                async move { Ok(Response::new(during(present, blobs).boxed())) }
            })
            .chat(move |request| {
                let present = chat.enter();
                async move { Ok(Response::new(during(present, request.into_inner()).boxed())) }
            })
    }

    pub fn unary<F: Future<Output = Answer<Blob>> + Send + 'static>(
        mut self,
        run: impl Fn(Request<Ask>) -> F + Send + Sync + 'static,
    ) -> Self {
        self.unary = handler(run);
        self
    }

    pub fn upload<F: Future<Output = Answer<Sum>> + Send + 'static>(
        mut self,
        run: impl Fn(Request<Streaming<Blob>>) -> F + Send + Sync + 'static,
    ) -> Self {
        self.upload = handler(run);
        self
    }

    pub fn download<F: Future<Output = Answer<Blobs>> + Send + 'static>(
        mut self,
        run: impl Fn(Request<Ask>) -> F + Send + Sync + 'static,
    ) -> Self {
        self.download = handler(run);
        self
    }

    pub fn chat<F: Future<Output = Answer<Blobs>> + Send + 'static>(
        mut self,
        run: impl Fn(Request<Streaming<Blob>>) -> F + Send + Sync + 'static,
    ) -> Self {
        self.chat = handler(run);
        self
    }

    pub fn server(self) -> ConformanceServer<Self> {
        ConformanceServer::new(self).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    pub fn routes(self) -> Routes {
        Routes::new().service(self.server())
    }
}

fn handler<Q: 'static, A: 'static, F: Future<Output = Answer<A>> + Send + 'static>(
    run: impl Fn(Request<Q>) -> F + Send + Sync + 'static,
) -> Handler<Q, A> {
    Arc::new(move |request| run(request).boxed())
}

async fn nothing<Q, A>(_: Request<Q>) -> Answer<A> {
    Err(Status::unimplemented("the test has not said what to do"))
}

#[tonic::async_trait]
impl Conformance for Script {
    async fn unary(&self, request: Request<Ask>) -> Answer<Blob> {
        (self.unary)(request).await
    }

    async fn upload(&self, request: Request<Streaming<Blob>>) -> Answer<Sum> {
        (self.upload)(request).await
    }

    type DownloadStream = Blobs;

    async fn download(&self, request: Request<Ask>) -> Answer<Blobs> {
        (self.download)(request).await
    }

    type ChatStream = Blobs;

    async fn chat(&self, request: Request<Streaming<Blob>>) -> Answer<Blobs> {
        (self.chat)(request).await
    }
}

/// Counts what is alive: handlers, or the streams of a caller.
#[derive(Clone)]
pub struct Census(Arc<watch::Sender<usize>>);

impl Census {
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    pub fn enter(&self) -> Present {
        self.0.send_modify(|count| *count += 1);
        Present(self.clone())
    }

    /// Waits until so many are alive.
    pub async fn reaches(&self, what: &str, expected: usize) {
        let mut count = self.0.subscribe();
        let reached = tokio::time::timeout(LIMIT, count.wait_for(|count| *count == expected)).await.is_ok();
        assert!(reached, "{what}: {} in place of {expected}", *self.0.borrow());
    }
}

/// Alive until dropped.
pub struct Present(Census);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

/// `blobs`, keeping `present` until they are dropped.
pub fn during<T>(present: Present, blobs: impl Stream<Item = T> + Send + 'static) -> impl Stream<Item = T> + Send + 'static {
    blobs.map(move |blob| {
        let _ = &present;
        blob
    })
}

/// Bytes that depend on their place and on `seed` (splitmix64).
pub fn content(seed: u64, length: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0xA24B_AED4_963E_E407);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        bytes.extend_from_slice(&mix(state).to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

/// A well-spread function of its argument.
pub fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// How long blob `number` is, of `size` bytes at most.
fn length(number: u64, size: usize) -> usize {
    (mix(number) % (size as u64 + 1)) as usize
}

pub fn blob(number: u64, size: usize) -> Blob {
    Blob { data: content(number, length(number, size)), number, ..Blob::default() }
}

pub fn numbered(numbers: std::ops::Range<u64>, size: usize) -> impl Stream<Item = Blob> + Send + 'static {
    stream::iter(numbers).map(move |number| blob(number, size))
}

/// Whether this is exactly blob `number`.
pub fn is_blob(got: &Blob, number: u64, size: usize) -> bool {
    got.number == number && got.data.len() == length(number, size) && got.data == content(number, got.data.len())
}

/// Reads numbered blobs to their end.
pub async fn sum(mut blobs: Streaming<Blob>, size: usize) -> Result<Sum, Status> {
    let mut sum = Sum::default();
    while let Some(got) = blobs.message().await? {
        if !is_blob(&got, sum.count, size) {
            return Err(Status::data_loss(format!("blob {} came wrong as {} of {} bytes", sum.count, got.number, got.data.len())));
        }
        sum.count += 1;
        sum.bytes += got.data.len() as u64;
    }
    Ok(sum)
}
