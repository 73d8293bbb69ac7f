//! How long the pixels' side takes at the size of the published models (SigLIP-L/16-384 with aligner, the same with SAM-B at 1024, VQ-16), with
//! random weights.
//!
//! `cargo bench -p models --bench vision -- [threads]`; writes and removes about 2 GB in the system's temporary folder.
#![allow(clippy::unwrap_used, dead_code)]

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use checkpoint::Checkpoint;
use models::{OnnxOptions, Planes, load_vision, load_vq};
use serde_json::{Value, json};

#[path = "../tests/support/naive_pixels.rs"]
mod naive_pixels;
#[path = "../tests/support/naive_sam.rs"]
mod naive_sam;

const RUNS: usize = 3;

fn main() {
    let threads = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(2);
    let options = OnnxOptions { threads };
    println!("{threads} threads; best of {RUNS} runs after one");
    println!("{:<34} {:>8} {:>10} {:>14} {:>12}", "", "load s", "s/picture", "CPU s/picture", "memory MB");
    for dtype in ["F32", "BF16"] {
        let dir = tempfile::tempdir().unwrap();
        let tower = naive_pixels::Tower {
            image: 384,
            patch: 16,
            hidden: 1024,
            inner: 4096,
            layers: 24,
            heads: 16,
            width: 2048,
            depth: 2,
            epsilon: 1e-6,
            names: naive_pixels::JANUS,
        };
        write(dir.path(), dtype, tower.shapes_with_aligner(), &json!({"model_type": "janus", "vision_config": {"projection_dim": 2048}}));
        let start = Instant::now();
        let encoder = load_vision(&open(dir.path()), &options).unwrap().unwrap();
        let load = start.elapsed().as_secs_f64();
        let pixels: Vec<f32> = (0..3 * 384 * 384).map(|i| (i % 255) as f32 / 127.5 - 1.0).collect();
        report(&format!("SigLIP-L + aligner, {dtype}"), load, || drop(encoder.encode(&pixels).unwrap()));
        drop(encoder);

        write(dir.path(), dtype, hybrid_shapes(), &hybrid_config());
        let start = Instant::now();
        let encoder = load_vision(&open(dir.path()), &options).unwrap().unwrap();
        let load = start.elapsed().as_secs_f64();
        let large: Vec<f32> = (0..3 * 1024 * 1024).map(|i| (i % 255) as f32 / 127.5 - 1.0).collect();
        let planes = Planes { main: &pixels, high_res: Some(&large) };
        report(&format!("SAM-B + SigLIP-L + aligner, {dtype}"), load, || drop(encoder.encode(planes).unwrap()));
        drop(encoder);

        let vq = naive_pixels::Vq { side: 24, codebook: 16_384, code: 8, latent: 256, levels: vec![512, 256, 256, 128, 128], blocks: 3 };
        write(dir.path(), dtype, vq.shapes(), &json!({"model_type": "janus", "vq_config": {"num_patches": 24}}));
        let start = Instant::now();
        let decoder = load_vq(&open(dir.path()), &options).unwrap().unwrap();
        let load = start.elapsed().as_secs_f64();
        let codes: Vec<u32> = (0..576).map(|i| i * 7919 % 16_384).collect();
        report(&format!("VQ-16, {dtype}"), load, || drop(decoder.decode(&codes).unwrap()));
    }
}

/// DeepSeek-VL 7B: both towers and their aligner.
fn hybrid_shapes() -> Vec<(String, Vec<usize>)> {
    let tower = naive_pixels::Tower {
        image: 384,
        patch: 16,
        hidden: 1024,
        inner: 4096,
        layers: 24,
        heads: 16,
        width: 4096,
        depth: 2,
        epsilon: 1e-6,
        names: naive_pixels::DEEPSEEK_VL,
    };
    let sam = naive_sam::Sam {
        image: 1024,
        patch: 16,
        hidden: 768,
        inner: 3072,
        layers: 12,
        heads: 12,
        window: 14,
        global: vec![2, 5, 8, 11],
        channels: 256,
        side: 24,
    };
    let mut shapes = [tower.shapes(), sam.shapes()].concat();
    for (name, output, input) in [("high_res_vision_proj", 2048, 1024), ("vision_proj", 2048, 1024), ("proj", 4096, 4096)] {
        naive_pixels::pair(&mut shapes, format!("model.aligner.{name}"), &[output, input]);
    }
    shapes
}

fn hybrid_config() -> Value {
    json!({
        "model_type": "deepseek_vl_hybrid",
        "text_config": {},
        "vision_config": {
            "image_size": 384, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        "high_res_vision_config": {},
    })
}

fn open(dir: &Path) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir).unwrap())
}

fn report(what: &str, load: f64, run: impl Fn()) {
    run();
    let timed = || {
        let (start, spent) = (Instant::now(), cpu_seconds());
        run();
        (start.elapsed().as_secs_f64(), cpu_seconds() - spent)
    };
    let (mut best, mut cpu) = (f64::INFINITY, f64::INFINITY);
    for (wall, spent) in (0..RUNS).map(|_| timed()) {
        (best, cpu) = (best.min(wall), cpu.min(spent));
    }
    println!("{what:<34} {load:>8.2} {best:>10.2} {cpu:>14.2} {:>12}", memory());
}

/// What all threads have computed so far: comparable on a machine that others use, too.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Anonymous and file-backed memory of this process, MB.
fn memory() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let of = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib >> 10)
    };
    format!("{} + {}", of("RssAnon").unwrap_or(0), of("RssFile").unwrap_or(0))
}

/// Small random weights; norms are one.
fn write(dir: &Path, dtype: &str, shapes: Vec<(String, Vec<usize>)>, config: &Value) {
    let size = if dtype == "F32" { 4 } else { 2 };
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in &shapes {
        let begin = end;
        end += shape.iter().product::<usize>() * size;
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = BufWriter::new(File::create(dir.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let mut state = 88_172_645_463_325_252_u64;
    for (name, shape) in &shapes {
        for _ in 0..shape.iter().product::<usize>() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let noise = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let value = if shape.len() == 1 && name.ends_with("weight") { 1.0 } else { noise * 0.03 };
            file.write_all(&value.to_le_bytes()[4 - size..]).unwrap();
        }
    }
    file.flush().unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
}
