//! Experts in shards of their own: the same outputs, whatever comes and goes.

use std::sync::Arc;
use std::time::Duration;

use config::Config;
use futures::future::join_all;
use mesh::{Mesh, MeshConfig};
use process::{Host, Served, Silent};
use proto::v1;
use testkit::NatsServer;
use tests::{Golden, GoldenPrompt, World};
use tonic::Code;

/// How long replicas may take to be found.
const FOUND: Duration = Duration::from_secs(20);

/// Services without experts in them, and shards that come and go.
struct Sharded {
    nats: NatsServer,
    world: World,
    model: &'static str,
}

impl Sharded {
    async fn start(wire: &str, model: &'static str) -> Self {
        let nats = NatsServer::start().await;
        let url = nats.url();
        let settings = [("mesh.wire", wire), ("mesh.nats_url", url.as_str()), ("language.experts", "remote"), ("experts.shards", "0")];
        let world = World::beside(&[model], &settings).await;
        Self { nats, world, model }
    }

    /// A replica of shard `shard` of two.
    async fn replica(&self, shard: usize) -> Served {
        let settings =
            [("mesh.wire", "direct"), ("mesh.nats_url", &self.nats.url()), ("experts.shards", "2"), ("experts.shard", &shard.to_string())];
        replica(self.model, &settings).await
    }

    /// Asks until the answer is no UNAVAILABLE.
    async fn ask_when_found(&self, prompt: &GoldenPrompt) -> tests::Answer {
        let asked = async {
            loop {
                match self.world.ask(prompt.request.clone()).await {
                    Ok(answer) => return answer,
                    Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(FOUND, asked).await.expect("the replicas are found")
    }
}

async fn replica(model: &str, settings: &[(&str, &str)]) -> Served {
    let settings: Vec<_> = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let mut config = Config::load(None, &settings).unwrap();
    config.add_model(&format!("{model}={}", testkit::fixture(model).display())).unwrap();
    let progress: Arc<dyn process::Progress> = Arc::new(Silent);
    let models = process::open_models(&config, &progress, false).await.unwrap();
    let mesh = Mesh::connect(&config.section::<MeshConfig>("mesh").unwrap()).await.unwrap();
    let host = Host::new(config, mesh, models, progress);
    let offers = experts::start(&host).await.unwrap();
    process::serve(&host.mesh, &host.doors, offers).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_shard_is_named_and_comes_back() {
    for wire in ["nats", "direct"] {
        let sharded = Sharded::start(wire, "moe_v1").await;
        let golden = Golden::read("moe_v1");
        let prompt = &golden.prompts[0];
        let nobody = sharded.world.ask(prompt.request.clone()).await.unwrap_err();
        assert_eq!(nobody.code(), Code::Unavailable, "{nobody:?}");
        let _first = sharded.replica(0).await;
        let second = sharded.replica(1).await;
        assert_eq!(sharded.ask_when_found(prompt).await.ids(), prompt.ids, "over {wire}");
        // As if its process were killed.
        drop(second);
        let missing = sharded.world.ask(prompt.request.clone()).await.unwrap_err();
        assert_eq!(missing.code(), Code::Unavailable, "{missing:?}");
        assert!(missing.message().contains("expert shard 8-15 of moe_v1"), "{missing:?}");
        let _second = sharded.replica(1).await;
        assert_eq!(sharded.ask_when_found(prompt).await.ids(), prompt.ids, "over {wire}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_lost_experts_says_so_and_spoils_no_other() {
    let sharded = Sharded::start("direct", "v2_lite").await;
    let golden = Golden::read("v2_lite");
    let prompt = &golden.prompts[0];
    let degraded = |mut request: v1::GenerateRequest| {
        request.sampling.as_mut().unwrap().allow_expert_loss = true;
        request
    };
    let _first = sharded.replica(0).await;
    let second = sharded.replica(1).await;
    let whole = sharded.ask_when_found(prompt).await;
    assert_eq!((whole.ids(), whole.usage.unwrap().degraded_tokens), (&prompt.ids[..], 0));
    let allowed = sharded.world.ask(degraded(prompt.request.clone())).await.unwrap();
    assert_eq!((allowed.ids(), allowed.usage.unwrap().degraded_tokens), (&prompt.ids[..], 0), "nothing is lost while all are there");
    drop(second);
    // Another prompt, so that nothing of it is known; its blocks must not be kept for others.
    let prompt = &golden.prompts[1];
    let (answer, refused) = tokio::join!(sharded.world.ask(degraded(prompt.request.clone())), sharded.world.ask(prompt.request.clone()));
    let answer = answer.unwrap();
    let usage = answer.usage.unwrap();
    assert_eq!(usage.output_tokens as usize, prompt.ids.len());
    assert!(usage.degraded_tokens > 0 && usage.degraded_tokens <= (prompt.prompt_tokens + prompt.ids.len()) as u32, "{usage:?}");
    assert_eq!(refused.unwrap_err().code(), Code::Unavailable, "who did not allow it gets no such answer");
    let _second = sharded.replica(1).await;
    let whole = sharded.ask_when_found(prompt).await;
    assert_eq!((whole.ids(), whole.usage.unwrap().degraded_tokens), (&prompt.ids[..], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_dies_in_mid_stream_is_not_noticed() {
    let sharded = Sharded::start("direct", "v2_full").await;
    let golden = Golden::read("v2_full");
    let mut replicas = vec![sharded.replica(0).await, sharded.replica(1).await, sharded.replica(0).await, sharded.replica(1).await];
    sharded.ask_when_found(&golden.prompts[0]).await;
    let long = |prompt: &GoldenPrompt| {
        let mut request = prompt.request.clone();
        request.sampling.as_mut().unwrap().max_tokens = Some(64);
        request
    };
    let undisturbed = join_all(golden.prompts.iter().map(|prompt| sharded.world.ask(long(prompt)))).await;
    let disturbed = join_all((0..8).flat_map(|_| &golden.prompts).map(|prompt| sharded.world.ask(long(prompt))));
    let killer = async {
        for shard in [0, 1, 0, 1, 1, 0] {
            tokio::time::sleep(Duration::from_millis(60)).await;
            drop(replicas.remove(shard));
            replicas.insert(shard, sharded.replica(shard).await);
            // The other one of this shard is next.
            replicas.rotate_left(2);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    let (disturbed, ()) = tokio::join!(disturbed, killer);
    for (found, expected) in disturbed.iter().zip(undisturbed.iter().cycle()) {
        assert_eq!(found.as_ref().unwrap().ids(), expected.as_ref().unwrap().ids());
    }
}
