//! `janua verify`: every fixture passes, and what is wrong does not.

use std::fs;
use std::path::Path;

use serde_json::Value;
use testkit::fixture;

use crate::child::janua;

const FIXTURES: [&str; 15] = [
    "llama",
    "llama_gqa",
    "moe_v1",
    "v2_lite",
    "v2_full",
    "janus",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "preprocess",
    "tokenizers/llm",
    "tokenizers/v2",
    "tokenizers/v25",
    "tokenizers/coder",
    "tokenizers/vl",
    "tokenizers/janus",
];

#[tokio::test(flavor = "multi_thread")]
async fn every_fixture_passes() {
    for name in FIXTURES {
        let report = janua(&["verify", fixture(name).to_str().unwrap(), "--json"]).await.ok().json().remove(0);
        assert_eq!((&report["pass"], &report["failed"]), (&Value::from(true), &Value::from(0)), "{name}");
        assert!(report["compared"].as_u64().unwrap() >= 5, "{name}: {report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wire_gives_the_same() {
    for (name, wire) in [
        ("janus", "in-process"),
        ("janus", "nats"),
        ("llama", "direct"),
        ("moe_v1", "in-process"),
        ("v2_lite", "nats"),
        ("v2_full", "direct"),
        ("deepseek_vl", "nats"),
        ("deepseek_vl_hybrid", "in-process"),
        ("deepseek_vl_hybrid", "direct"),
    ] {
        let report = janua(&["verify", fixture(name).to_str().unwrap(), "--wire", wire, "--json"]).await.ok().json().remove(0);
        let rows = report["rows"].as_array().unwrap();
        let over_wire = rows.iter().filter(|row| row["quantity"].as_str().unwrap().starts_with(wire)).count();
        assert!(over_wire >= 2, "{name} over {wire}: {report}");
    }
}

/// Rows of a run that must fail.
async fn failures(dir: &Path) -> Vec<String> {
    let run = janua(&["verify", dir.to_str().unwrap(), "--json"]).await;
    run.failure(1);
    let report = run.json().remove(0);
    let rows = report["rows"].as_array().unwrap().iter().filter(|row| row["pass"] == false);
    rows.map(|row| row["quantity"].as_str().unwrap().to_owned()).collect()
}

fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in fs::read_dir(fixture(name)).unwrap().map(|entry| entry.unwrap().path()) {
        fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn other_weights_fail_everywhere() {
    let folder = copy("llama");
    let file = folder.path().join("model.safetensors");
    let mut weights = fs::read(&file).unwrap();
    // The last value of the last tensor, moved by a little.
    let end = weights.len();
    let value = f32::from_le_bytes(weights[end - 4..].try_into().unwrap()) + 0.5;
    weights[end - 4..].copy_from_slice(&value.to_le_bytes());
    fs::write(&file, weights).unwrap();
    let failures = failures(folder.path()).await;
    assert!(failures.iter().any(|row| row.contains("hidden") || row.contains("logits")), "{failures:?}");
}

/// Rows that only the second tower has.
#[tokio::test(flavor = "multi_thread")]
async fn both_towers_are_compared() {
    let report = janua(&["verify", fixture("deepseek_vl_hybrid").to_str().unwrap(), "--json"]).await.ok().json().remove(0);
    let rows: Vec<&str> = report["rows"].as_array().unwrap().iter().map(|row| row["quantity"].as_str().unwrap()).collect();
    for prompt in ["p0", "p1"] {
        for name in ["pixel_values", "high_res_pixel_values", "sam.hidden.layer3", "sam.neck", "sam.high_res_features", "image_features"] {
            assert!(rows.contains(&format!("{prompt}.{name}").as_str()), "{prompt}.{name} is not among {rows:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_processor_for_another_tower_is_named() {
    for (field, value, expected) in [
        ("size", serde_json::json!({"height": 56, "width": 56}), "field size: 56, but the vision tower takes 48"),
        ("high_res_size", Value::Null, "field high_res_size: missing"),
    ] {
        let folder = copy("deepseek_vl_hybrid");
        let file = folder.path().join("preprocessor_config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        config[field] = value;
        fs::write(&file, config.to_string()).unwrap();
        let run = janua(&["verify", folder.path().to_str().unwrap()]).await;
        assert!(run.failure(66).contains(expected), "{run:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_ids_and_unknown_quantities_fail() {
    let folder = copy("llama");
    let file = folder.path().join("golden.json");
    let mut golden: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    golden["prompts"][1]["generated_ids"][3] = Value::from(1);
    golden["prompts"][0]["entropy"] = Value::from(2.5);
    golden["curvature"] = Value::from(vec![1, 2, 3]);
    fs::write(&file, golden.to_string()).unwrap();
    let mut failures = failures(folder.path()).await;
    failures.sort();
    assert_eq!(failures, ["curvature", "prompts[0].entropy", "prompts[1].generated_ids"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_tensor_fails() {
    let folder = copy("llama");
    let file = folder.path().join("golden.safetensors");
    let golden = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(golden[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&golden[8..8 + length]).unwrap().replace("p0.hidden.layer0", "p0.hidden.layer9");
    fs::write(&file, [&golden[..8], header.as_bytes(), &golden[8 + length..]].concat()).unwrap();
    assert_eq!(failures(folder.path()).await, ["p0.hidden.layer9"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_tokenizer_fails() {
    let folder = copy("tokenizers/llm");
    fs::copy(fixture("tokenizers/coder").join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let run = janua(&["verify", folder.path().to_str().unwrap(), "--json"]).await;
    assert!(matches!(run.code, Some(1 | 66)), "{run:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_without_references_is_told() {
    let folder = copy("llama");
    fs::remove_file(folder.path().join("golden.json")).unwrap();
    let run = janua(&["verify", folder.path().to_str().unwrap()]).await;
    assert!(run.failure(66).contains("golden.json"));
}
