use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::shown;
use crate::header::Entry;
use crate::json::read_json;
use crate::weights::WeightFile;
use crate::{CheckpointError, TensorView};

const CONFIG: &str = "config.json";

/// Bytes of a file that its fingerprint reads.
const PAGE: usize = 4096;

/// How the files of a folder are called.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// The field of the configuration that says what the folder holds.
    kind: &'static str,
    single: &'static str,
    index: &'static str,
}

const TRANSFORMERS: Layout = Layout { kind: "model_type", single: "model.safetensors", index: "model.safetensors.index.json" };
const DIFFUSERS: Layout =
    Layout { kind: "_class_name", single: "diffusion_pytorch_model.safetensors", index: "diffusion_pytorch_model.safetensors.index.json" };

/// Rewrites pickled weights, which are programs and not only data, as safetensors files that this crate reads: file by file, so that one
/// of them has to fit into memory, and with an index of which tensor went where. `clone` takes apart tensors that share their memory.
const CONVERT: &str = concat!(
    "convert them once, in that folder, with: python3 -c 'import glob,json,torch,safetensors.torch as s; json.dump({\"metadata\":{},\"weight_map\":",
    "{k:n for f in sorted(glob.glob(\"pytorch_model*.bin\")) for n in [f[8:-4]+\".safetensors\"] ",
    "for d in [{k:v.contiguous().clone() for k,v in torch.load(f,map_location=\"cpu\",weights_only=True).items()}] ",
    "for _ in [s.save_file(d,n,{\"format\":\"pt\"})] for k in d}},open(\"model.safetensors.index.json\",\"w\"))'"
);

/// A model folder with its weights mapped into memory. Share it in an `Arc`.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    model_type: String,
    files: Vec<Arc<WeightFile>>,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Debug)]
struct Tensor {
    /// Index in `Checkpoint::files`.
    file: usize,
    entry: Entry,
}

impl Checkpoint {
    /// Opens the folder `dir` and checks every weight file's header against its length. Reads no weights yet.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_as(dir, &TRANSFORMERS)
    }

    /// As [`Checkpoint::open`], for a part of an image pipeline, such as a VAE, as the diffusers library stores it. What it calls the class is
    /// the model type here.
    pub fn open_diffusers(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_as(dir, &DIFFUSERS)
    }

    /// The folder `dir` without its weights, which need not be there: for questions that its JSON files answer. It has no tensors.
    pub fn open_config(dir: &Path) -> Result<Self, CheckpointError> {
        Self::without_weights(dir, &TRANSFORMERS)
    }

    fn open_as(dir: &Path, layout: &Layout) -> Result<Self, CheckpointError> {
        let mut checkpoint = Self::without_weights(dir, layout)?;
        checkpoint.open_weights(layout)?;
        Ok(checkpoint)
    }

    fn without_weights(dir: &Path, layout: &Layout) -> Result<Self, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::file(dir, if dir.exists() { "is not a folder" } else { "no such folder" }));
        }
        let config = required_json(dir, CONFIG)?;
        let model_type = match config.get(layout.kind).map(|value| (value, value.as_str())) {
            Some((_, Some(text))) => text.to_owned(),
            Some((value, None)) => {
                return Err(field(dir, CONFIG, layout.kind, format!("a string expected, {} found", shown(&value.to_string()))));
            }
            None => return Err(field(dir, CONFIG, layout.kind, "missing")),
        };
        Ok(Self { dir: dir.to_path_buf(), config, model_type, files: Vec::new(), tensors: BTreeMap::new() })
    }

    /// The folder as it was given to [`Checkpoint::open`].
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// `model_type` of `config.json`.
    pub fn model_type(&self) -> &str {
        &self.model_type
    }

    /// Another JSON file of the folder; `None` when it is absent.
    pub fn json(&self, file: &str) -> Result<Option<Value>, CheckpointError> {
        read_json(&self.dir.join(file))
    }

    /// The part of `config.json` at a JSON pointer (`""` = all of it, `"/text_config"`), as a typed value. Errors name the field.
    pub fn config_as<T: DeserializeOwned>(&self, pointer: &str) -> Result<T, CheckpointError> {
        let prefix = pointer.trim_start_matches('/').replace('/', ".");
        let value = self.config.pointer(pointer).ok_or_else(|| field(&self.dir, CONFIG, &prefix, "missing"))?;
        serde_path_to_error::deserialize(value).map_err(|error| {
            let inner = error.path().to_string();
            let path =
                [prefix.as_str(), inner.as_str()].into_iter().filter(|part| !part.is_empty() && *part != ".").collect::<Vec<_>>().join(".");
            field(&self.dir, CONFIG, if path.is_empty() { "." } else { &path }, shown(&error.into_inner().to_string()))
        })
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor called `name`, or an error that says which one is missing where.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, CheckpointError> {
        match self.tensors.get_key_value(name) {
            Some((name, tensor)) => Ok(self.view(name, tensor)),
            None => Err(CheckpointError::MissingTensor { dir: self.dir.clone(), name: shown(name) }),
        }
    }

    /// The tensor called `name`, which must have exactly this shape.
    pub fn tensor_shaped(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, CheckpointError> {
        let tensor = self.tensor(name)?;
        if tensor.shape != shape {
            let reason = format!("wrong shape: {shape:?} expected, {:?} found", tensor.shape);
            return Err(CheckpointError::tensor(&tensor.file.path, name, reason));
        }
        Ok(tensor)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.bytes_of(&|_| true)
    }

    /// Bytes of the tensors whose names are `wanted`.
    pub fn bytes_of(&self, wanted: &dyn Fn(&str) -> bool) -> u64 {
        let wanted = self.tensors.iter().filter(|(name, _)| wanted(name));
        wanted.map(|(_, tensor)| (tensor.entry.end - tensor.entry.begin) as u64).sum()
    }

    /// A name for the weights of this folder, made of its configuration, of where each tensor lies, and of the end of every weight file. Folders
    /// with other weights have other names as long as they differ there, as they do after any training. Reads one page of each file.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.config.to_string().as_bytes());
        for tensor in self.in_file_order() {
            hasher.update(format!("\0{} {} {:?} {:?}", tensor.name, tensor.dtype, tensor.shape, tensor.range).as_bytes());
        }
        for file in &self.files {
            let bytes = file.bytes();
            hasher.update(&bytes[bytes.len().saturating_sub(PAGE)..]);
        }
        *hasher.finalize().as_bytes()
    }

    /// Every tensor in the order in which a disk reads them fastest.
    pub(crate) fn in_file_order(&self) -> Vec<TensorView<'_>> {
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_by_key(|(_, tensor)| (tensor.file, tensor.entry.begin));
        tensors.into_iter().map(|(name, tensor)| self.view(name, tensor)).collect()
    }

    fn view<'a>(&'a self, name: &'a str, tensor: &'a Tensor) -> TensorView<'a> {
        let (file, entry) = (&self.files[tensor.file], &tensor.entry);
        let range = entry.begin..entry.end;
        TensorView { name, dtype: entry.dtype, shape: &entry.shape, data: &file.bytes()[range.clone()], file, range }
    }

    /// One file, or the shards that the index names. A single file wins, as in the reference library.
    fn open_weights(&mut self, layout: &Layout) -> Result<(), CheckpointError> {
        let Layout { single, index, .. } = *layout;
        if self.dir.join(single).symlink_metadata().is_ok() {
            return self.add_file(single);
        }
        if let Some(shards) = self.json(index)? {
            return self.open_shards(index, &shards);
        }
        let names = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        match names.map(|file| file.file_name().to_string_lossy().into_owned()).filter(|name| is_pickled(name)).min() {
            Some(name) => Err(CheckpointError::file(&self.dir.join(shown(&name)), format!("pickled weights are not read; {CONVERT}"))),
            None => Err(CheckpointError::file(&self.dir, format!("no weights: neither {single} nor {index}"))),
        }
    }

    /// The shards that the file called `index_name` names.
    fn open_shards(&mut self, index_name: &str, index: &Value) -> Result<(), CheckpointError> {
        let wrong = |reason: String| field(&self.dir, index_name, "weight_map", reason);
        let map = index.get("weight_map").ok_or_else(|| wrong("missing".into()))?;
        let map = map.as_object().ok_or_else(|| wrong("an object expected".into()))?;
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new(); // file -> its tensors
        for (name, file) in map {
            let file = file.as_str().filter(|file| is_plain_name(file));
            let file = file.ok_or_else(|| wrong(format!("tensor {}: the name of a file in this folder expected", shown(name))))?;
            shards.entry(file).or_default().push(name);
        }
        for (file, names) in shards {
            if !self.dir.join(file).exists() {
                let reason = format!("names the missing file {} for tensor {}", shown(file), shown(names[0]));
                return Err(CheckpointError::file(&self.dir.join(index_name), reason));
            }
            self.add_file(file)?;
            let number = self.files.len() - 1;
            let lacking = names.into_iter().find(|&name| self.tensors.get(name).is_none_or(|tensor| tensor.file != number));
            if let Some(name) = lacking {
                return Err(CheckpointError::tensor(&self.dir.join(file), name, format!("not in this file, though {index_name} says so")));
            }
        }
        Ok(())
    }

    fn add_file(&mut self, name: &str) -> Result<(), CheckpointError> {
        let path = self.dir.join(name);
        let (file, entries) = WeightFile::open(&path)?;
        let number = self.files.len();
        self.files.push(Arc::new(file));
        for entry in entries {
            match self.tensors.entry(entry.name.clone()) {
                Slot::Vacant(slot) => drop(slot.insert(Tensor { file: number, entry })),
                Slot::Occupied(slot) => {
                    let first = self.files[slot.get().file].path.display();
                    return Err(CheckpointError::tensor(&path, &entry.name, format!("duplicate: also in {first}")));
                }
            }
        }
        Ok(())
    }
}

fn required_json(dir: &Path, file: &str) -> Result<Value, CheckpointError> {
    let path = dir.join(file);
    let value = read_json(&path)?.ok_or_else(|| CheckpointError::file(&path, "missing: is this a model folder?"))?;
    if !value.is_object() {
        return Err(CheckpointError::file(&path, "not a JSON object"));
    }
    Ok(value)
}

fn field(dir: &Path, file: &str, field: &str, reason: impl Into<String>) -> CheckpointError {
    CheckpointError::Field { dir: dir.to_path_buf(), file: file.to_owned(), field: shown(field), reason: reason.into() }
}

fn is_pickled(name: &str) -> bool {
    name.starts_with("pytorch_model") && name.ends_with(".bin")
}

/// An index must not lead out of its folder.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part == name)
}
