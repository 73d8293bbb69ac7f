//! The services as processes of their own over real brokers: one dies, the others carry on; all drain when told to.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use futures::future::join_all;
use proto::v1;
use proto::v1::generate_response::Event;
use proto::v1::janua_client::JanuaClient;
use testkit::{NatsServer, RedisServer, fixture, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Streaming;
use tonic::transport::Channel;

use crate::child::{LIMIT, Server, client};

/// Enough that both workers have some: calls are spread at random.
const STREAMS: usize = 12;
/// Far more than are generated before the kill.
const TOKENS: u32 = 800;

/// Brokers, six processes, and the folder with their settings.
struct Installation {
    nats: NatsServer,
    redis: RedisServer,
    servers: BTreeMap<&'static str, Server>,
    address: String,
    /// Where the router tells its metrics.
    metrics: String,
    _folder: tempfile::TempDir,
}

impl Installation {
    async fn start(wire: &str, model: &Path) -> Self {
        let (nats, redis) = (NatsServer::start().await, RedisServer::start().await);
        let folder = tempfile::tempdir().unwrap();
        let [port, metrics_port] = free_ports();
        let file = folder.path().join("janua.toml");
        let settings = format!(
            "[telemetry]\nlevel = \"error\"\n[mesh]\nwire = {wire:?}\nnats_url = {:?}\n[cache]\nredis_url = {:?}\n\
             [router]\nlisten = \"127.0.0.1:{port}\"\n[[models]]\nname = \"tiny\"\npath = {:?}\n",
            nats.url(),
            redis.url(),
            model.display().to_string(),
        );
        std::fs::write(&file, settings).unwrap();
        let config = file.display().to_string();
        let services = [
            ("language-1", "language"),
            ("language-2", "language"),
            ("tokenizer", "tokenizer"),
            ("vision", "vision"),
            ("images", "images"),
            ("router", "router"),
        ];
        let metrics = format!("127.0.0.1:{metrics_port}");
        let listen = format!("telemetry.metrics_listen={metrics}");
        let start = |service| match service {
            "router" => Server::start(&["--service", service, "--config", &config, "--quiet", "--set", &listen]),
            _ => Server::start(&["--service", service, "--config", &config, "--quiet"]),
        };
        let servers = services.into_iter().map(|(name, service)| (name, start(service))).collect();
        let address = format!("http://127.0.0.1:{port}");
        wait_until("all services", LIMIT, async || ready(&address).await).await;
        Self { nats, redis, servers, address, metrics, _folder: folder }
    }

    /// SIGTERM to everybody, the router first; each must end well.
    async fn stop(mut self) {
        let router = self.servers.remove("router");
        for server in router.into_iter().chain(self.servers.into_values()) {
            server.signal("TERM");
            assert_eq!(server.wait().await.code(), Some(0), "SIGTERM drains and ends well");
        }
        drop((self.nats, self.redis));
    }
}

/// Two ports that were free a moment ago.
pub fn free_ports() -> [u16; 2] {
    let taken = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    taken.map(|listener| listener.local_addr().unwrap().port())
}

/// Sum of a counter over its labels, from a Prometheus endpoint.
async fn counter(address: &str, name: &str) -> f64 {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    page.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Whether the router at `address` has everything that its models need.
pub async fn ready(address: &str) -> bool {
    let Ok(mut client) = JanuaClient::connect(address.to_owned()).await else { return false };
    let Ok(models) = client.list_models(v1::ListModelsRequest {}).await else { return false };
    models.into_inner().models.iter().all(|model| model.ready)
}

/// Every other stream has a constraint, which is far from its end when the stream ends.
fn story(i: usize) -> v1::GenerateRequest {
    let grammar = v1::constraint::Constraint::Lark("start: (\"left \" | \"right \" | /[a-z]{2,9} /){3000}".into());
    let constraint = (i % 2 == 1).then_some(v1::Constraint { constraint: Some(grammar) });
    let part = v1::Part { part: Some(v1::part::Part::Text(format!("Stream {i} tells a story."))) };
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Completion(v1::Completion { parts: vec![part], omit_bos: false })),
        sampling: Some(v1::Sampling {
            temperature: Some(1.0),
            seed: Some(i as u64),
            max_tokens: Some(TOKENS),
            ignore_eos: constraint.is_none(),
            constraint,
            ..v1::Sampling::default()
        }),
        ..v1::GenerateRequest::default()
    }
}

/// Reads a stream until it has `goal` ids, or to its end.
async fn read(stream: &mut Streaming<v1::GenerateResponse>, ids: &mut Vec<u32>, goal: usize) {
    while ids.len() < goal {
        match tokio::time::timeout(LIMIT, stream.message()).await.expect("the stream goes on").unwrap() {
            Some(v1::GenerateResponse { event: Some(Event::Text(delta)) }) => ids.extend(delta.token_ids),
            Some(_) => {}
            None => return,
        }
    }
}

async fn whole(mut client: JanuaClient<Channel>, i: usize) -> Vec<u32> {
    let (mut stream, mut ids) = (client.generate(story(i)).await.unwrap().into_inner(), Vec::new());
    read(&mut stream, &mut ids, usize::MAX).await;
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_language_worker_is_not_noticed_over_nats() {
    a_killed_language_worker_is_not_noticed("nats").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_language_worker_is_not_noticed_over_direct() {
    a_killed_language_worker_is_not_noticed("direct").await;
}

async fn a_killed_language_worker_is_not_noticed(wire: &str) {
    let mut installation = Installation::start(wire, &fixture("janus")).await;
    let client = client(&installation.address).await;
    let expected = join_all((0..STREAMS).map(|i| whole(client.clone(), i))).await;
    assert!(expected.iter().all(|ids| ids.len() == TOKENS as usize));

    // All streams are in the middle when one of the two workers dies: calls spread, so some of them were its.
    let begin = (0..STREAMS).map(|i| {
        let mut client = client.clone();
        async move {
            let (mut stream, mut ids) = (client.generate(story(i)).await.unwrap().into_inner(), Vec::new());
            read(&mut stream, &mut ids, 20).await;
            (stream, ids)
        }
    });
    let streams = join_all(begin).await;
    let killed = installation.servers.remove("language-1").unwrap();
    killed.signal("KILL");
    assert_eq!(killed.wait().await.code(), None, "it had no time to say goodbye");
    let finish = streams.into_iter().map(async |(mut stream, mut ids)| {
        read(&mut stream, &mut ids, usize::MAX).await;
        ids
    });
    for (i, ids) in join_all(finish).await.into_iter().enumerate() {
        assert_eq!(ids, expected[i], "stream {i}: no token lost, none repeated");
    }
    let carried = counter(&installation.metrics, "janua_router_retries_total").await;
    assert!(carried >= 1.0, "the dead worker had streams, and they were carried over");
    installation.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_while_it_draws_is_not_noticed_over_nats() {
    a_worker_killed_while_it_draws_is_not_noticed("nats").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_while_it_draws_is_not_noticed_over_direct() {
    a_worker_killed_while_it_draws_is_not_noticed("direct").await;
}

async fn a_worker_killed_while_it_draws_is_not_noticed(wire: &str) {
    let mut installation = Installation::start(wire, &fixture("janusflow")).await;
    let client = client(&installation.address).await;
    let draw = |i: usize| {
        let part = v1::Part { part: Some(v1::part::Part::Text(format!("Harbor {i} with bright clouds."))) };
        v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Completion(v1::Completion { parts: vec![part], omit_bos: false })),
            output: v1::OutputKind::Image.into(),
            image: Some(v1::ImageSampling { steps: Some(DRAWING_STEPS), seed: Some(i as u64), solver: 2, ..v1::ImageSampling::default() }),
            ..v1::GenerateRequest::default()
        }
    };
    let begin = |i: usize| {
        let mut client = client.clone();
        async move { client.generate(draw(i)).await.unwrap().into_inner() }
    };
    let expected = join_all((0..DRAWINGS).map(async |i| drawn(&mut begin(i).await, u32::MAX).await.unwrap())).await;

    // All drawings are in the middle when one of the two workers dies.
    let middle = async |i: usize| {
        let mut stream = begin(i).await;
        assert!(drawn(&mut stream, 5).await.is_none());
        stream
    };
    let streams = join_all((0..DRAWINGS).map(middle)).await;
    let killed = installation.servers.remove("language-1").unwrap();
    killed.signal("KILL");
    assert_eq!(killed.wait().await.code(), None, "it had no time to say goodbye");
    let finish = streams.into_iter().map(async |mut stream| drawn(&mut stream, u32::MAX).await.unwrap());
    for (i, image) in join_all(finish).await.into_iter().enumerate() {
        assert!(image == expected[i], "drawing {i} is the same picture");
    }
    let carried = counter(&installation.metrics, "janua_router_retries_total").await;
    assert!(carried >= 1.0, "the dead worker had drawings, and they were carried over");
    installation.stop().await;
}

/// Enough that both workers have some, and steps far beyond those before the kill.
const DRAWINGS: usize = 10;
const DRAWING_STEPS: u32 = 150;

/// Reads a drawing until step `goal`, or to its picture. Progress never goes back.
async fn drawn(stream: &mut Streaming<v1::GenerateResponse>, goal: u32) -> Option<v1::GeneratedImage> {
    let (mut image, mut done) = (None, 0);
    while let Some(message) = tokio::time::timeout(LIMIT, stream.message()).await.expect("the stream goes on").unwrap() {
        match message.event {
            Some(Event::ImageProgress(progress)) => {
                assert!(progress.done >= done && progress.total == DRAWING_STEPS, "{progress:?} after {done}");
                done = progress.done;
                if done >= goal {
                    return None;
                }
            }
            Some(Event::Image(finished)) => image = Some(finished),
            _ => {}
        }
    }
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_are_cached_in_redis_and_missed_without_it() {
    let mut installation = Installation::start("nats", &fixture("janus")).await;
    let mut client = client(&installation.address).await;
    let picture = std::fs::read(fixture("janus").join("image0.png")).unwrap();
    let parts = vec![
        v1::Part { part: Some(v1::part::Part::Image(v1::ImagePart { data: picture.into() })) },
        v1::Part { part: Some(v1::part::Part::Text("What is in the image?".into())) },
    ];
    let question = v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Chat(v1::Conversation {
            messages: vec![v1::Message { role: v1::Role::User.into(), parts }],
        })),
        sampling: Some(v1::Sampling { temperature: Some(0.0), max_tokens: Some(6), ignore_eos: true, ..v1::Sampling::default() }),
        ..v1::GenerateRequest::default()
    };
    let mut ask = async || {
        let (mut stream, mut ids) = (client.generate(question.clone()).await.unwrap().into_inner(), Vec::new());
        read(&mut stream, &mut ids, usize::MAX).await;
        ids
    };
    assert_eq!(keys(&installation.redis.url()).await, 0);
    let first = ask().await;
    assert_eq!(first.len(), 6);
    let stored = async || keys(&installation.redis.url()).await == 1;
    wait_until("the picture in Redis", Duration::from_secs(20), stored).await;
    assert_eq!(ask().await, first);
    assert_eq!(keys(&installation.redis.url()).await, 1, "the same picture is stored once");
    // Redis holds what may be lost at any moment.
    installation.redis.kill();
    assert_eq!(ask().await, first);
    installation.stop().await;
}

/// Number of keys that the Redis server holds.
async fn keys(url: &str) -> usize {
    let mut stream = tokio::net::TcpStream::connect(url.trim_start_matches("redis://")).await.unwrap();
    stream.write_all(b"DBSIZE\r\n").await.unwrap();
    let mut answer = [0; 64];
    let n = stream.read(&mut answer).await.unwrap();
    std::str::from_utf8(&answer[..n]).unwrap().trim().trim_start_matches(':').parse().unwrap()
}
