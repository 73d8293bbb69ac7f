//! `janua experts` and an installation whose experts are processes of their own, over a real broker.

use std::collections::BTreeSet;

use proto::v1;
use proto::v1::generate_response::Event;
use serde_json::{Value, json};
use testkit::{NatsServer, fixture, wait_until};

use crate::child::{LIMIT, Server, client, janua};
use crate::processes::{free_ports, ready};

/// A language model around experts that are elsewhere: shard 0-7 twice, shard 8-15 once.
struct Installation {
    config: String,
    address: String,
    /// The only replica of shard 8-15.
    second: Option<Server>,
    _servers: Vec<Server>,
    _nats: NatsServer,
    _folder: tempfile::TempDir,
}

impl Installation {
    async fn start(wire: &str) -> Self {
        let nats = NatsServer::start().await;
        let folder = tempfile::tempdir().unwrap();
        let [port, _] = free_ports();
        let file = folder.path().join("janua.toml");
        let settings = format!(
            "[telemetry]\nlevel = \"error\"\n[mesh]\nwire = {wire:?}\nnats_url = {:?}\n[router]\nlisten = \"127.0.0.1:{port}\"\n\
             [language]\nexperts = \"remote\"\n[experts]\nshards = 2\n[[models]]\nname = \"moe\"\npath = {:?}\n",
            nats.url(),
            fixture("moe_v1").display().to_string(),
        );
        std::fs::write(&file, settings).unwrap();
        let config = file.display().to_string();
        let mut servers: Vec<_> = ["language", "tokenizer", "router"].map(|service| serve(&config, service, 0)).into();
        servers.extend([serve(&config, "experts", 0), serve(&config, "experts", 0)]);
        let second = Some(serve(&config, "experts", 1));
        let address = format!("http://127.0.0.1:{port}");
        wait_until("all services", LIMIT, async || ready(&address).await).await;
        let installation = Self { config, address, second, _servers: servers, _nats: nats, _folder: folder };
        wait_until("all replicas", LIMIT, async || replicas(&installation.list().await) == [2, 1]).await;
        installation
    }

    /// Runs `janua experts ARGS` against it.
    async fn experts(&self, args: &[&str]) -> crate::child::Run {
        janua(&[&["experts"], args, &["--config", &self.config]].concat()).await
    }

    /// The only model of `experts list --json`.
    async fn list(&self) -> Value {
        let mut list = self.experts(&["list", "--json"]).await.ok().json().remove(0);
        list["models"][0].take()
    }

    /// Greedy answers to some prompts.
    async fn answers(&self) -> Vec<Vec<u32>> {
        let mut client = client(&self.address).await;
        let mut answers = Vec::new();
        for prompt in ["A lantern in the harbor.", "Count the small boats.", "It rains on the hill"] {
            let part = v1::Part { part: Some(v1::part::Part::Text(prompt.into())) };
            let request = v1::GenerateRequest {
                input: Some(v1::generate_request::Input::Completion(v1::Completion { parts: vec![part], omit_bos: false })),
                sampling: Some(v1::Sampling { temperature: Some(0.0), max_tokens: Some(24), ignore_eos: true, ..v1::Sampling::default() }),
                ..v1::GenerateRequest::default()
            };
            let mut stream = client.generate(request).await.unwrap().into_inner();
            let mut ids = Vec::new();
            while let Some(message) = tokio::time::timeout(LIMIT, stream.message()).await.expect("the stream goes on").unwrap() {
                if let Some(Event::Text(delta)) = message.event {
                    ids.extend(delta.token_ids);
                }
            }
            assert_eq!(ids.len(), 24);
            answers.push(ids);
        }
        answers
    }
}

fn serve(config: &str, service: &str, shard: usize) -> Server {
    let shard = format!("experts.shard={shard}");
    Server::start(&["--service", service, "--config", config, "--quiet", "--set", &shard])
}

/// How many replicas each shard of a listed model has, by ascending range.
fn replicas(model: &Value) -> Vec<usize> {
    let shards = model["shards"].as_array().into_iter().flatten();
    shards.map(|shard| shard["replicas"].as_array().unwrap().len()).collect()
}

/// The copies of a shard: what its entry says, and what each replica holds.
fn copies(shard: &Value) -> (BTreeSet<u64>, Vec<BTreeSet<u64>>) {
    let set = |value: &Value| value["copies"].as_array().unwrap().iter().map(|expert| expert.as_u64().unwrap()).collect();
    (set(shard), shard["replicas"].as_array().unwrap().iter().map(set).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_are_listed_rebalanced_and_forgotten_over_nats() {
    shards_are_listed_rebalanced_and_forgotten("nats").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_are_listed_rebalanced_and_forgotten_over_direct() {
    shards_are_listed_rebalanced_and_forgotten("direct").await;
}

async fn shards_are_listed_rebalanced_and_forgotten(wire: &str) {
    let mut installation = Installation::start(wire).await;
    let before = installation.list().await;
    assert_eq!((&before["model"], &before["complete"], &before["same_weights"]), (&json!("moe"), &json!(true), &json!(true)));
    assert_eq!([&before["shards"][0]["range"], &before["shards"][1]["range"]], ["0-7", "8-15"]);

    // Nothing computed, nothing to go by.
    let none = installation.experts(&["rebalance", "--model", "moe"]).await.ok();
    assert!(none.stdout.contains("nothing has been computed yet for moe"), "{none:#?}");

    let answers = installation.answers().await;
    let counted = installation.list().await;
    let rows = counted["rows_by_expert"].as_array().unwrap().iter().map(|rows| rows.as_u64().unwrap());
    let by_replica = counted["shards"].as_array().unwrap().iter().flat_map(|shard| shard["replicas"].as_array().unwrap());
    assert_eq!(rows.clone().sum::<u64>(), by_replica.map(|replica| replica["rows"].as_u64().unwrap()).sum::<u64>());
    // Three prompts, 23 tokens behind each, six experts in two layers. More where a batch was late and another replica was asked as well.
    assert!(rows.sum::<u64>() >= 3 * 23 * 6 * 2);

    // A dry run says what it would do, and does not do it.
    let dry = installation.experts(&["rebalance", "--model", "moe", "--copies", "3", "--dry-run", "--json"]).await.ok().json().remove(0);
    assert_eq!(dry["outcome"], "dry run");
    let proposed = dry["copies"].as_array().unwrap();
    assert!((1..=3).contains(&proposed.len()), "{dry}");
    assert!(dry["then"]["max_over_mean"].as_f64() < dry["now"]["max_over_mean"].as_f64(), "{dry}");
    let listed = installation.list().await;
    assert!(
        listed["shards"]
            .as_array()
            .unwrap()
            .iter()
            .all(|shard| copies(shard) == (BTreeSet::new(), vec![BTreeSet::new(); shard["replicas"].as_array().unwrap().len()]))
    );

    // The real one does, in every replica; answers stay.
    let done = installation.experts(&["rebalance", "--model", "moe", "--copies", "3"]).await.ok();
    assert!(done.stdout.contains("every replica holds its copies"), "{done:#?}");
    let listed = installation.list().await;
    for shard in listed["shards"].as_array().unwrap() {
        let of_shard = proposed.iter().filter(|copy| copy["to"] == shard["range"]);
        let expected: BTreeSet<_> = of_shard.map(|copy| copy["expert"].as_u64().unwrap()).collect();
        let (entry, held) = copies(shard);
        assert_eq!(entry, expected);
        assert!(held.iter().all(|held| *held == expected), "{shard}");
    }
    assert_eq!(installation.answers().await, answers);

    // What runs is not forgotten, what is unknown is named.
    for (args, named) in [
        (&["list", "--model", "moe", "--forget", "8-15"], "has a replica that runs"),
        (&["list", "--model", "moe", "--forget", "0-15"], "there is no shard 0-15 of moe"),
        (&["list", "--model", "none", "--forget", "0-15"], "there is no shard 0-15 of none"),
    ] {
        let run = installation.experts(args).await;
        assert!(run.failure(65).contains(named), "{run:#?}");
    }
    let unknown = installation.experts(&["rebalance", "--model", "other"]).await;
    assert!(unknown.failure(65).contains("--model other") && unknown.stderr.contains("known: moe"), "{unknown:#?}");

    // A shard that dies is missed, and then forgotten.
    let killed = installation.second.take().unwrap();
    killed.signal("KILL");
    killed.wait().await;
    wait_until("the shard to be missed", LIMIT, async || replicas(&installation.list().await) == [2, 0]).await;
    let listed = installation.list().await;
    let kept = copies(&listed["shards"][0]).0;
    let unheld: BTreeSet<_> = listed["unheld"].as_array().unwrap().iter().map(|expert| expert.as_u64().unwrap()).collect();
    assert_eq!(unheld, (8..16).filter(|expert| !kept.contains(expert)).collect());
    assert_eq!(listed["complete"], false);
    let words = installation.experts(&["list"]).await.ok().stdout;
    assert!(words.contains("nobody holds") && words.contains("no replica"), "{words}");
    let refused = installation.experts(&["rebalance", "--model", "moe"]).await;
    assert!(refused.failure(65).contains("shard 8-15 of moe has no replica"), "{refused:#?}");
    installation.experts(&["list", "--model", "moe", "--forget", "8-15"]).await.ok();
    assert_eq!(replicas(&installation.list().await), [2]);

    // It comes back by itself, without copies.
    installation.second = Some(serve(&installation.config, "experts", 1));
    wait_until("the shard to be back", LIMIT, async || replicas(&installation.list().await) == [2, 1]).await;
    assert_eq!(installation.answers().await, answers);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installation_that_is_not_there_is_told_in_one_line() {
    let nats = NatsServer::start().await;
    let url = format!("mesh.nats_url={}", nats.url());
    let list = ["experts", "list", "--set", "mesh.wire=nats", "--set"];
    let none = janua(&[&list[..], &[&url]].concat()).await.ok();
    assert!(none.stdout.contains("no expert shard has ever been started here"), "{none:#?}");
    for (args, code, named) in [
        (vec!["experts", "list"], 64, "mesh.wire"),
        (vec!["experts", "list", "--set", "mesh.wire"], 64, "--set"),
        ([&list[..], &["mesh.nats_url=nats://127.0.0.1:1"]].concat(), 69, "127.0.0.1:1"),
        ([&list[..], &[&url, "--model", "moe", "--forget", "7"]].concat(), 64, "--forget"),
        ([&list[..], &[&url, "--model", "moe"]].concat(), 65, "--model moe"),
    ] {
        let run = janua(&args).await;
        assert!(run.failure(code).contains(named), "{named} is not in {run:#?}");
    }
}
