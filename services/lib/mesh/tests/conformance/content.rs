//! What is sent arrives, byte for byte and header for header, whatever its size and wherever it is cut.

use std::convert::Infallible;
use std::pin::pin;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use mesh::Routes;
use tonic::body::Body;
use tonic::metadata::MetadataValue;
use tonic::server::NamedService;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::generated::conformance_server::ConformanceServer;
use crate::generated::{Ask, Blob};
use crate::script::{Census, Script, blob, content, is_blob, numbered};
use crate::world::{Over, World};

conformance! { [InProcess Nats NatsShort Direct]
    unicode_survives_in_messages_and_statuses a_large_error_arrives_whole an_error_too_large_is_still_an_error
    many_headers_arrive_in_order trailers_of_a_success_arrive
    every_length_around_the_cuts_arrives random_blobs_go_both_ways twenty_thousand_tiny_messages_go_both_ways
    fifty_megabytes_in_the_midst_of_a_stream
}

const TEXTS: [&str; 7] = ["", "plain", "naïve café", "日本語のテキスト", "🦀🌙", "line\nbreak\ttab", "100% of %41\u{7f}\u{0}"];

async fn unicode_survives_in_messages_and_statuses(over: Over) {
    let world = World::new(over).await;
    let script = Script::random(&Census::new(), 0)
        .unary(async |request: Request<Ask>| Err(Status::failed_precondition(String::from_utf8_lossy(&request.into_inner().data))));
    let _serving = world.serve_routes(script.routes()).await;
    let mut client = world.client();
    for text in TEXTS {
        let sent = Blob { instance: text.to_owned(), ..Blob::default() };
        let mut answers = client.chat(stream::iter([sent])).await.unwrap().into_inner();
        assert_eq!(answers.message().await.unwrap().unwrap().instance, text);
        let status = client.unary(Ask { data: text.into(), ..Ask::default() }).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, text));
    }
}

/// The size of a message or of details that HTTP/2's usual limit of 16 KiB for headers has room for.
const LARGE: usize = 4000;

fn large_error(size: usize) -> Status {
    let details = ErrorDetails::with_debug_info(vec!["a frame".repeat(size / 7)], "b".repeat(10));
    Status::with_error_details(Code::DataLoss, "m".repeat(size), details)
}

async fn a_large_error_arrives_whole(over: Over) {
    let world = World::new(over).await;
    let script = Script::new()
        .unary(async |_| Err(large_error(LARGE)))
        .download(async |_| Ok(Response::new(stream::iter([Ok(blob(0, 100)), Err(large_error(LARGE))]).boxed())));
    let _serving = world.serve_routes(script.routes()).await;
    let mut client = world.client();
    let at_once = client.unary(Ask::default()).await.unwrap_err();
    let mut answers = client.download(Ask::default()).await.unwrap().into_inner();
    assert!(is_blob(&answers.message().await.unwrap().unwrap(), 0, 100));
    for status in [at_once, answers.message().await.unwrap_err()] {
        assert_eq!((status.code(), status.message()), (Code::DataLoss, large_error(LARGE).message()));
        assert_eq!(status.details(), large_error(LARGE).details());
        assert_eq!(status.get_error_details().debug_info().unwrap().detail, "b".repeat(10));
    }
}

async fn an_error_too_large_is_still_an_error(over: Over) {
    let world = World::new(over).await;
    let script = Script::random(&Census::new(), 0)
        .download(async |_| Ok(Response::new(stream::iter([Ok(blob(0, 100)), Err(large_error(2 << 20))]).boxed())));
    let _serving = world.serve_routes(script.routes()).await;
    let mut client = world.client();
    let mut answers = client.download(Ask::default()).await.unwrap().into_inner();
    assert!(is_blob(&answers.message().await.unwrap().unwrap(), 0, 100));
    answers.message().await.unwrap_err();
    client.unary(Ask::default()).await.expect("other calls go on");
}

async fn many_headers_arrive_in_order(over: Over) {
    let world = World::new(over).await;
    let script = Script::new().unary(async |request: Request<Ask>| {
        let mut response = Response::new(Blob::default());
        *response.metadata_mut() = request.metadata().clone();
        Ok(response)
    });
    let _serving = world.serve_routes(script.routes()).await;
    let mut request = Request::new(Ask::default());
    for number in 0..60_u32 {
        request.metadata_mut().append("x-many", format!("value {number}").parse().unwrap());
        let key: &'static str = Box::leak(format!("x-key-{number}-bin").into_boxed_str());
        request.metadata_mut().append_bin(key, MetadataValue::from_bytes(&content(number.into(), number as usize)));
    }
    let response = world.client().unary(request).await.unwrap();
    let many: Vec<_> = response.metadata().get_all("x-many").iter().map(|value| value.to_str().unwrap()).collect();
    assert_eq!(many, (0..60).map(|number| format!("value {number}")).collect::<Vec<_>>());
    for number in 0..60_u32 {
        let value = response.metadata().get_bin(format!("x-key-{number}-bin")).unwrap();
        assert_eq!(value.to_bytes().unwrap(), content(number.into(), number as usize));
    }
}

/// A server whose successes end with trailers of its own, which generated servers cannot send.
#[derive(Clone)]
struct Trailing(ConformanceServer<Script>);

impl NamedService for Trailing {
    const NAME: &'static str = "conformance.v1.Conformance";
}

impl tower::Service<http::Request<Body>> for Trailing {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let answer = self.0.call(request);
        async move {
            let response = answer.await?;
            let trailing = |body: Body| {
                Body::new(body.map_frame(|mut frame| {
                    if let Some(trailers) = frame.trailers_mut() {
                        trailers.append("x-last", http::HeaderValue::from_static("one"));
                        trailers.append("x-last", http::HeaderValue::from_static("two"));
                        trailers.append("x-last-bin", http::HeaderValue::from_static("AP8"));
                    }
                    frame
                }))
            };
            Ok(response.map(trailing))
        }
        .boxed()
    }
}

async fn trailers_of_a_success_arrive(over: Over) {
    let world = World::new(over).await;
    let server = Trailing(Script::random(&Census::new(), 0).server());
    let _serving = world.serve_routes(Routes::new().service(server)).await;
    let mut client = world.client();
    let unary = client.unary(Ask::default()).await.unwrap().metadata().clone();
    let mut answers = client.download(Ask { count: 3, size: 50_000, ..Ask::default() }).await.unwrap().into_inner();
    while answers.message().await.unwrap().is_some() {}
    let streamed = answers.trailers().await.unwrap().unwrap();
    for trailers in [unary, streamed] {
        let last: Vec<_> = trailers.get_all("x-last").iter().collect();
        assert_eq!(last, ["one", "two"]);
        assert_eq!(trailers.get_bin("x-last-bin").unwrap().to_bytes().unwrap(), &[0, 255][..]);
    }
}

/// Wherever head, body and trailers meet the end of a message of the broker, nothing is lost and no message is too long.
async fn every_length_around_the_cuts_arrives(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve_routes(Script::random(&Census::new(), 0).routes()).await;
    let mut client = world.client();
    let (longest, step) = if over == Over::NatsShort { (64 << 10, 1) } else { (1 << 20, 37) };
    for size in (longest - 700..longest + 100).step_by(step).chain([512 << 10, (512 << 10) - 45]) {
        let data = content(size as u64, size);
        let answer = client.unary(Ask { data: data.clone(), ..Ask::default() }).await.unwrap().into_inner();
        assert!(answer.data == data, "{size} bytes come back as {}", answer.data.len());
    }
}

async fn random_blobs_go_both_ways(over: Over) {
    const SIZE: usize = 100_000;
    let world = World::new(over).await;
    let _serving = world.serve_routes(Script::random(&Census::new(), SIZE).routes()).await;
    let mut client = world.client();
    let mut answers = client.chat(numbered(0..400, SIZE)).await.unwrap().into_inner();
    for number in 0..400 {
        assert!(is_blob(&answers.message().await.unwrap().unwrap(), number, SIZE), "blob {number} is another");
    }
    assert_eq!(answers.message().await.unwrap(), None);
    let sum = client.upload(numbered(0..400, SIZE)).await.unwrap().into_inner();
    let mut answers = client.download(Ask { count: 400, size: SIZE as u32, ..Ask::default() }).await.unwrap().into_inner();
    let mut bytes = 0;
    for number in 0..400 {
        let got = answers.message().await.unwrap().unwrap();
        assert!(is_blob(&got, number, SIZE), "blob {number} is another");
        bytes += got.data.len() as u64;
    }
    assert_eq!(answers.message().await.unwrap(), None);
    assert_eq!((sum.count, sum.bytes), (400, bytes));
}

async fn twenty_thousand_tiny_messages_go_both_ways(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve_routes(Script::random(&Census::new(), 8).routes()).await;
    let answers = world.client().chat(numbered(0..20_000, 8)).await.unwrap().into_inner();
    let mut answers = pin!(answers.enumerate());
    let mut count = 0;
    while let Some((number, got)) = answers.next().await {
        assert!(is_blob(&got.unwrap(), number as u64, 8), "message {number} is another");
        count += 1;
    }
    assert_eq!(count, 20_000);
}

async fn fifty_megabytes_in_the_midst_of_a_stream(over: Over) {
    let world = World::new(over).await;
    let _serving = world.serve_routes(Script::random(&Census::new(), 0).routes()).await;
    let sent = [10, 50_000_000, 10].map(|size| Blob { data: content(size as u64, size), ..Blob::default() });
    let mut answers = world.client().chat(stream::iter(sent.clone())).await.unwrap().into_inner();
    for sent in sent {
        let got = answers.message().await.unwrap().unwrap();
        assert!(got == sent, "{} bytes come back as {}", sent.data.len(), got.data.len());
    }
    assert_eq!(answers.message().await.unwrap(), None);
}
