use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use futures::future::try_join_all;
use proto::v1;
use proto::v1::generate_response::Event;
use serde_json::json;

use crate::broker::Broker;
use crate::client::Door;
use crate::local::{Local, LocalOptions, model_name};
use crate::terminal::{self, BOLD, DIM, paint};
use crate::{Failure, request};

/// What sharding may cost when there is no network in between.
const GOAL: f64 = 0.8;
/// How long shards may take to read their weights.
const READY: Duration = Duration::from_secs(300);

/// Measure a model whole and with its experts in shards, side by side on this machine
#[derive(Debug, Args)]
#[command(after_help = "Example:
  janua bench shards target/bench/moe --shards 2 --batch 16

Both are served at once and asked in turns; each shard is a process of its own with as many threads as its part of the cores.")]
pub struct Shards {
    /// Folder of a checkpoint with routed experts
    pub dir: PathBuf,
    /// How many shards
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    pub shards: u16,
    /// Streams at a time
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    pub batch: u32,
    /// Tokens of each stream
    #[arg(long, value_name = "COUNT", default_value_t = 24)]
    pub tokens: u32,
    /// How often each is measured
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    pub rounds: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs `janua bench shards`. A signal ends the shards, too.
pub async fn run(flags: Shards) -> Result<(), Failure> {
    tokio::select! {
        biased;
        stop = crate::serve::signal() => stop.and(Err(Failure::software("stopped by a signal"))),
        done = measure(&flags) => done,
    }
}

async fn measure(flags: &Shards) -> Result<(), Failure> {
    let model = model_name(&flags.dir)?;
    let models = || vec![(model.clone(), flags.dir.clone())];
    let broker = Broker::start().await?;
    let _shards = Processes::start(flags, &model, broker.url())?;
    let whole = Local::start(LocalOptions::embedded(models())?).await?;
    let settings = [("language.experts", "remote"), ("experts.shards", "0"), ("mesh.wire", "direct"), ("mesh.nats_url", broker.url())];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let sharded = Local::start(LocalOptions::with_settings(models(), &settings)?).await?;
    let doors = [Door::of(&whole, &model).await?, Door::of(&sharded, &model).await?];
    until_ready(&doors[1]).await?;
    let mut rates = [Vec::new(), Vec::new()];
    // The first round warms up.
    for round in 0..=flags.rounds {
        for (door, rates) in doors.iter().zip(&mut rates) {
            let rate = rate(door, flags).await?;
            if round > 0 {
                rates.push(rate);
            }
        }
    }
    print(flags, &rates)?;
    whole.drain().await;
    sharded.drain().await;
    Ok(())
}

/// Tokens per second of all streams together, from the moment when each has its first one.
async fn rate(door: &Door, flags: &Shards) -> Result<f64, Failure> {
    let times = try_join_all((0..flags.batch).map(|stream| times(door, flags.tokens, stream))).await?;
    let begun = times.iter().filter_map(|times| times.first()).max().copied();
    let (begun, ended) =
        begun.zip(times.iter().filter_map(|times| times.last()).max().copied()).unwrap_or_else(|| (Instant::now(), Instant::now()));
    let counted = times.iter().flatten().filter(|time| **time > begun).count();
    Ok(counted as f64 / (ended - begun).as_secs_f64().max(1e-9))
}

/// When each token of a stream came.
async fn times(door: &Door, tokens: u32, stream: u32) -> Result<Vec<Instant>, Failure> {
    let sampling = v1::Sampling {
        temperature: Some(1.0),
        seed: Some(u64::from(stream)),
        max_tokens: Some(tokens),
        ignore_eos: true,
        ..v1::Sampling::default()
    };
    let input = request::completion(vec![request::text(format!("Stream {stream}: the quick brown fox"))]);
    let mut events = door.generate(input, v1::OutputKind::Text, Some(sampling), None).await?;
    let mut times = Vec::new();
    while let Some(event) = events.next().await? {
        if let Event::Text(delta) = event {
            times.extend(std::iter::repeat_n(Instant::now(), delta.token_ids.len()));
        }
    }
    Ok(times)
}

async fn until_ready(door: &Door) -> Result<(), Failure> {
    let end = Instant::now() + READY;
    while Instant::now() < end {
        if door.models().await?.iter().all(|model| model.ready) && times(door, 1, 0).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(Failure::software(format!("the shards are not ready after {} s", READY.as_secs())))
}

fn print(flags: &Shards, rates: &[Vec<f64>; 2]) -> Result<(), Failure> {
    let median = |values: &[f64]| {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let ratios: Vec<f64> = rates[1].iter().zip(&rates[0]).map(|(sharded, whole)| sharded / whole).collect();
    let [whole, sharded] = [median(&rates[0]), median(&rates[1])];
    let ratio = median(&ratios);
    if flags.json {
        let figures =
            json!({"shards": flags.shards, "batch": flags.batch, "whole": whole, "sharded": sharded, "ratio": ratio, "goal": GOAL});
        return terminal::json(&figures).map(drop);
    }
    let streams = format!("{} streams of {} tokens", flags.batch, flags.tokens);
    terminal::line(&format!("{} {}", paint(BOLD, flags.dir.display()), paint(DIM, streams)))?;
    terminal::line(&format!("whole        {whole:8.2} tok/s"))?;
    terminal::line(&format!("{:<2} shards    {sharded:8.2} tok/s   ratio {ratio:.2}, at least {GOAL} wanted", flags.shards)).map(drop)
}

/// The shards, stopped when this is dropped.
struct Processes(Vec<Child>);

impl Processes {
    fn start(flags: &Shards, model: &str, url: &str) -> Result<Self, Failure> {
        let program = std::env::current_exe().map_err(|error| Failure::software(format!("cannot find this program: {error}")))?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / usize::from(flags.shards)).max(1);
        let mut processes = Self(Vec::new());
        for shard in 0..flags.shards {
            let settings = [
                ("mesh.wire", "direct".to_owned()),
                ("mesh.nats_url", url.to_owned()),
                ("experts.shards", flags.shards.to_string()),
                ("experts.shard", shard.to_string()),
                ("experts.threads", threads.to_string()),
            ];
            processes.0.push(spawn(&program, &flags.dir, model, &settings)?);
        }
        Ok(processes)
    }
}

fn spawn(program: &Path, dir: &Path, model: &str, settings: &[(&str, String)]) -> Result<Child, Failure> {
    let mut command = Command::new(program);
    command.args(["serve", "--service", "experts", "--quiet", "--model"]).arg(format!("{model}={}", dir.display()));
    for (key, value) in settings {
        command.arg("--set").arg(format!("{key}={value}"));
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    child.map_err(|error| Failure::software(format!("cannot start a shard: {error}")))
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended by itself is past both.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
