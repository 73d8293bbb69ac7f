//! Shards behind links that delay and lose packets: the same ids, and as fast as arithmetic says.

use std::time::{Duration, Instant};

use futures::future::join_all;
use testkit::{fixture, wait_until};
use tokio::process::{Child, Command};

use crate::installation::{LIMIT, Plan, Process, common, counter, language_settings, ready, replica_settings, seconds, serve, sets};
use crate::link::{Harm, NO_HARM, Network};
use crate::load::{Client, Reading, request, undisturbed};
use crate::rhythm::{Paper, Sizes, mean, measure, quantile};

const PLAN: Plan = Plan { model: "moe_v1", shards: 2, wire: "direct" };
/// Each direction of each link: a round trip takes 2 ms, and what ends cost.
const HARM: Harm = Harm { delay: Duration::from_millis(1), loss: 0.01 };
/// Linux's least retransmission timeout, and one that fits such links.
const LEAST_TIMEOUT: Duration = Duration::from_millis(200);
const SHORT_TIMEOUT: Duration = Duration::from_millis(5);
const TIMEOUT_SETTING: &str = "net/ipv4/tcp_rto_min_us";

/// Of the model: layers with experts, numbers of a row, experts of a token.
const LAYERS: u32 = 2;
const WIDTH: usize = 64;
const CHOSEN: usize = 6;
/// Bytes of a message that are no activations, frames included.
const ENVELOPE: usize = 60;

/// The services in the core, and replicas in the namespaces of the shards.
struct Far {
    client: Client,
    language: String,
    _processes: Vec<Process>,
    _broker: Child,
    _folder: tempfile::TempDir,
}

impl Far {
    /// Replicas stand like this: with one of each shard, each is alone; with two, each place has one of every shard.
    async fn start(network: &Network, replicas: usize) -> Self {
        let (folder, core) = (tempfile::tempdir().unwrap(), network.core());
        let around = |at| ["ip", "netns", "exec", network.space(at)];
        let broker = "PATH=$PATH:/usr/sbin exec nats-server --addr 0.0.0.0 --port 4222 --jetstream --store_dir $0 --log $0/log";
        let mut command = Command::new("ip");
        command.args(&around(0)[1..]).args(["sh", "-c", broker]).arg(folder.path()).kill_on_drop(true);
        let broker = command.spawn().unwrap();
        wait_until("nats-server", LIMIT, async || tokio::net::TcpStream::connect((core, 4222)).await.is_ok()).await;

        let (router, language) = (format!("{core}:50051"), format!("{core}:9100"));
        let run = |at, service: &str, nats: &str, settings: Vec<String>| {
            Process::janua(&around(at), &[serve(service), common(PLAN, nats), settings].concat())
        };
        let near = "nats://127.0.0.1:4222";
        let mut processes = vec![
            run(0, "tokenizer", near, Vec::new()),
            run(0, "language", near, language_settings(&language)),
            run(0, "router", near, sets(&[("router.listen", &router)])),
        ];
        for (shard, place) in
            (0..PLAN.shards).flat_map(|shard| (0..replicas).map(move |replica| (shard, 1 + (shard + replica) % PLAN.shards)))
        {
            let metrics = format!("127.0.0.1:{}", 9200 + shard);
            let advertise = sets(&[("mesh.advertise", &format!("10.9.{place}.2:0"))]);
            let settings = [replica_settings(PLAN, shard, &metrics), advertise].concat();
            processes.push(run(place, "experts", &format!("nats://10.9.{place}.1:4222"), settings));
        }
        let address = format!("http://{router}");
        wait_until("all services", LIMIT, async || ready(&address).await).await;
        let found = (PLAN.shards * replicas) as f64;
        wait_until("all replicas", LIMIT, async || counter(&language, "janua_language_expert_replicas{", "").await == found).await;
        let client = Client::connect(address).await.unwrap();
        Self { client, language, _processes: processes, _broker: broker, _folder: folder }
    }

    async fn hedges(&self) -> f64 {
        counter(&self.language, "janua_language_expert_hedges_total{", "").await
    }

    /// So many streams at once: tokens per second of each, and their ids.
    async fn run(&self, streams: usize, tokens: u32) -> (f64, Vec<Vec<u32>>) {
        let begin = (0..streams).map(async |i| {
            let mut reading = Reading::begin(&self.client, request(i, tokens)).await.unwrap();
            reading.until(1).await.unwrap();
            reading
        });
        let readings = join_all(begin).await;
        let begun = Instant::now();
        let outcomes = join_all(readings.into_iter().map(Reading::rest)).await;
        let rate = f64::from(tokens - 1) / begun.elapsed().as_secs_f64();
        (rate, outcomes.into_iter().map(|outcome| outcome.end.map(|()| outcome.ids).unwrap()).collect())
    }

    /// The reference's ids.
    async fn check_golden(&self) {
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture(PLAN.model).join("golden.json")).unwrap()).unwrap();
        for entry in golden["prompts"].as_array().unwrap() {
            let expected: Vec<u32> = serde_json::from_value(entry["generated_ids"].clone()).unwrap();
            let mut request = request(0, expected.len() as u32);
            let part = proto::v1::part::Part::Text(entry["prompt"].as_str().unwrap().to_owned());
            let Some(proto::v1::generate_request::Input::Completion(completion)) = &mut request.input else { unreachable!() };
            completion.parts = vec![proto::v1::Part { part: Some(part) }];
            assert_eq!(undisturbed(&self.client, &[request]).await, [expected]);
        }
    }
}

/// What a step of so many streams sends to each of two shards, on average.
fn sizes(streams: usize) -> Sizes {
    // A row goes to a shard unless all of its experts are the other one's, which is rare.
    Sizes { question: ENVELOPE + streams * (4 * WIDTH + 4 * CHOSEN / 2), answer: ENVELOPE + streams * CHOSEN / 2 * 4 * WIDTH }
}

/// Streams at once, and how many tokens each has.
fn runs() -> [(usize, u32); 2] {
    [(1, (20 * seconds()).clamp(100, 1200)), (16, (10 * seconds()).clamp(50, 600))]
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_behind_links_with_delay_and_loss_give_the_same_ids_at_the_speed_of_the_link() {
    let network = match Network::build(PLAN.shards) {
        Ok(network) => network,
        Err(reason) => return println!("skipped: no network of namespaces here: {reason}"),
    };
    // What most machines have if this one allows it, or what is most like it: losses must not be answered in another way each time.
    let congestion = ["cubic", "reno"].into_iter().find(|name| network.sysctl("net/ipv4/tcp_congestion_control", name));
    let mut expected = Vec::new();
    println!("links: {:?} and {} lost in each direction, congestion control {congestion:?}; times in ms", HARM.delay, HARM.loss);
    compare(&network, 1, LEAST_TIMEOUT, &mut expected).await;
    compare(&network, 2, LEAST_TIMEOUT, &mut expected).await;
    if network.sysctl(TIMEOUT_SETTING, &SHORT_TIMEOUT.as_micros().to_string()) {
        println!("with {TIMEOUT_SETTING} = {SHORT_TIMEOUT:?}, on both sides:");
        compare(&network, 1, SHORT_TIMEOUT, &mut expected).await;
    }
    let [carried, lost] = network.counts();
    assert!(lost > 0 && carried > 20 * lost, "{carried} packets carried, {lost} lost");
}

/// Runs everything without and with harm; `expected` are the ids of the first of all runs.
async fn compare(network: &Network, replicas: usize, least_timeout: Duration, expected: &mut Vec<Vec<Vec<u32>>>) {
    network.set(NO_HARM);
    let far = Far::start(network, replicas).await;
    far.check_golden().await;
    let mut clean = Vec::new();
    for (at, (streams, tokens)) in runs().into_iter().enumerate() {
        let (rate, ids) = far.run(streams, tokens).await;
        if expected.len() == at {
            expected.push(ids.clone());
        }
        assert_eq!(ids, expected[at], "{streams} streams without harm");
        clean.push((rate, measure(network, PLAN.shards, sizes(streams), rounds())));
    }
    network.set(HARM);
    far.check_golden().await;
    for (at, (streams, tokens)) in runs().into_iter().enumerate() {
        let hedges = far.hedges().await;
        let (rate, ids) = far.run(streams, tokens).await;
        assert_eq!(ids, expected[at], "{streams} streams with delay and loss");
        let hedges = far.hedges().await - hedges;
        let (clean_rate, clean_times) = &clean[at];
        let times = measure(network, PLAN.shards, sizes(streams), rounds());
        network.set(Harm { loss: 0.0, ..HARM });
        let lossless = measure(network, PLAN.shards, sizes(streams), rounds());
        network.set(HARM);
        Report {
            streams,
            tokens,
            replicas,
            clean_rate: *clean_rate,
            rate,
            hedges,
            clean_times,
            lossless: &lossless,
            times: &times,
            least_timeout,
        }
        .print();
    }
}

/// Questions of a measured rhythm.
fn rounds() -> usize {
    25 * seconds().clamp(4, 100) as usize
}

struct Report<'a> {
    streams: usize,
    tokens: u32,
    replicas: usize,
    /// Tokens per second of each stream.
    clean_rate: f64,
    rate: f64,
    hedges: f64,
    clean_times: &'a [Duration],
    lossless: &'a [Duration],
    times: &'a [Duration],
    least_timeout: Duration,
}

impl Report<'_> {
    /// A step takes what it takes without harm and, for every layer of experts, what the link adds to the time of asking all shards: as bare
    /// TCP was measured to take, and as it should on paper.
    fn print(&self) {
        let (streams, sizes) = (self.streams as f64, sizes(self.streams));
        let (clean, lossless) = (mean(self.clean_times), mean(self.lossless));
        let is_hedged = self.replicas > 1;
        let paper = Paper { harm: HARM, round_trip: lossless, least_timeout: self.least_timeout, shards: PLAN.shards as u32, is_hedged };
        // Of bare TCP, whatever takes longer than a second replica would have.
        let longest = paper.hedge(sizes).map_or(Duration::MAX, |hedge| hedge + lossless);
        let times: Vec<_> = self.times.iter().map(|time| (*time).min(longest)).collect();
        let told = |times: &[Duration]| {
            let [middle, late] = [0.5, 0.99].map(|share| ms(quantile(times, share)));
            format!("{middle}/{late}/{}", ms(mean(times)))
        };
        println!("{} of each shard, {} streams of {} tokens, {sizes:?}", self.replicas, self.streams, self.tokens);
        println!(
            "    bare TCP, p50/p99/mean of both: {} without harm, {} with delay, {} with delay and loss",
            told(self.clean_times),
            told(self.lossless),
            told(self.times)
        );
        let step = |rate: f64| Duration::from_secs_f64(1.0 / rate);
        println!(
            "    tokens/s: {:.0} without harm, {:.0} with; a step {} and {} ms; {} batches asked twice",
            streams * self.clean_rate,
            streams * self.rate,
            ms(step(self.clean_rate)),
            ms(step(self.rate)),
            self.hedges
        );
        let compare = |what: &str, added: Duration| {
            let rate = 1.0 / (step(self.clean_rate) + LAYERS * added).as_secs_f64();
            println!("    {what}: {:.0} tokens/s, measured is {:+.0} %", streams * rate, 100.0 * (self.rate / rate - 1.0));
        };
        compare("on paper", lossless.saturating_sub(clean) + paper.loss(sizes));
        compare("by bare TCP", mean(&times).saturating_sub(clean));
    }
}

fn ms(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1e3)
}
