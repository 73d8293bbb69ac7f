//! A broker, the services and the replicas of shards, each a process of its own.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use mesh::{Mesh, MeshConfig, Target};
use proto::v1;
use proto::v1::janua_client::JanuaClient;
use testkit::{NatsServer, fixture, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tonic::transport::Channel;

/// Generous: the machines that run tests are busy.
pub const LIMIT: Duration = Duration::from_secs(60);
/// How long replicas are killed.
pub const SECONDS: &str = "JANUA_FAULT_SECONDS";
/// More than any replica needs to leave.
const GRACE_S: u64 = 90;

/// The value of [`SECONDS`].
pub fn seconds() -> u32 {
    std::env::var(SECONDS).map_or(10, |seconds| seconds.parse().unwrap_or_else(|error| panic!("{SECONDS}: {error}")))
}

/// A process that dies with its handle.
pub struct Process(Child);

impl Process {
    /// `janua ARGS`, where `around` may be a program that runs it in its own way.
    pub fn janua(around: &[&str], args: &[String]) -> Self {
        let line: Vec<&str> = around.iter().copied().chain([env!("CARGO_BIN_EXE_janua")]).collect();
        let mut command = Command::new(line[0]);
        // It is no setting of theirs, and one that they do not know stops them.
        command.args(&line[1..]).args(args).env_remove(SECONDS).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        Self(command.spawn().unwrap())
    }

    /// Sends a signal by its name.
    pub fn signal(&self, name: &str) {
        let pid = self.0.id().expect("the process runs").to_string();
        assert!(std::process::Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    pub async fn wait(mut self) -> ExitStatus {
        tokio::time::timeout(LIMIT, self.0.wait()).await.expect("a signalled process ends").unwrap()
    }

    /// SIGKILL, and gone.
    pub async fn kill(self) {
        self.signal("KILL");
        assert_eq!(self.wait().await.code(), None, "it had no time to say goodbye");
    }
}

/// One replica of a shard.
pub struct Replica {
    pub shard: usize,
    pub process: Process,
    /// Where this process tells its metrics.
    metrics: String,
}

impl Replica {
    /// Whether it computes for somebody.
    pub async fn is_used(&self) -> bool {
        self.computed().await > 0.0
    }

    /// Batches computed since its start.
    pub async fn computed(&self) -> f64 {
        counter(&self.metrics, "janua_experts_batches_total{", "computed").await
    }
}

/// How many shards and replicas of a model there are, and what carries their calls.
#[derive(Clone, Copy)]
pub struct Plan {
    pub model: &'static str,
    pub shards: usize,
    pub wire: &'static str,
}

/// Everything that serves one model.
pub struct Installation {
    plan: Plan,
    nats: NatsServer,
    _services: Vec<Process>,
    address: String,
    language: String,
    mesh: Mesh,
}

impl Installation {
    /// The services, and `replicas` of each shard, one shard after the other.
    pub async fn start(plan: Plan, replicas: usize) -> (Self, Vec<Replica>) {
        let nats = NatsServer::start().await;
        let (router, language) = (free_address(), free_address());
        let common = common(plan, &nats.url());
        let serve = |service: &str, settings: &[String]| Process::janua(&[], &[serve(service), common.clone(), settings.to_vec()].concat());
        let services = vec![
            serve("tokenizer", &[]),
            serve("language", &language_settings(&language)),
            serve("router", &sets(&[("router.listen", &router)])),
        ];
        let mesh = Mesh::connect(&MeshConfig::direct(nats.url())).await.unwrap();
        let address = format!("http://{router}");
        let installation = Self { plan, nats, _services: services, address, language, mesh };
        let shards = (0..plan.shards).flat_map(|shard| std::iter::repeat_n(shard, replicas));
        let all: Vec<_> = shards.map(|shard| installation.replica(shard)).collect();
        wait_until("all services", LIMIT, async || ready(&installation.address).await).await;
        wait_until("all replicas", LIMIT, async || installation.known("").await == all.len() as f64).await;
        (installation, all)
    }

    /// Starts one more replica.
    pub fn replica(&self, shard: usize) -> Replica {
        let metrics = free_address();
        let args = [serve("experts"), common(self.plan, &self.nats.url()), replica_settings(self.plan, shard, &metrics)].concat();
        Replica { shard, process: Process::janua(&[], &args), metrics }
    }

    pub async fn client(&self) -> JanuaClient<Channel> {
        JanuaClient::connect(self.address.clone()).await.unwrap()
    }

    /// How many replicas of a shard take calls.
    pub async fn served(&self, shard: &str) -> usize {
        self.mesh.instances(&Target::new("experts", self.plan.model).shard(shard)).await.len()
    }

    /// Replicas of a shard that the language service sends to.
    pub async fn known(&self, shard: &str) -> f64 {
        counter(&self.language, "janua_language_expert_replicas{", shard).await
    }

    /// Batches that went to another replica because one failed, and those that went to a second one because the first was late.
    pub async fn repeats(&self) -> [f64; 2] {
        let failures = counter(&self.language, "janua_language_expert_failures_total{", "").await;
        [failures, counter(&self.language, "janua_language_expert_hedges_total{", "").await]
    }
}

/// Settings of every process.
pub fn common(plan: Plan, nats: &str) -> Vec<String> {
    let model = format!("{}={}", plan.model, fixture(plan.model).display());
    let settings = sets(&[("telemetry.level", "error"), ("mesh.wire", plan.wire), ("mesh.nats_url", nats)]);
    [vec!["--quiet".into(), "--model".into(), model], settings].concat()
}

pub fn serve(service: &str) -> Vec<String> {
    ["serve", "--service", service].map(str::to_owned).to_vec()
}

/// So many sequences that every stream runs and none waits.
pub fn language_settings(metrics: &str) -> Vec<String> {
    sets(&[("language.experts", "remote"), ("language.max_sequences", "256"), ("telemetry.metrics_listen", metrics)])
}

pub fn replica_settings(plan: Plan, shard: usize, metrics: &str) -> Vec<String> {
    let (shards, shard, grace) = (plan.shards.to_string(), shard.to_string(), GRACE_S.to_string());
    sets(&[("experts.shards", &shards), ("experts.shard", &shard), ("process.grace_s", &grace), ("telemetry.metrics_listen", metrics)])
}

pub fn sets(settings: &[(&str, &str)]) -> Vec<String> {
    settings.iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]).collect()
}

/// An address that was free a moment ago.
fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Sum of a metric over those of its labels that contain `label`, from a Prometheus endpoint; 0 while there is none.
pub async fn counter(address: &str, name: &str, label: &str) -> f64 {
    let page = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut page = String::new();
        stream.read_to_string(&mut page).await.map(|_| page)
    };
    let page = page.await.unwrap_or_default();
    let lines = page.lines().filter(|line| line.starts_with(name) && line.contains(label));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).fold(0.0, |sum, value| sum + value)
}

pub async fn ready(address: &str) -> bool {
    let Ok(mut client) = JanuaClient::connect(address.to_owned()).await else { return false };
    let Ok(models) = client.list_models(v1::ListModelsRequest {}).await else { return false };
    let models = models.into_inner().models;
    !models.is_empty() && models.iter().all(|model| model.ready)
}
