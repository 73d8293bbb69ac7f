//! Folders that are no usable checkpoint: one line that names what is wrong, and exit code 66.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::child::janua;

/// What is broken, how, and what the line must name.
type Row = (&'static str, fn(&Path), &'static [&'static str]);

const WEIGHTS: &str = "model.safetensors";
const TENSOR: &str = "model.layers.1.mlp.up_proj.weight";

const ROWS: &[Row] = &[
    ("missing tensor", |dir| edit(dir, |file| file.remove(TENSOR)), &[TENSOR, "missing"]),
    ("wrong shape", |dir| edit(dir, |file| file.header[TENSOR]["shape"].as_array_mut().unwrap().reverse()), &[TENSOR, "shape"]),
    ("unknown dtype", |dir| edit(dir, |file| file.header[TENSOR]["dtype"] = json!("F4X")), &[TENSOR, "F4X"]),
    ("shape that does not fit its bytes", |dir| edit(dir, |file| file.header[TENSOR]["shape"] = json!([1, 1])), &[TENSOR]),
    ("NaN weight", |dir| edit(dir, |file| file.set(TENSOR, 5, f32::NAN)), &[TENSOR, "NaN"]),
    ("infinite weight", |dir| edit(dir, |file| file.set(TENSOR, 0, f32::INFINITY)), &[TENSOR]),
    ("truncated file", truncate, &[WEIGHTS]),
    ("empty file", |dir| fs::write(dir.join(WEIGHTS), b"").unwrap(), &[WEIGHTS]),
    ("header longer than the file", |dir| fs::write(dir.join(WEIGHTS), u64::MAX.to_le_bytes()).unwrap(), &[WEIGHTS]),
    ("no weights", |dir| fs::remove_file(dir.join(WEIGHTS)).unwrap(), &[WEIGHTS]),
    ("sharded index that names a missing file", shard, &["model-00002-of-00002.safetensors", "model.safetensors.index.json"]),
    ("no tokenizer", |dir| fs::remove_file(dir.join("tokenizer.json")).unwrap(), &["tokenizer.json"]),
    ("broken tokenizer", |dir| fs::write(dir.join("tokenizer.json"), b"{").unwrap(), &["tokenizer.json"]),
    ("no configuration", |dir| fs::remove_file(dir.join("config.json")).unwrap(), &["config.json"]),
    ("broken configuration", |dir| fs::write(dir.join("config.json"), b"[]").unwrap(), &["config.json"]),
    ("configuration without a family", |dir| configure(dir, "model_type", Value::Null), &["config.json", "model_type"]),
    ("heads that do not divide the width", |dir| configure(dir, "num_attention_heads", json!(5)), &["config.json", "num_attention_heads"]),
    ("field of the wrong type", |dir| configure(dir, "hidden_size", json!("wide")), &["config.json", "hidden_size"]),
    ("unknown family", |dir| configure(dir, "model_type", json!("perceptron")), &["perceptron"]),
];

#[tokio::test(flavor = "multi_thread")]
async fn serve_refuses_them() {
    for (name, break_it, named) in ROWS {
        let folder = broken(break_it);
        let path = folder.path().display().to_string();
        let run = janua(&["serve", "--model", &format!("tiny={path}"), "--listen", "127.0.0.1:0", "--json"]).await;
        let line = run.failure(66);
        for word in *named {
            assert!(line.contains(word), "{name}: {word} is not named in: {line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_refuses_them_and_doctor_lists_them() {
    for (name, break_it, named) in [&ROWS[0], &ROWS[4], &ROWS[6], &ROWS[11]] {
        let folder = broken(break_it);
        let path = folder.path().display().to_string();
        let line = janua(&["verify", &path]).await.failure(66).to_owned();
        let doctor = janua(&["doctor", "--model", &path, "--set", "router.listen=127.0.0.1:0"]).await;
        assert_eq!(doctor.code, Some(1), "{name}: {doctor:#?}");
        for word in *named {
            assert!(line.contains(word), "{name}: {word} is not named in: {line}");
            assert!(doctor.stdout.contains(word), "{name}: {word} is not named in: {}", doctor.stdout);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_folder_is_named() {
    let line = janua(&["serve", "--model", "tiny=/no/such/folder", "--json"]).await.failure(66).to_owned();
    assert!(line.contains("/no/such/folder"), "{line}");
}

/// A model that draws by a flow needs a VAE: in its own folder, or where the settings say.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_vae_is_named_with_its_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let (model, vae) = (folder.path().join("flow"), folder.path().join("elsewhere"));
    for (from, to) in [(testkit::fixture("janusflow"), &model), (testkit::fixture("janusflow").join("vae"), &vae)] {
        fs::create_dir(to).unwrap();
        for file in fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
            fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    }
    let (model, vae) = (model.display().to_string(), vae.display().to_string());
    let missing = format!("{model}/vae");
    let named = |line: &str| assert!(line.contains(&missing) && line.contains("--vae"), "{line}");
    named(janua(&["serve", "--model", &format!("tiny={model}"), "--listen", "127.0.0.1:0", "--json"]).await.failure(66));
    named(janua(&["verify", &model]).await.failure(66));
    let doctor = ["doctor", "--model", &model, "--set", "router.listen=127.0.0.1:0"];
    let found = janua(&doctor).await;
    assert_eq!(found.code, Some(1), "{found:#?}");
    named(&found.stdout);
    let wrong = janua(&["verify", &model, "--vae", &format!("{vae}/no")]).await;
    assert!(wrong.failure(66).contains("elsewhere/no"), "{wrong:#?}");

    janua(&["verify", &model, "--vae", &vae, "--json"]).await.ok();
    janua(&[&doctor[..], &["--vae", &vae]].concat()).await.ok();
    let out = folder.path().join("out.png").display().to_string();
    let flags =
        ["image", "--model-dir", &model, "--vae", &vae, "--steps", "2", "--solver", "heun", "--seed", "1", "--out", &out, "a lantern"];
    janua(&flags).await.ok();
    assert!(fs::metadata(&out).unwrap().len() > 0);
}

/// A copy of a good checkpoint, broken.
fn broken(break_it: &fn(&Path)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in fs::read_dir(testkit::fixture("llama")).unwrap().map(|entry| entry.unwrap().path()) {
        fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    break_it(folder.path());
    folder
}

/// A weight file taken apart: header, and the bytes of every tensor behind it.
struct Weights {
    header: Value,
    data: Vec<u8>,
}

impl Weights {
    fn range(&self, name: &str) -> std::ops::Range<usize> {
        let offset = |i: usize| self.header[name]["data_offsets"][i].as_u64().unwrap() as usize;
        offset(0)..offset(1)
    }

    /// Takes a tensor out, and closes the hole.
    fn remove(&mut self, name: &str) {
        let hole = self.range(name);
        self.header.as_object_mut().unwrap().remove(name);
        self.data.drain(hole.clone());
        for (_, tensor) in self.header.as_object_mut().unwrap().iter_mut().filter(|(name, _)| *name != "__metadata__") {
            for offset in tensor["data_offsets"].as_array_mut().unwrap() {
                let place = offset.as_u64().unwrap() as usize;
                *offset = json!(if place >= hole.end { place - hole.len() } else { place });
            }
        }
    }

    /// Overwrites one f32 of a tensor.
    fn set(&mut self, name: &str, index: usize, value: f32) {
        let start = self.range(name).start + 4 * index;
        self.data[start..start + 4].copy_from_slice(&value.to_le_bytes());
    }
}

fn edit(dir: &Path, change: impl Fn(&mut Weights)) {
    let file = fs::read(dir.join(WEIGHTS)).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut weights = Weights { header: serde_json::from_slice(&file[8..8 + length]).unwrap(), data: file[8 + length..].to_vec() };
    assert!(weights.header.get(TENSOR).is_some(), "the fixture has {TENSOR}");
    change(&mut weights);
    let header = serde_json::to_vec(&weights.header).unwrap();
    let parts = [&(header.len() as u64).to_le_bytes()[..], &header, &weights.data];
    fs::write(dir.join(WEIGHTS), parts.concat()).unwrap();
}

fn truncate(dir: &Path) {
    let mut file = fs::read(dir.join(WEIGHTS)).unwrap();
    file.truncate(file.len() - 1000);
    fs::write(dir.join(WEIGHTS), file).unwrap();
}

fn shard(dir: &Path) {
    let first = "model-00001-of-00002.safetensors";
    fs::rename(dir.join(WEIGHTS), dir.join(first)).unwrap();
    let index = json!({"metadata": {}, "weight_map": {"model.embed_tokens.weight": first, TENSOR: "model-00002-of-00002.safetensors"}});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn configure(dir: &Path, field: &str, value: Value) {
    let file = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    match value {
        Value::Null => drop(config.as_object_mut().unwrap().remove(field)),
        value => config[field] = value,
    }
    fs::write(file, config.to_string()).unwrap();
}
