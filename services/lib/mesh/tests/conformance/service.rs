//! The service under test: does what requests say, and lets the test watch.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use mesh::{MAX_MESSAGE_BYTES, Routes};
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::generated::conformance_server::{Conformance, ConformanceServer};
use crate::generated::{Ask, Blob, End, FILE_DESCRIPTOR_SET, Sum};

/// What a test sees of the handlers of one instance.
#[derive(Default)]
pub struct Watch {
    pub started: AtomicUsize,
    /// Handlers that have been dropped, finished or not.
    pub dropped: AtomicUsize,
    /// Messages that Download has made.
    pub produced: AtomicUsize,
}

impl Watch {
    pub fn count(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::SeqCst)
    }

    fn enter(self: &Arc<Self>) -> Entered {
        self.started.fetch_add(1, Ordering::SeqCst);
        Entered(self.clone())
    }
}

/// One running handler.
struct Entered(Arc<Watch>);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Clone)]
pub struct Service {
    pub instance: String,
    pub watch: Arc<Watch>,
    /// Upload takes a permit before each message when a test holds it back.
    pub gate: Option<Arc<Semaphore>>,
}

impl Service {
    pub fn named(instance: &str) -> Self {
        Self { instance: instance.to_owned(), watch: Arc::default(), gate: None }
    }

    pub fn routes(&self) -> Routes {
        let server = ConformanceServer::new(self.clone());
        let server = server.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
        Routes::new().service(server).reflection(FILE_DESCRIPTOR_SET)
    }

    fn blob(&self, number: u64, size: usize) -> Blob {
        Blob { data: Bytes::from(vec![number as u8; size]), number, instance: self.instance.clone() }
    }
}

type Blobs = Pin<Box<dyn Stream<Item = Result<Blob, Status>> + Send>>;

#[tonic::async_trait]
impl Conformance for Service {
    async fn unary(&self, request: Request<Ask>) -> Result<Response<Blob>, Status> {
        let _entered = self.watch.enter();
        let metadata = request.metadata().clone();
        let ask = request.into_inner();
        tracing::info_span!("handler").in_scope(|| {});
        finish(ask.end()).await?;
        let mut response = Response::new(Blob { data: ask.data, number: 0, instance: self.instance.clone() });
        for value in metadata.get_all("x-echo") {
            response.metadata_mut().append("x-echo", value.clone());
        }
        for value in metadata.get_all_bin("x-echo-bin") {
            response.metadata_mut().append_bin("x-echo-bin", value.clone());
        }
        Ok(response)
    }

    async fn upload(&self, request: Request<Streaming<Blob>>) -> Result<Response<Sum>, Status> {
        let _entered = self.watch.enter();
        let mut blobs = request.into_inner();
        let mut sum = Sum::default();
        loop {
            if let Some(gate) = &self.gate {
                gate.acquire().await.expect("the gate is never closed").forget();
            }
            let Some(blob) = blobs.message().await? else { return Ok(Response::new(sum)) };
            if blob.number != sum.count {
                return Err(Status::data_loss(format!("message {} came in place of {}", blob.number, sum.count)));
            }
            sum.count += 1;
            sum.bytes += blob.data.len() as u64;
        }
    }

    type DownloadStream = Blobs;

    async fn download(&self, request: Request<Ask>) -> Result<Response<Blobs>, Status> {
        let entered = self.watch.enter();
        let ask = request.into_inner();
        let (service, size) = (self.clone(), ask.size as usize);
        let blobs = stream::iter(0..u64::from(ask.count)).map(move |number| {
            service.watch.produced.fetch_add(1, Ordering::SeqCst);
            tracing::info_span!("handler").in_scope(|| {});
            Ok(service.blob(number, size))
        });
        let end = stream::once(finish(ask.end())).filter_map(async |end| end.err().map(Err));
        // The handler is there until its stream is dropped.
        let all = blobs.chain(end).map(move |item| {
            let _ = &entered;
            item
        });
        Ok(Response::new(Box::pin(all)))
    }

    type ChatStream = Blobs;

    async fn chat(&self, request: Request<Streaming<Blob>>) -> Result<Response<Blobs>, Status> {
        let entered = self.watch.enter();
        let instance = self.instance.clone();
        let answers = request.into_inner().map(move |blob| {
            let _ = &entered;
            blob.map(|blob| Blob { instance: instance.clone(), ..blob })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

async fn finish(end: End) -> Result<(), Status> {
    match end {
        End::Ok => Ok(()),
        End::Abort => Err(refusal()),
        End::Hang => std::future::pending().await,
        End::Panic => {
            // In a poll of its own: what was ready before is on its way then.
            tokio::task::yield_now().await;
            panic!("the test asked for it")
        }
    }
}

/// The status of [`End::Abort`], with everything a status can carry.
pub fn refusal() -> Status {
    let mut details = ErrorDetails::new();
    details.add_bad_request_violation("ask.end", "it says so").set_request_info("7", "conformance");
    let mut status = Status::with_error_details(Code::Aborted, "stopped on purpose: 100 %, é", details);
    status.metadata_mut().insert("x-reason", "asked".parse().expect("a legal value"));
    status.metadata_mut().insert_bin("x-reason-bin", tonic::metadata::MetadataValue::from_bytes(&[0, 255, 10, 13]));
    status
}
