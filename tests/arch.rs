//! The rules of ARCHITECTURE.md that a machine can check: which crate may use which, and how large a file may grow.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// What each crate of ours may depend on (tests and benches aside). Arrows point down; a service knows no other service.
const ALLOWED: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("cpu", &[]),
    ("domain", &[]),
    ("wire", &["domain", "proto"]),
    ("telemetry", &[]),
    ("config", &[]),
    ("cache", &[]),
    ("mesh", &["telemetry"]),
    ("process", &["config", "mesh", "telemetry", "checkpoint"]),
    ("testkit", &[]),
    ("placement", &[]),
    ("checkpoint", &[]),
    ("text", &["checkpoint", "domain"]),
    ("pixels", &["domain"]),
    ("layers", &["checkpoint", "domain"]),
    ("backend-native", &["checkpoint", "cpu", "layers"]),
    ("backend-onnx", &["checkpoint", "layers"]),
    ("models", &["backend-native", "backend-onnx", "checkpoint", "domain", "layers"]),
    ("sched", &["domain", "layers"]),
    ("constraint", &["domain", "sched", "text"]),
    ("router", &["config", "domain", "mesh", "process", "proto", "telemetry", "wire"]),
    ("tokenizer", &["checkpoint", "config", "domain", "mesh", "process", "proto", "telemetry", "text", "wire"]),
    ("vision", &["cache", "checkpoint", "config", "domain", "mesh", "models", "pixels", "process", "proto", "telemetry", "wire"]),
    (
        "language",
        &[
            "checkpoint",
            "config",
            "constraint",
            "domain",
            "layers",
            "mesh",
            "models",
            "placement",
            "process",
            "proto",
            "sched",
            "telemetry",
            "wire",
        ],
    ),
    ("experts", &["checkpoint", "config", "domain", "layers", "mesh", "models", "placement", "process", "proto", "telemetry", "wire"]),
    ("images", &["checkpoint", "config", "domain", "mesh", "models", "pixels", "process", "proto", "telemetry", "wire"]),
];

/// Foreign systems, and the only crates that may see them.
const DOORS: &[(&str, &[&str])] = &[
    ("async-nats", &["mesh", "testkit"]),
    ("redis", &["cache", "testkit"]),
    ("ort", &["backend-onnx"]),
    ("opentelemetry", &["telemetry"]),
    ("opentelemetry-otlp", &["telemetry"]),
    ("axum", &["telemetry"]),
    ("tokenizers", &["text"]),
    ("llguidance", &["constraint"]),
    ("toktrie", &["constraint"]),
    ("png", &["pixels"]),
    ("zune-jpeg", &["pixels"]),
    ("image-webp", &["pixels"]),
    ("h2", &["mesh"]),
    ("hyper", &["mesh"]),
];

/// Files that may be longer than [`MAX_LINES`], each with a reason in its header.
const LONG_FILES: &[&str] = &[];
const MAX_LINES: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Normal dependencies of every crate of the workspace.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let output =
        Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--offline", "--format-version", "1"]).current_dir(root()).output();
    let metadata: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    let normal = |package: &Value| {
        let list = package["dependencies"].as_array().unwrap().iter();
        list.filter(|d| d["kind"].is_null()).map(|d| d["name"].as_str().unwrap().to_owned()).collect()
    };
    metadata["packages"].as_array().unwrap().iter().map(|p| (p["name"].as_str().unwrap().to_owned(), normal(p))).collect()
}

#[test]
fn arrows_point_down() {
    let crates = dependencies();
    for (name, allowed) in ALLOWED {
        let used = crates.get(*name).unwrap_or_else(|| panic!("crate {name} is gone: take it out of ALLOWED"));
        let forbidden: Vec<_> = used.iter().filter(|d| crates.contains_key(*d) && !allowed.contains(&d.as_str())).collect();
        assert!(forbidden.is_empty(), "{name} may not use {forbidden:?}");
    }
    let free = ["janua", "tests"];
    let unlisted: Vec<_> = crates.keys().filter(|c| !free.contains(&c.as_str()) && !ALLOWED.iter().any(|(name, _)| name == c)).collect();
    assert!(unlisted.is_empty(), "say what {unlisted:?} may use: add a row to ALLOWED");
}

#[test]
fn each_foreign_system_has_one_door() {
    for (name, used) in dependencies() {
        for (foreign, doors) in DOORS {
            let listed = used.iter().any(|d| d == foreign);
            assert!(!listed || doors.contains(&name.as_str()) || name == "tests", "{name} uses {foreign}: only {doors:?} may");
        }
    }
}

#[test]
fn files_stay_small() {
    let mut sources = Vec::new();
    collect(&root(), &mut sources, &|path| path.extension().is_some_and(|e| e == "rs"));
    assert!(sources.len() > 20, "no sources found below {}", root().display());
    let long: Vec<_> = sources
        .iter()
        .filter(|path| fs::read_to_string(path).unwrap().lines().count() > MAX_LINES)
        .map(|path| path.strip_prefix(root()).unwrap().display().to_string())
        .filter(|path| !path.contains("/gen/") && !LONG_FILES.contains(&path.as_str()))
        .collect();
    assert!(long.is_empty(), "more than {MAX_LINES} lines: {long:?}");
}

#[test]
fn links_in_markdown_lead_somewhere() {
    let mut pages = Vec::new();
    collect(&root(), &mut pages, &|path| path.extension().is_some_and(|e| e == "md"));
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#', ' ']).next());
        for target in targets.filter(|t| !t.is_empty() && !t.contains("://")) {
            let file = page.parent().unwrap().join(target);
            assert!(file.exists(), "{}: link to {target} leads nowhere", page.display());
        }
    }
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>, wanted: &dyn Fn(&Path) -> bool) {
    for entry in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        let name = entry.file_name().unwrap().to_string_lossy().into_owned();
        if entry.is_dir() && name != "target" && !name.starts_with('.') {
            collect(&entry, found, wanted);
        } else if wanted(&entry) {
            found.push(entry);
        }
    }
}
