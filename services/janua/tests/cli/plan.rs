//! `janua plan`: what it says of published and tiny models, and of what makes no plan.

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::fixture;

use crate::child::janua;

/// V2 236B: the configuration alone (shared/spec/language.md 2.1).
fn v2() -> Value {
    json!({
        "model_type": "deepseek_v2", "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
        "routed_scaling_factor": 16.0, "vocab_size": 102400, "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
    })
}

fn folder(config: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_with_a_configuration_alone_is_planned() {
    let folder = folder(&v2());
    let dir = folder.path().display().to_string();
    let flags = ["plan", "--model", &dir, "--nodes", "8", "--replicas", "2", "--node-memory-gb", "80"];
    let run = janua(&[&flags[..], &["--json"]].concat()).await.ok();
    let plan = run.json().remove(0);
    let expert = 3 * 5120 * 1536 * 2u64;
    assert_eq!(plan["model"]["expert_bytes"], expert);
    assert_eq!(plan["plan"]["shard_bytes"], json!({"least": 59 * 20 * expert, "most": 59 * 20 * expert}));
    assert_eq!(plan["fits"], json!({"shard": true, "language": true, "fewest_shards": 6}));
    assert_eq!(plan["shards"].as_array().unwrap().len(), 8);
    assert_eq!(plan["shards"][7]["range"], "140-159");
    let per_token = plan["plan"]["shards_per_token"].as_f64().unwrap();
    assert!(per_token <= 3.0, "a shard is a group, and three are kept: {per_token}");

    let words = janua(&flags).await.ok().stdout;
    for said in ["deepseek_v2", "8 shards x 2 replicas = 16 processes", "20 experts of every layer, 55.7 GB", "tokens/s"] {
        assert!(words.contains(said), "{said} is not in:\n{words}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_told_with_a_code() {
    let folder = folder(&v2());
    let dir = folder.path().display().to_string();
    let run = janua(&["plan", "--model", &dir, "--nodes", "8", "--node-memory-gb", "48"]).await;
    assert!(run.failure(1).contains("--node-memory-gb"), "{run:#?}");
    assert!(run.stdout.contains("the largest shard does not fit; the fewest equal shards that do: 10"), "{}", run.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_no_message_holds_are_told() {
    let folder = folder(&v2());
    let dir = folder.path().display().to_string();
    let whole = janua(&["plan", "--model", &dir, "--nodes", "1", "--batch", "4096"]).await.ok().stdout;
    assert!(whole.contains("a batch of 83.9 MB is refused, messages have at most 67.1 MB"), "{whole}");
    let split = janua(&["plan", "--model", &dir, "--nodes", "8", "--batch", "4096", "--activations", "bf16"]).await.ok().stdout;
    assert!(!split.contains("refused"), "{split}");
}

#[tokio::test(flavor = "multi_thread")]
async fn uneven_shards_of_a_checkpoint_are_planned() {
    let dir = fixture("moe_v1").display().to_string();
    let run = janua(&["plan", "--model", &dir, "--starts", "0,3,8", "--activations", "int8", "--json"]).await.ok();
    let plan = run.json().remove(0);
    let ranges: Vec<_> = plan["shards"].as_array().unwrap().iter().map(|shard| shard["range"].as_str().unwrap()).collect();
    assert_eq!(ranges, ["0-2", "3-7", "8-15"]);
    let column = 2 * 3 * 64 * 20 * 4u64; // two layers of f32
    assert_eq!(plan["plan"]["shard_bytes"], json!({"least": 3 * column, "most": 8 * column}));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_plan_names_its_flag_or_field() {
    let moe = fixture("moe_v1").display().to_string();
    let with = |flags: &'static [&'static str]| {
        [&["plan", "--model", &moe], flags].concat().iter().map(|flag| (*flag).to_owned()).collect::<Vec<_>>()
    };
    for (flags, said) in [
        (with(&["--nodes", "0"]), "--nodes: must be at least 1"),
        (with(&["--nodes", "17"]), "--nodes: 17 shards of 16 experts"),
        (with(&["--nodes", "2", "--starts", "0,1,2"]), "--starts: 3 shards, but --nodes is 2"),
        (with(&["--starts", "0,5,4"]), "--starts: [0, 5, 4]: each shard begins after"),
        (with(&["--nodes", "2", "--replicas", "0"]), "--replicas: 0"),
        (with(&["--nodes", "2", "--batch", "0"]), "--batch: 0"),
        (with(&["--nodes", "2", "--bandwidth-gbit", "NaN"]), "--bandwidth-gbit: NaN"),
        (with(&["--nodes", "2", "--bandwidth-gbit", "0"]), "--bandwidth-gbit: 0"),
        (with(&["--nodes", "2", "--rtt-us", "-1"]), "--rtt-us: -1"),
        (with(&["--nodes", "2", "--memory-gb-per-s", "inf"]), "--memory-gb-per-s: inf"),
        (with(&["--nodes", "2", "--node-memory-gb", "-8"]), "--node-memory-gb: -8"),
        (with(&["--nodes", "2", "--compute-us-per-row-layer", "nan"]), "--compute-us-per-row-layer: NaN"),
    ] {
        let run = janua(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await;
        assert!(run.failure(64).contains(said), "{said} is not in: {}", run.stderr);
    }
    let mut odd = v2();
    odd["torch_dtype"] = json!("int4");
    let (odd, dense) = (folder(&odd), fixture("llama"));
    for (dir, said) in [(odd.path(), "torch_dtype: \"int4\" is not supported"), (&dense, "n_routed_experts: missing")] {
        let run = janua(&["plan", "--model", &dir.display().to_string(), "--nodes", "2"]).await;
        assert!(run.failure(66).contains(said), "{said} is not in: {}", run.stderr);
    }
}
