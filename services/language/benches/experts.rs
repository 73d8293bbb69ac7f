//! What a layer of experts costs when they are elsewhere: one round trip of one batch, from the engine's thread and back, over every wire, beside a
//! bare length-prefixed TCP echo of the same bytes.
//!
//! `cargo bench --package language --bench experts` prints a table; `-- --json` prints one JSON object per line, `-- --rounds N` measures longer,
//! `-- --only WIRE` one wire.
//!
//! The shard is the real service on a real checkpoint, but for the arithmetic: its outputs are zeros. Hidden size 2048, top-6 of 8 experts, f32
//! activations. The peer is two plain threads with blocking sockets and nothing else: it writes as many bytes as a batch
//! has, and reads as many as its outputs have. Each side is a process on a core of its own. Rounds of all cases alternate; the ratio is the median of the rounds' ratios.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::config::Config;
use checkpoint::Checkpoint;
use experts::{Batch, Failure, Held, Name, Piece, Stage};
use language::{Fleet, Link};
use layers::{RemoteExperts, Rows, Share};
use mesh::{Mesh, MeshConfig};
use placement::{BUCKET, ExpertRange, Manifest};
use process::{Doors, Served};
use proto::v1::activations::Encoding;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use testkit::NatsServer;
use tokio::runtime::{Builder, Runtime};

const HIDDEN: usize = 2048;
const INNER: usize = 2;
const EXPERTS: usize = 8;
const TOP_K: usize = 6;
/// The only layer of experts.
const LAYER: usize = 0;
const BATCHES: [usize; 2] = [1, 32];
const WIRES: [&str; 3] = ["in-process", "direct", "nats"];
const CALLS_PER_ROUND: usize = 200;
/// Round trip over the direct wire, beside the bare echo.
const GOAL: f64 = 1.5;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().position(|argument| argument == name);
    let value = |name: &str| flag(name).and_then(|at| arguments.get(at + 1)).cloned();
    match (flag("--serve"), flag("--measure")) {
        (Some(at), _) => serve(&arguments[at + 1], Path::new(&arguments[at + 2])),
        (None, Some(at)) => {
            let rounds = value("--rounds").map_or(15, |rounds| rounds.parse().unwrap());
            measure(
                &arguments[at + 1],
                Path::new(&arguments[at + 2]),
                &arguments[at + 3],
                rounds,
                value("--only"),
                flag("--json").is_some(),
            );
        }
        (None, None) => conduct(&arguments),
    }
}

/// Starts a broker and a process for each side, each on a core of its own where the system can do that.
fn conduct(arguments: &[String]) {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path());
    let runtime = runtime();
    let broker = runtime.block_on(NatsServer::start());
    let (url, folder) = (broker.url(), folder.path().to_str().unwrap().to_owned());
    let mut serving = on_core(1, &["--serve", &url, &folder]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut ports = String::new();
    BufReader::new(serving.stdout.take().unwrap()).read_line(&mut ports).unwrap();
    let measured = on_core(0, &["--measure", &url, &folder, ports.trim()]).args(arguments).status().unwrap();
    serving.kill().unwrap();
    serving.wait().unwrap();
    assert!(measured.success());
}

/// This program on one core. Two that share a core pass messages in a tenth of the time that two machines, or two cores, would take.
fn on_core(core: usize, arguments: &[&str]) -> Command {
    let exe = std::env::current_exe().unwrap();
    let pinned = Command::new("taskset").args(["--cpu-list", &core.to_string(), "true"]).status().is_ok_and(|status| status.success());
    let mut command = if pinned { Command::new("taskset") } else { Command::new(&exe) };
    if pinned {
        command.args(["--cpu-list", &core.to_string()]).arg(exe);
    } else {
        eprintln!("no core of its own for each side: figures say little");
    }
    command.args(arguments);
    command
}

/// The serving side: a shard for each wire with a network, and the peers.
fn serve(url: &str, folder: &Path) {
    let runtime = runtime();
    let served: Vec<_> = ["direct", "nats"].iter().map(|wire| shard(wire, url, folder, &runtime, None)).collect();
    let ports: Vec<_> = BATCHES.iter().map(|&batch| echo(Work::new(batch).bytes()).to_string()).collect();
    println!("{}", ports.join(","));
    // Until the other side is done.
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(served);
}

/// The calling side.
fn measure(url: &str, folder: &Path, ports: &str, rounds: usize, only: Option<String>, json: bool) {
    let runtime = runtime();
    let near = Mesh::in_process();
    let _near = shard("in-process", url, folder, &runtime, Some(near.clone()));
    let wires: Vec<_> = WIRES.into_iter().filter(|wire| only.as_ref().is_none_or(|only| only == wire)).collect();
    let fleets: Vec<_> = wires.iter().map(|wire| fleet(wire, url, folder, &runtime, &near)).collect();
    for (batch, port) in BATCHES.into_iter().zip(ports.split(',')) {
        let work = Work::new(batch);
        let mut echo = Echo::connect(port.parse().unwrap(), work.bytes());
        let mut measured = vec![Vec::new(); wires.len() + 1];
        // The first round warms up.
        for _ in 0..=rounds {
            measured[0].push(percentiles(|| echo.call()));
            for (fleet, measured) in fleets.iter().zip(&mut measured[1..]) {
                measured.push(percentiles(|| work.call(fleet)));
            }
        }
        print(batch, &work, &wires, &measured, json);
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().enable_all().build().unwrap()
}

fn mesh_config(wire: &str, url: &str) -> MeshConfig {
    let settings = [("mesh.wire", wire), ("mesh.nats_url", url)].map(|(key, value)| (key.to_owned(), value.to_owned()));
    Config::load(None, &settings).unwrap().section("mesh").unwrap()
}

/// The shard of model `bench-<wire>`.
fn shard(wire: &str, url: &str, folder: &Path, runtime: &Runtime, near: Option<Mesh>) -> Served {
    let checkpoint = Arc::new(Checkpoint::open(folder).unwrap());
    let range = ExpertRange { first: 0, last: EXPERTS - 1 };
    let held = Held::new(models::load_shard(&checkpoint, range.experts(), 1).unwrap(), range, checkpoint.fingerprint().to_vec().into());
    let model = format!("bench-{wire}");
    runtime.block_on(async {
        let mesh = match near {
            Some(near) => near,
            None => Mesh::connect(&mesh_config(wire, url)).await.unwrap(),
        };
        let bucket = mesh.bucket(BUCKET).await.unwrap();
        bucket.put(&Manifest::key(&model, range), Manifest::value(&BTreeSet::new())).await.unwrap();
        let stage = Stage::computing(Name { model: model.clone(), shard: range }, held, 64, zeros).unwrap();
        process::serve(&mesh, &Doors::default(), vec![experts::offer(stage)]).await.unwrap()
    })
}

/// The way to that shard.
fn fleet(wire: &str, url: &str, folder: &Path, runtime: &Runtime, near: &Mesh) -> Arc<Fleet> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let shape = models::expert_shape(&checkpoint).unwrap().unwrap();
    let link = if wire == "in-process" { Link::Shared(near.clone()) } else { Link::Own(mesh_config(wire, url)) };
    runtime.block_on(async {
        let fleet = Fleet::start(link, &format!("bench-{wire}"), shape, checkpoint.fingerprint(), Encoding::F32).await.unwrap();
        fleet.complete().wait_for(|complete| *complete).await.unwrap();
        fleet
    })
}

/// Outputs of the right shape that take no time.
fn zeros(_: &models::Shard, batch: &mut Batch, send: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
    let mut first = 0;
    for share in &batch.shares {
        let rows = share.rows.len();
        send(Piece { first, rows: wire::activations::pack(vec![0.0; rows * HIDDEN], HIDDEN, batch.encoding) });
        first += rows;
    }
    Ok(())
}

/// A batch of rows, each for [`TOP_K`] experts.
struct Work {
    rows: Vec<f32>,
    shares: Vec<Share>,
    may_lose: Vec<bool>,
}

impl Work {
    fn new(batch: usize) -> Self {
        let rows = (0..batch * HIDDEN).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
        let chosen = |expert: usize, row: usize| (expert + row) % EXPERTS < TOP_K;
        let share = |expert| {
            let rows: Vec<usize> = (0..batch).filter(|&row| chosen(expert, row)).collect();
            Share { expert, weights: vec![0.1; rows.len()], rows }
        };
        let shares = (0..EXPERTS).map(share).filter(|share: &Share| !share.rows.is_empty()).collect();
        Self { rows, shares, may_lose: vec![false; batch] }
    }

    fn call(&self, fleet: &Fleet) {
        let rows = Rows { values: self.rows.clone(), width: HIDDEN };
        let mixture = fleet.dispatch(LAYER, rows, &self.shares, &self.may_lose).unwrap()().unwrap();
        assert_eq!(mixture.terms.len(), self.shares.len());
    }

    /// Of a batch and of its outputs, without the few bytes around the rows.
    fn bytes(&self) -> [usize; 2] {
        let places: usize = self.shares.iter().map(|share| share.rows.len()).sum();
        [self.rows.len() * 4, places * HIDDEN * 4]
    }
}

/// The calling half of the peer.
struct Echo {
    socket: TcpStream,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Echo {
    fn connect(port: u16, [request, answer]: [usize; 2]) -> Self {
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        socket.set_nodelay(true).unwrap();
        let mut request = vec![7; request + 4];
        let length = request.len() as u32 - 4;
        request[..4].copy_from_slice(&length.to_be_bytes());
        Self { socket, request, answer: vec![0; answer] }
    }

    fn call(&mut self) {
        self.socket.write_all(&self.request).unwrap();
        let mut length = [0; 4];
        self.socket.read_exact(&mut length).unwrap();
        self.socket.read_exact(&mut self.answer[..u32::from_be_bytes(length) as usize]).unwrap();
    }
}

/// The serving half of the peer, on a thread of its own.
fn echo([request, answer]: [usize; 2]) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || serve_echo(listener.accept().unwrap().0, request, answer));
    port
}

fn serve_echo(mut socket: TcpStream, request: usize, answer: usize) {
    socket.set_nodelay(true).unwrap();
    let mut request = vec![0; request];
    let mut reply = vec![7; answer + 4];
    reply[..4].copy_from_slice(&(answer as u32).to_be_bytes());
    let mut length = [0; 4];
    while socket.read_exact(&mut length).is_ok() {
        socket.read_exact(&mut request[..u32::from_be_bytes(length) as usize]).unwrap();
        socket.write_all(&reply).unwrap();
    }
}

/// Median and 99th percentile of a round of calls.
fn percentiles(mut call: impl FnMut()) -> [Duration; 2] {
    let timed = |()| {
        let begin = Instant::now();
        call();
        begin.elapsed()
    };
    let mut times: Vec<_> = std::iter::repeat_n((), CALLS_PER_ROUND).map(timed).collect();
    times.sort_unstable();
    [times[CALLS_PER_ROUND / 2], times[CALLS_PER_ROUND * 99 / 100]]
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print(batch: usize, work: &Work, wires: &[&str], measured: &[Vec<[Duration; 2]>], json: bool) {
    let [out, back] = work.bytes();
    if !json {
        println!("batch {batch}: {} KiB out, {} KiB back, top-{TOP_K} of {EXPERTS}, hidden {HIDDEN}", out / 1024, back / 1024);
        println!("{:<12} {:>9} {:>9} {:>8} {:>8}", "wire", "p50 us", "p99 us", "p50 x", "p99 x");
    }
    for (name, rounds) in ["bare echo"].iter().chain(wires).zip(measured) {
        let micros = |which: usize| median(rounds[1..].iter().map(|round| round[which].as_secs_f64() * 1e6));
        let ratio =
            |which: usize| median(rounds[1..].iter().zip(&measured[0][1..]).map(|(a, b)| a[which].as_secs_f64() / b[which].as_secs_f64()));
        let goal = (*name == "direct").then_some(GOAL);
        if json {
            let line = serde_json::json!({"batch": batch, "wire": name, "p50_us": micros(0), "p99_us": micros(1), "p50_ratio": ratio(0), "p99_ratio": ratio(1), "goal": goal});
            println!("{line}");
        } else {
            let goal = goal.map_or(String::new(), |goal| format!("   goal {goal}"));
            println!("{name:<12} {:>9.1} {:>9.1} {:>8.2} {:>8.2}{goal}", micros(0), micros(1), ratio(0), ratio(1));
        }
    }
}

/// Nothing but the experts of one layer, and the configuration that goes with them.
fn write_checkpoint(folder: &Path) {
    let config = serde_json::json!({
        "model_type": "deepseek", "hidden_size": HIDDEN, "intermediate_size": 16, "moe_intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 16, "max_position_embeddings": 64, "n_routed_experts": EXPERTS,
        "n_shared_experts": 1, "num_experts_per_tok": TOP_K, "first_k_dense_replace": 0, "moe_layer_freq": 1,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let data: Vec<u8> = (0..HIDDEN * INNER).flat_map(|i| half::bf16::from_f32((i % 31) as f32 / 31.0 - 0.5).to_le_bytes()).collect();
    let mut tensors = Vec::new();
    for expert in 0..EXPERTS {
        for (name, shape) in [("gate_proj", [INNER, HIDDEN]), ("up_proj", [INNER, HIDDEN]), ("down_proj", [HIDDEN, INNER])] {
            let name = format!("model.layers.{LAYER}.mlp.experts.{expert}.{name}.weight");
            tensors.push((name, TensorView::new(Dtype::BF16, shape.to_vec(), &data).unwrap()));
        }
    }
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
}
