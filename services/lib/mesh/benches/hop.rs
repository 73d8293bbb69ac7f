//! What a call through the mesh costs on each wire, beside the bare thing the wire is made of.
//!
//! `cargo bench --package mesh --bench hop` prints a table; `-- --json` prints one JSON object per line instead, `-- --rounds N`
//! measures longer, `-- --threads N` gives both runtimes so many workers (at least 1).
//!
//! | Case | Mesh | Peer |
//! |---|---|---|
//! | unary over `direct` | generated client on `Mesh::channel` | the same client and server on tonic's own TCP transport |
//! | unary over `nats` | the same | `async_nats::Client::request` and a responder on a queue subscription |
//! | stream over `nats` | server streaming | publishes of messages as long, to a subscriber |
//!
//! Peers are treated alike: serving and calling side are two runtimes of the same flavour (the one services use) in one process,
//! with a connection each; the calling side runs as a task; requests and answers carry the same payload. Rounds of all cases alternate,
//! so that whatever else the machine does meets all of them, and the ratio is the median of the rounds' ratios.
#![allow(clippy::unwrap_used)]

#[path = "../tests/conformance/generated.rs"]
mod generated;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use async_nats::Subject;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use mesh::{MAX_MESSAGE_BYTES, Mesh, MeshConfig, Routes, Serving, Target};
use testkit::NatsServer;
use tokio::runtime::{Builder, Runtime};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use generated::conformance_client::ConformanceClient;
use generated::conformance_server::{Conformance, ConformanceServer};
use generated::{Ask, Blob, Sum};

const UNARY_BYTES: usize = 4 << 10;
const CALLS_PER_ROUND: usize = 400;
const CHUNK_BYTES: usize = 256 << 10;
const CHUNKS_PER_ROUND: usize = 200;
const BARE_SUBJECT: &str = "bare.echo";
const STREAM_SUBJECT: &str = "bare.stream";

/// Goals: microseconds in process, latency over the peer's, throughput over the peer's.
const IN_PROCESS_GOAL_US: f64 = 5.0;
const DIRECT_GOAL: f64 = 1.3;
const NATS_GOAL: f64 = 1.3;
const STREAM_GOAL: f64 = 0.7;

struct Options {
    rounds: usize,
    /// Workers of each runtime; `None` takes tokio's default, as services do.
    threads: Option<usize>,
    json: bool,
}

fn main() {
    let options = options();
    let (calling, serving) = (runtime(&options), runtime(&options));
    let broker = serving.block_on(NatsServer::start());
    let served = serving.block_on(serving.spawn(serve(broker.url()))).unwrap();
    let (url, address, rounds) = (broker.url(), served.address, options.rounds);
    let measured = calling.block_on(calling.spawn(async move { measure(&url, address, rounds).await })).unwrap();
    print(&measured, &options);
    drop(served);
}

fn options() -> Options {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |flag: &str| {
        let place = arguments.iter().position(|argument| argument == flag)?;
        Some(arguments.get(place + 1).and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{flag} needs a number")))
    };
    let json = arguments.iter().any(|argument| argument == "--json");
    Options { rounds: number("--rounds").unwrap_or(25).max(1), threads: number("--threads"), json }
}

fn runtime(options: &Options) -> Runtime {
    let mut builder = Builder::new_multi_thread();
    match options.threads {
        None => {}
        Some(threads) => {
            builder.worker_threads(threads);
        }
    }
    builder.enable_all().build().unwrap()
}

/// The service on all wires: echoes, and makes chunks.
#[derive(Clone)]
struct Echo;

#[tonic::async_trait]
impl Conformance for Echo {
    async fn unary(&self, request: Request<Ask>) -> Result<Response<Blob>, Status> {
        Ok(Response::new(Blob { data: request.into_inner().data, ..Blob::default() }))
    }

    async fn upload(&self, _: Request<Streaming<Blob>>) -> Result<Response<Sum>, Status> {
        Err(Status::unimplemented("not measured"))
    }

    type DownloadStream = BoxStream<'static, Result<Blob, Status>>;

    async fn download(&self, request: Request<Ask>) -> Result<Response<Self::DownloadStream>, Status> {
        let ask = request.into_inner();
        let data = Bytes::from(vec![7; ask.size as usize]);
        let blobs = stream::iter(0..u64::from(ask.count)).map(move |number| Ok(Blob { data: data.clone(), number, ..Blob::default() }));
        Ok(Response::new(blobs.boxed()))
    }

    type ChatStream = BoxStream<'static, Result<Blob, Status>>;

    async fn chat(&self, _: Request<Streaming<Blob>>) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented("not measured"))
    }
}

fn target(wire: &str) -> Target {
    Target::new("hop", wire)
}

/// Everything that answers, until dropped.
struct Served {
    address: SocketAddr,
    _meshes: Vec<(Mesh, Serving)>,
}

async fn serve(url: String) -> Served {
    let mut meshes = Vec::new();
    for (wire, config) in [("nats", MeshConfig::nats(&url)), ("direct", MeshConfig::direct(&url))] {
        let mesh = Mesh::connect(&config).await.unwrap();
        let serving = mesh.serve(target(wire), Routes::new().service(ConformanceServer::new(Echo))).await.unwrap();
        meshes.push((mesh, serving));
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder().add_service(ConformanceServer::new(Echo));
    // Without it every answer waits 40 ms for an acknowledgement.
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))));
    let client = async_nats::connect(&url).await.unwrap();
    let mut echo = client.queue_subscribe(BARE_SUBJECT, "bare".to_owned()).await.unwrap();
    let mut streams = client.subscribe(STREAM_SUBJECT).await.unwrap();
    client.flush().await.unwrap();
    tokio::spawn(async move {
        let data = Bytes::from(vec![7; CHUNK_BYTES]);
        loop {
            tokio::select! {
                Some(asked) = echo.next() => client.publish(asked.reply.unwrap(), asked.payload).await.unwrap(),
                Some(asked) = streams.next() => publish_chunks(&client, asked.reply.unwrap(), &data).await,
            }
        }
    });
    Served { address, _meshes: meshes }
}

async fn publish_chunks(client: &async_nats::Client, to: Subject, data: &Bytes) {
    for _ in 0..CHUNKS_PER_ROUND {
        client.publish(to.clone(), data.clone()).await.unwrap();
    }
}

/// Microseconds of each call by round, and MB/s of each round's stream.
#[derive(Default)]
struct Measured {
    in_process: Vec<Vec<f64>>,
    direct: [Vec<Vec<f64>>; 2],
    nats: [Vec<Vec<f64>>; 2],
    stream: [Vec<f64>; 2],
}

/// Microseconds of each of one round's calls. No function: the futures of an async closure cannot be proved `Send`.
macro_rules! time {
    ($call:expr) => {{
        let mut times = Vec::with_capacity(CALLS_PER_ROUND);
        for _ in 0..CALLS_PER_ROUND {
            let begun = Instant::now();
            assert_eq!($call, UNARY_BYTES);
            times.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        times
    }};
}

async fn measure(url: &str, address: SocketAddr, rounds: usize) -> Measured {
    let local = Mesh::in_process();
    let _serving = local.serve(target("local"), Routes::new().service(ConformanceServer::new(Echo))).await.unwrap();
    let over_nats = Mesh::connect(&MeshConfig::nats(url)).await.unwrap();
    let over_direct = Mesh::connect(&MeshConfig::direct(url)).await.unwrap();
    let bare_nats = async_nats::connect(url).await.unwrap();
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap().tcp_nodelay(true);
    let mut bare_grpc = ConformanceClient::new(endpoint.connect().await.unwrap());
    let mut in_process = ConformanceClient::new(local.channel(&target("local")));
    let mut nats = ConformanceClient::new(over_nats.channel(&target("nats"))).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let mut direct = ConformanceClient::new(over_direct.channel(&target("direct")));

    let data = Bytes::from(vec![7; UNARY_BYTES]);
    let ask = Ask { data: data.clone(), ..Ask::default() };
    let mut measured = Measured::default();
    // The first round warms connections and pools.
    for round in 0..=rounds {
        let in_process = time!(length(in_process.unary(ask.clone()).await));
        let direct = [time!(length(direct.unary(ask.clone()).await)), time!(length(bare_grpc.unary(ask.clone()).await))];
        let over_nats = [
            time!(length(nats.unary(ask.clone()).await)),
            time!(bare_nats.request(BARE_SUBJECT, data.clone()).await.unwrap().payload.len()),
        ];
        let stream = [stream_over_mesh(&mut nats).await, stream_of_publishes(&bare_nats).await];
        if round > 0 {
            measured.in_process.push(in_process);
            measured.direct.iter_mut().zip(direct).for_each(|(list, round)| list.push(round));
            measured.nats.iter_mut().zip(over_nats).for_each(|(list, round)| list.push(round));
            measured.stream.iter_mut().zip(stream).for_each(|(list, round)| list.push(round));
        }
    }
    measured
}

fn length(answer: Result<Response<Blob>, Status>) -> usize {
    answer.unwrap().into_inner().data.len()
}

async fn stream_over_mesh(client: &mut ConformanceClient<mesh::Channel>) -> f64 {
    let begun = Instant::now();
    let ask = Ask { count: CHUNKS_PER_ROUND as u32, size: CHUNK_BYTES as u32, ..Ask::default() };
    let mut chunks = client.download(ask).await.unwrap().into_inner();
    let mut bytes = 0;
    while let Some(chunk) = chunks.message().await.unwrap() {
        bytes += chunk.data.len();
    }
    rate(bytes, begun.elapsed())
}

async fn stream_of_publishes(client: &async_nats::Client) -> f64 {
    let inbox = client.new_inbox();
    let mut chunks = client.subscribe(inbox.clone()).await.unwrap();
    client.flush().await.unwrap();
    let begun = Instant::now();
    client.publish_with_reply(STREAM_SUBJECT, inbox, Bytes::new()).await.unwrap();
    let mut bytes = 0;
    for _ in 0..CHUNKS_PER_ROUND {
        bytes += chunks.next().await.unwrap().payload.len();
    }
    rate(bytes, begun.elapsed())
}

/// MB/s.
fn rate(bytes: usize, elapsed: Duration) -> f64 {
    assert_eq!(bytes, CHUNKS_PER_ROUND * CHUNK_BYTES);
    bytes as f64 / 1e6 / elapsed.as_secs_f64()
}

/// One line of the table.
struct Row {
    case: &'static str,
    unit: &'static str,
    mesh: [f64; 2],
    peer: Option<[f64; 2]>,
    /// What the goal is about: the ratio to the peer, or without one the mesh's own value.
    judged: f64,
    goal: f64,
    at_most: bool,
}

fn print(measured: &Measured, options: &Options) {
    let latency = |case, [mesh, peer]: &[Vec<Vec<f64>>; 2], goal| Row {
        case,
        unit: "us",
        mesh: p50_and_p99(mesh),
        peer: Some(p50_and_p99(peer)),
        judged: median_ratio(mesh.iter().map(|round| quantile(round, 0.5)), peer.iter().map(|round| quantile(round, 0.5))),
        goal,
        at_most: true,
    };
    let own = p50_and_p99(&measured.in_process);
    let [mesh, peer] = &measured.stream;
    let spread = |rates: &[f64]| [quantile(rates, 0.5), quantile(rates, 0.01)];
    let rows = [
        Row { case: "unary in-process", unit: "us", mesh: own, peer: None, judged: own[0], goal: IN_PROCESS_GOAL_US, at_most: true },
        latency("unary direct / bare tonic", &measured.direct, DIRECT_GOAL),
        latency("unary nats / bare request", &measured.nats, NATS_GOAL),
        Row {
            case: "stream nats / bare publishes",
            unit: "MB/s",
            mesh: spread(mesh),
            peer: Some(spread(peer)),
            judged: median_ratio(mesh.iter().copied(), peer.iter().copied()),
            goal: STREAM_GOAL,
            at_most: false,
        },
    ];
    if !options.json {
        println!(
            "{UNARY_BYTES} B unary, {CHUNK_BYTES} B chunks; second figures: p99, of rates the slowest round; {} rounds",
            options.rounds
        );
        println!(
            "{:<30} {:>6} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8}",
            "case", "unit", "mesh p50", "p99", "peer p50", "p99", "judged", "goal"
        );
    }
    rows.iter().for_each(|row| line(row, options.json));
}

fn line(row: &Row, json: bool) {
    let is_met = if row.at_most { row.judged <= row.goal } else { row.judged >= row.goal };
    if json {
        let peer = row.peer.map(|[p50, tail]| serde_json::json!({ "p50": p50, "tail": tail }));
        let mesh = serde_json::json!({ "p50": row.mesh[0], "tail": row.mesh[1] });
        println!(
            "{}",
            serde_json::json!({
                "bench": "hop", "case": row.case, "unit": row.unit, "mesh": mesh, "peer": peer,
                "judged": row.judged, "goal": row.goal, "met": is_met,
            })
        );
        return;
    }
    let [p50, tail] = row.peer.map_or(["-".to_owned(), "-".to_owned()], |peer| peer.map(|value| format!("{value:.1}")));
    let (sign, verdict) = (if row.at_most { "<=" } else { ">=" }, if is_met { "met" } else { "MISSED" });
    println!(
        "{:<30} {:>6} {:>9.1} {:>9.1} {p50:>9} {tail:>9} {:>8.2} {sign:>4} {:>3} {verdict}",
        row.case, row.unit, row.mesh[0], row.mesh[1], row.judged, row.goal
    );
}

fn p50_and_p99(rounds: &[Vec<f64>]) -> [f64; 2] {
    let all: Vec<f64> = rounds.iter().flatten().copied().collect();
    [quantile(&all, 0.5), quantile(&all, 0.99)]
}

fn median_ratio(mesh: impl Iterator<Item = f64>, peer: impl Iterator<Item = f64>) -> f64 {
    let ratios: Vec<f64> = mesh.zip(peer).map(|(mesh, peer)| mesh / peer).collect();
    quantile(&ratios, 0.5)
}

fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * part).round() as usize]
}
