//! Opening good and bad folders: what is read, and the one line that every failure gives.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, Dtype};
use proptest::prelude::*;
use safetensors::tensor::{Dtype as D, TensorView, serialize};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures")).join(name)
}

/// A safetensors file written by the format's own library.
fn file(tensors: &[(&str, D, &[usize], Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    serialize(views, None).unwrap()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A safetensors file with this header, right or wrong.
fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn small() -> Vec<u8> {
    file(&[("a", D::F32, &[2, 2], f32s(&[1.0, 2.0, 3.0, 4.0])), ("b", D::BF16, &[3], vec![0x80, 0x3F, 0, 0x40, 0x40, 0xC0])])
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), br#"{"model_type": "llama", "text_config": {"layers": 3, "name": "x"}}"#).unwrap();
    for (name, data) in files {
        fs::write(dir.path().join(name), data).unwrap();
    }
    dir
}

/// The error of opening a folder with these files, which must be one line.
fn refusal(files: &[(&str, &[u8])]) -> String {
    let dir = folder(files);
    let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

fn check_refusal(files: &[(&str, &[u8])], expected: &[&str]) {
    let text = refusal(files);
    for part in expected {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn fixtures_open_and_have_the_same_tensors_as_the_format_library_sees() {
    for name in ["llama", "llama_gqa", "moe_v1", "v2_lite", "janus"] {
        let dir = fixture(name);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let data = fs::read(dir.join("model.safetensors")).unwrap();
        let reference = safetensors::SafeTensors::deserialize(&data).unwrap();
        assert_eq!(checkpoint.names().count(), reference.len());
        for (name, view) in reference.tensors() {
            let tensor = checkpoint.tensor(&name).unwrap();
            assert_eq!((tensor.shape, tensor.data), (view.shape(), view.data()), "{name}");
            assert_eq!(tensor.owned().bytes(), view.data(), "{name}");
            let place = tensor.location();
            assert_eq!(&data[place.offset as usize..][..place.len as usize], view.data(), "{name}");
            assert_eq!(place.file, dir.join("model.safetensors").canonicalize().unwrap());
        }
        let mut last = 0;
        checkpoint.scan(&mut |done| last = done).unwrap();
        assert_eq!(last, checkpoint.total_bytes());
    }
}

#[test]
fn values_are_widened_exactly() {
    let dir = folder(&[("model.safetensors", &small())]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().to_f32(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(checkpoint.tensor("b").unwrap().to_f32(), [1.0, 2.0, -3.0]);
    assert_eq!(checkpoint.tensor("b").unwrap().dtype, Dtype::BF16);
    let shared = checkpoint.tensor("b").unwrap().owned();
    drop(checkpoint);
    assert_eq!((shared.to_f32(), shared.shape()), (vec![1.0, 2.0, -3.0], &[3][..]));
}

#[test]
fn config_fields_are_typed_and_named() {
    let dir = folder(&[("model.safetensors", &small())]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config_as::<usize>("/text_config/layers").unwrap(), 3);
    #[derive(Debug, serde::Deserialize)]
    struct Text {
        #[allow(dead_code)]
        name: usize,
    }
    #[derive(Debug, serde::Deserialize)]
    struct Whole {
        #[allow(dead_code)]
        text_config: Text,
    }
    for (error, expected) in [
        (checkpoint.config_as::<Text>("/text_config").unwrap_err(), "config.json: field text_config.name: invalid type"),
        (checkpoint.config_as::<Whole>("").unwrap_err(), "config.json: field text_config.name: invalid type"),
        (checkpoint.config_as::<usize>("/text_config/name").unwrap_err(), "config.json: field text_config.name: invalid type"),
        (checkpoint.config_as::<usize>("/vision_config/size").unwrap_err(), "config.json: field vision_config.size: missing"),
    ] {
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    assert_eq!(checkpoint.json("absent.json").unwrap(), None);
    let missing = checkpoint.tensor("c").unwrap_err().to_string();
    assert!(missing.starts_with("missing tensor c (in "), "{missing}");
    let shape = checkpoint.tensor_shaped("a", &[4]).unwrap_err().to_string();
    assert!(shape.contains("tensor a: wrong shape: [4] expected, [2, 2] found"), "{shape}");
}

#[test]
#[cfg(unix)]
fn links_of_a_download_cache_are_followed() {
    let blobs = tempfile::tempdir().unwrap();
    fs::write(blobs.path().join("0123"), small()).unwrap();
    let dir = folder(&[]);
    std::os::unix::fs::symlink(blobs.path().join("0123"), dir.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().location().file, blobs.path().canonicalize().unwrap().join("0123"));
    fs::remove_file(blobs.path().join("0123")).unwrap();
    assert_eq!(checkpoint.tensor("a").unwrap().to_f32().len(), 4, "a removed file stays readable under its map");
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: cannot be opened"), "{error}");
}

#[test]
fn shards_are_joined() {
    let first = file(&[("a", D::F32, &[1], f32s(&[1.0]))]);
    let second = file(&[("b", D::F32, &[1], f32s(&[2.0])), ("c", D::F32, &[0], vec![])]);
    let index = br#"{"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}}"#;
    let dir = folder(&[("m-1.safetensors", &first), ("m-2.safetensors", &second), ("model.safetensors.index.json", index)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(checkpoint.tensor("b").unwrap().to_f32(), [2.0]);
    assert_eq!(checkpoint.total_bytes(), 8);
}

#[test]
fn bad_folders_are_refused_by_name() {
    let absent = Checkpoint::open(Path::new("/nonexistent/model")).unwrap_err().to_string();
    assert_eq!(absent, "/nonexistent/model: no such folder");
    let file = fixture("llama/config.json");
    assert!(Checkpoint::open(&file).unwrap_err().to_string().ends_with("config.json: is not a folder"));
    check_refusal(&[], &["no weights: neither model.safetensors nor model.safetensors.index.json"]);
    check_refusal(&[("pytorch_model.bin", b"PK")], &["pytorch_model.bin: pickled weights are not read; convert them", "python3 -c"]);
    let shards = [("pytorch_model-00002-of-00002.bin", &b"PK"[..]), ("pytorch_model-00001-of-00002.bin", b"PK")];
    check_refusal(&shards, &["pytorch_model-00001-of-00002.bin: pickled weights are not read; convert them", "python3 -c"]);
    for (config, expected) in [
        (&b"{"[..], "config.json: invalid JSON"),
        (b"\xFF\xFE", "config.json: invalid JSON"),
        (b"[1]", "config.json: not a JSON object"),
        (b"{}", "config.json: field model_type: missing"),
        (br#"{"model_type": 3}"#, "config.json: field model_type: a string expected, 3 found"),
    ] {
        check_refusal(&[("config.json", config), ("model.safetensors", &small())], &[expected]);
    }
    let dir = tempfile::tempdir().unwrap();
    let missing = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(missing.ends_with("config.json: missing: is this a model folder?"), "{missing}");
}

/// The command that a refusal names does what it says. PyTorch itself is no part of the tests: two small modules stand for it, which read
/// and write the same forms. Tensors that share their memory are refused by the real `save_file`, and by this one.
#[test]
fn the_conversion_command_converts() {
    let torch = r#"
import json
class Tensor:
    def __init__(self, values, memory): self.values, self.memory = values, memory
    def contiguous(self): return self
    def clone(self): return Tensor(self.values, object())
def load(file, map_location, weights_only):
    assert map_location == "cpu" and weights_only is True
    memory = {}
    return {name: Tensor(values, memory.setdefault(str(values), object())) for name, values in json.load(open(file)).items()}
"#;
    let safetensors = r#"
import json, struct
def save_file(tensors, file, metadata):
    assert len({id(tensor.memory) for tensor in tensors.values()}) == len(tensors), "shared memory"
    header, data = {"__metadata__": metadata}, b""
    for name, tensor in tensors.items():
        new = struct.pack(f"<{len(tensor.values)}f", *tensor.values)
        header[name] = {"dtype": "F32", "shape": [len(tensor.values)], "data_offsets": [len(data), len(data) + len(new)]}
        data += new
    text = json.dumps(header).encode()
    open(file, "wb").write(struct.pack("<Q", len(text)) + text + data)
"#;
    let modules = tempfile::tempdir().unwrap();
    fs::write(modules.path().join("torch.py"), torch).unwrap();
    fs::create_dir(modules.path().join("safetensors")).unwrap();
    fs::write(modules.path().join("safetensors/__init__.py"), "").unwrap();
    fs::write(modules.path().join("safetensors/torch.py"), safetensors).unwrap();

    let single = vec![("pytorch_model.bin", &br#"{"a": [1, 2], "tied": [1, 2], "b": [3]}"#[..])];
    let sharded = vec![
        ("pytorch_model-00001-of-00002.bin", &br#"{"a": [1, 2], "tied": [1, 2]}"#[..]),
        ("pytorch_model-00002-of-00002.bin", br#"{"b": [3]}"#),
    ];
    for files in [single, sharded] {
        let dir = folder(&files);
        let refusal = Checkpoint::open(dir.path()).unwrap_err().to_string();
        let command = refusal.split_once(", with: ").unwrap().1;
        let run = std::process::Command::new("sh").args(["-c", command]).current_dir(dir.path()).env("PYTHONPATH", modules.path()).output();
        let run = run.unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for (name, expected) in [("a", &[1.0, 2.0][..]), ("tied", &[1.0, 2.0]), ("b", &[3.0])] {
            assert_eq!(checkpoint.tensor(name).unwrap().to_f32(), expected, "{name} of {files:?}");
        }
    }
}

#[test]
fn bad_weight_files_are_refused_by_name() {
    let entry = |name: &str, dtype: &str, shape: &str, range: &str| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{range}}}"#)
    };
    let rows = [
        (vec![], "truncated: a safetensors file has at least 8 bytes, this one 0"),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "Git LFS pointer"),
        (b"this is no header".to_vec(), "header too large"),
        (raw("{", &[]), "garbage in the safetensors header"),
        (raw("[]", &[]), "garbage in the safetensors header"),
        ([&500u64.to_le_bytes()[..], b"{}"].concat(), "truncated: the header alone needs 508 bytes, the file has 10"),
        (raw(&format!("{{{}}}", entry("w\\n", "F8_E4M3", "[1]", "[0,1]")), &[0]), r"tensor w\n: unknown dtype F8_E4M3"),
        (
            raw(&format!("{{{}}}", entry("w", "F32", "[2]", "[0,4]")), &[0; 4]),
            "tensor w: byte range 0..4 does not fit shape [2] of F32 (8 bytes)",
        ),
        (raw(&format!("{{{}}}", entry("w", "F32", "[-1]", "[0,4]")), &[0; 4]), "tensor w: invalid value"),
        (
            raw(&format!("{{{}}}", entry("w", "U8", "[4294967296,4294967296]", "[0,0]")), &[]),
            "tensor w: the shape [4294967296, 4294967296] overflows",
        ),
        (raw(&format!("{{{}}}", entry("w", "U8", "[1]", "[18446744073709551614,18446744073709551615]")), &[]), "tensor w: byte range"),
        (raw(&format!("{{{}}}", entry("w", "U8", "[2]", "[3,1]")), &[0; 4]), "tensor w: byte range 3..1 does not fit"),
        (
            raw(&format!("{{{},{}}}", entry("v", "U8", "[4]", "[0,4]"), entry("w", "U8", "[4]", "[2,6]")), &[0; 6]),
            "tensor w: overlaps tensor v",
        ),
        (raw(&format!("{{{},{}}}", entry("w", "U8", "[1]", "[0,1]"), entry("w", "U8", "[1]", "[1,2]")), &[0; 2]), "tensor w: listed twice"),
        (raw(&format!("{{{}}}", entry("w", "U8", "[1]", "[2,3]")), &[0; 3]), "tensor w: 2 unused bytes before it"),
        (raw(&format!("{{{}}}", entry("w", "U8", "[1]", "[0,1]")), &[0; 3]), "2 bytes after the last tensor"),
    ];
    for (data, expected) in rows {
        check_refusal(&[("model.safetensors", &data)], &["model.safetensors: ", expected]);
    }
    let whole = small();
    let cut = &whole[..whole.len() - 3];
    let expected = format!("truncated file: {} bytes expected, {} there", whole.len(), cut.len());
    check_refusal(&[("model.safetensors", cut)], &["tensor b", &expected]);
}

#[test]
fn bad_indexes_are_refused_by_name() {
    let shard = file(&[("a", D::F32, &[1], f32s(&[1.0]))]);
    for (index, expected) in [
        (&br#"{}"#[..], "model.safetensors.index.json: field weight_map: missing"),
        (br#"{"weight_map": []}"#, "field weight_map: an object expected"),
        (br#"{"weight_map": {"a": 1}}"#, "tensor a: the name of a file in this folder expected"),
        (br#"{"weight_map": {"a": "../m-1.safetensors"}}"#, "tensor a: the name of a file in this folder expected"),
        (br#"{"weight_map": {"a": "/etc/passwd"}}"#, "tensor a: the name of a file in this folder expected"),
        (br#"{"weight_map": {"a": "m-3.safetensors"}}"#, "index.json: names the missing file m-3.safetensors for tensor a"),
        (br#"{"weight_map": {"z": "m-1.safetensors"}}"#, "m-1.safetensors: tensor z: not in this file"),
        (br#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#, "m-2.safetensors: tensor a: duplicate: also in"),
    ] {
        check_refusal(&[("m-1.safetensors", &shard), ("m-2.safetensors", &shard), ("model.safetensors.index.json", index)], &[expected]);
    }
}

#[test]
fn weights_that_are_not_numbers_are_refused_by_name() {
    let half = |bits: u16| [vec![0; 6], bits.to_le_bytes().to_vec()].concat();
    for (dtype, data) in [
        (D::F32, f32s(&[0.0, 1.0, -1.0, f32::NAN])),
        (D::F32, f32s(&[0.0, 1.0, -1.0, f32::NEG_INFINITY])),
        (D::F16, half(0x7C00)),
        (D::F16, half(0xFE00)),
        (D::BF16, half(0xFF80)),
        (D::BF16, half(0x7FC0)),
        (D::F64, [0.0, 0.0, 0.0, f64::NAN].iter().flat_map(|value: &f64| value.to_le_bytes()).collect()),
    ] {
        let weights = file(&[("fine", D::F32, &[1], f32s(&[f32::MAX])), ("norm.weight", dtype, &[4], data)]);
        let dir = folder(&[("model.safetensors", &weights)]);
        let error = Checkpoint::open(dir.path()).unwrap().scan(&mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("model.safetensors: tensor norm.weight: element 3 is NaN or infinite"), "{error}");
    }
    let integers = file(&[("codes", D::I64, &[1], vec![0xFF; 8])]);
    let dir = folder(&[("model.safetensors", &integers)]);
    Checkpoint::open(dir.path()).unwrap().scan(&mut |_| {}).unwrap();
}

/// Opens the folder and, if that works, touches everything; only a panic is a failure.
fn exercise(dir: &Path) {
    if let Ok(checkpoint) = Checkpoint::open(dir) {
        for name in checkpoint.names() {
            let tensor = checkpoint.tensor(name).unwrap();
            assert_eq!(tensor.to_f32().len(), tensor.shape.iter().product::<usize>());
            assert_eq!(tensor.location().len as usize, tensor.data.len());
        }
        let _ = checkpoint.scan(&mut |_| {});
    }
}

proptest! {
    #[test]
    fn mutated_files_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut in prop::option::of(any::<prop::sample::Index>())) {
        let mut data = small();
        for (place, byte) in edits {
            let place = place.index(data.len());
            data[place] = byte;
        }
        if let Some(cut) = cut {
            data.truncate(cut.index(data.len()));
        }
        exercise(folder(&[("model.safetensors", &data)]).path());
    }

    #[test]
    fn headers_of_any_json_never_panic(begin in any::<u64>(), end in any::<u64>(), shape in prop::collection::vec(any::<u64>(), 0..5), small in any::<bool>()) {
        let (begin, end) = if small { (begin % 16, end % 16) } else { (begin, end) };
        let header = format!(r#"{{"w":{{"dtype":"U8","shape":{shape:?},"data_offsets":[{begin},{end}]}}}}"#);
        exercise(folder(&[("model.safetensors", &raw(&header, &[0; 16]))]).path());
    }

    #[test]
    fn mutated_configs_and_indexes_never_panic(place in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut index = br#"{"weight_map": {"a": "m-1.safetensors"}}"#.to_vec();
        let place = place.index(index.len());
        index[place] = byte;
        let shard = file(&[("a", D::F32, &[1], f32s(&[1.0]))]);
        exercise(folder(&[("m-1.safetensors", &shard), ("model.safetensors.index.json", &index), ("config.json", &index)]).path());
        exercise(folder(&[("m-1.safetensors", &shard), ("model.safetensors.index.json", &index)]).path());
    }
}

/// Bytes of the file `path` that are mapped into this process at the moment.
#[cfg(target_os = "linux")]
fn mapped_in(path: &Path) -> usize {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let of_file = maps.split(path.to_str().unwrap()).nth(1).expect("the file is mapped");
    let line = of_file.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<usize>().unwrap() << 10
}

#[test]
#[cfg(target_os = "linux")]
fn weights_that_were_read_do_not_stay_in_memory() {
    const VALUES: usize = 8 << 20;
    let data: Vec<u8> = (0..0x4000_u16).cycle().take(VALUES).flat_map(u16::to_le_bytes).collect();
    let dir = folder(&[("model.safetensors", &file(&[("a", D::BF16, &[VALUES], data.clone())]))]);
    let path = dir.path().canonicalize().unwrap().join("model.safetensors");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.scan(&mut |_| {}).unwrap();
    assert!(mapped_in(&path) < 1 << 20, "{} bytes stay after a scan", mapped_in(&path));
    let tensor = checkpoint.tensor("a").unwrap().owned();
    assert_eq!(tensor.bytes(), data);
    assert!(mapped_in(&path) >= data.len(), "what is used is mapped");
    tensor.release();
    assert!(mapped_in(&path) < 1 << 20, "{} bytes stay after a release", mapped_in(&path));
    assert_eq!(tensor.bytes(), data, "and can be read again");
}
