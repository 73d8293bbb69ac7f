//! Recipes to folders: weights stream to disk as they are made, and a folder appears under its name only when it is complete.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use process::{Bar, Progress, Unit};
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use serde_json::{Map, Value, json};

use super::recipe::{Fill, Recipe, Tensor, Tensors};
use super::vocabulary;
use crate::Failure;

/// Says which recipe a folder was made from.
const STAMP: &str = "janua-bench.json";
/// Every number comes from here.
const SEED: u64 = 20_260_101;
/// Largest weight file, as published ones are cut.
const SHARD: u64 = 4 << 30; // bytes
/// Bytes left free on the disk beside what is written.
const RESERVE: u64 = 1 << 30;
/// Values made at a time.
const BLOCK: usize = 1 << 20;

/// How values lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    Bf16,
    F32,
}

impl Stored {
    fn size(self) -> usize {
        if self == Self::Bf16 { 2 } else { 4 }
    }
}

/// The folder of `recipe` below `parent`: made now, or left from an earlier run of the same recipe. Also says whether it was made now.
pub fn folder(recipe: &Recipe, parent: &Path, progress: &dyn Progress) -> Result<(PathBuf, bool), Failure> {
    let dir = parent.join(recipe.name);
    let stamp = recipe.stamp();
    let found = fs::read(dir.join(STAMP)).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    match found {
        Some(found) if found["recipe"] == stamp.as_str() => return Ok((dir, false)),
        None if dir.exists() => {
            return Err(Failure::input(format!("{} is in the way and was not made by this program; choose another --dir", dir.display())));
        }
        _ => {}
    }
    let partial = parent.join(format!("{}.partial", recipe.name));
    let refuse = |error: io::Error| Failure::input(format!("cannot write {}: {error}", partial.display()));
    remove(&partial)?;
    remove(&dir)?;
    fs::create_dir_all(&partial).map_err(refuse)?;
    make_room(recipe, parent)?;
    let written = write(recipe, &partial, progress);
    if written.is_err() {
        remove(&partial)?; // half a checkpoint helps nobody and fills the disk
    }
    written?;
    let stamp = json!({"recipe": stamp, "about": recipe.about}).to_string();
    fs::write(partial.join(STAMP), stamp).and_then(|()| fs::rename(&partial, &dir)).map_err(refuse)?;
    Ok((dir, true))
}

/// Removes a folder that this program made.
pub fn remove(dir: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::input(format!("cannot remove {}: {error}", dir.display()))),
        _ => Ok(()),
    }
}

/// Refuses a recipe that the disk has no room for.
fn make_room(recipe: &Recipe, parent: &Path) -> Result<(), Failure> {
    let disk = rustix::fs::statvfs(parent).map_err(|error| Failure::input(format!("{}: {error}", parent.display())))?;
    let (free, needed) = (disk.f_bavail * disk.f_frsize, recipe.bytes() + RESERVE);
    if free >= needed {
        return Ok(());
    }
    let gigabytes = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
    let (free, needed, dir) = (gigabytes(free), gigabytes(needed), parent.display());
    Err(Failure::input(format!("{}: {needed} needed in {dir}, {free} free; choose another place with --dir", recipe.name)))
}

fn write(recipe: &Recipe, dir: &Path, progress: &dyn Progress) -> Result<(), Failure> {
    let refuse = |error: io::Error| Failure::input(format!("cannot write to {}: {error}", dir.display()));
    let [tokenizer, config] = vocabulary::files(recipe.tokenizer, recipe.vocabulary)?;
    let small = recipe.json.iter().map(|(name, value)| (*name, value));
    for (name, value) in small.chain([("tokenizer.json", &tokenizer), ("tokenizer_config.json", &config)]) {
        fs::write(dir.join(name), value.to_string()).map_err(refuse)?;
    }
    let mut pen = Pen { bar: progress.start(&format!("writing {}", recipe.name), recipe.bytes(), Unit::Bytes), done: 0, stream: 0 };
    weights(&recipe.tensors, dir, SHARD, &mut pen).map_err(refuse)?;
    if let Some(vae) = &recipe.vae {
        let dir = dir.join("vae");
        fs::create_dir_all(&dir).and_then(|()| fs::write(dir.join("config.json"), vae.config.to_string())).map_err(refuse)?;
        let all: Vec<&Tensor> = vae.tensors.iter().collect();
        file(&dir.join("diffusion_pytorch_model.safetensors"), &all, Stored::F32, &mut pen).map_err(refuse)?;
    }
    Ok(())
}

/// One file, or shards of at most `largest` bytes and their index.
fn weights(tensors: &Tensors, dir: &Path, largest: u64, pen: &mut Pen) -> io::Result<()> {
    let shards = cut(tensors, largest);
    if let [only] = &shards[..] {
        return file(&dir.join("model.safetensors"), only, Stored::Bf16, pen);
    }
    let mut map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:06}.safetensors", number + 1, shards.len());
        file(&dir.join(&name), shard, Stored::Bf16, pen)?;
        map.extend(shard.iter().map(|tensor| (tensor.name.clone(), Value::from(name.clone()))));
    }
    let index = json!({"metadata": {"total_size": tensors.bytes(Stored::Bf16.size())}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string())
}

/// Tensors in order, in groups of at most `largest` bytes.
fn cut(tensors: &Tensors, largest: u64) -> Vec<Vec<&Tensor>> {
    let (mut shards, mut filled) = (vec![Vec::new()], 0);
    for tensor in tensors.iter() {
        let bytes = (tensor.len() * Stored::Bf16.size()) as u64;
        if filled > 0 && filled + bytes > largest {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    shards
}

/// One safetensors file.
fn file(path: &Path, tensors: &[&Tensor], stored: Stored, pen: &mut Pen) -> io::Result<()> {
    let (mut header, mut end) = (Map::new(), 0);
    for tensor in tensors {
        let begin = end;
        end += tensor.len() * stored.size();
        let dtype = if stored == Stored::Bf16 { "BF16" } else { "F32" };
        header.insert(tensor.name.clone(), json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}));
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len())); // so that the values are aligned
    let mut out = BufWriter::with_capacity(4 << 20, File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for tensor in tensors {
        pen.values(tensor, stored, &mut out)?;
    }
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// Makes the values, and tells how far it has come.
struct Pen {
    bar: Box<dyn Bar>,
    /// Bytes written.
    done: u64,
    /// Each tensor has random numbers of its own.
    stream: u64,
}

impl Pen {
    fn values(&mut self, tensor: &Tensor, stored: Stored, out: &mut impl Write) -> io::Result<()> {
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        random.set_stream(self.stream);
        self.stream += 1;
        let mut left = tensor.len();
        while left > 0 {
            let count = left.min(BLOCK);
            let block = bytes(tensor.fill, count, stored, &mut random);
            out.write_all(&block)?;
            left -= count;
            self.done += block.len() as u64;
            self.bar.set(self.done);
        }
        Ok(())
    }
}

/// `count` values as they lie in the file.
fn bytes(fill: Fill, count: usize, stored: Stored, random: &mut ChaCha8Rng) -> Vec<u8> {
    let values: Vec<f32> = match fill {
        Fill::Constant(value) => vec![value; count],
        Fill::Noise(deviation) => {
            let mut noise = vec![0; 2 * count];
            random.fill_bytes(&mut noise);
            // The deviation of a uniform distribution is its half width over the root of three.
            let step = deviation * 3_f32.sqrt() / 32_768.0;
            noise.as_chunks::<2>().0.iter().map(|&two| f32::from(i16::from_le_bytes(two)) * step).collect()
        }
    };
    match stored {
        Stored::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        // The upper half of an f32 is a bf16, rounded towards zero.
        Stored::Bf16 => values.iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use checkpoint::Checkpoint;
    use process::Silent;
    use text::TextCodec;

    use super::*;
    use crate::bench::recipe::Voice;
    use crate::bench::recipe::tests::{small_janus, small_janusflow};

    #[test]
    fn what_is_written_can_be_served() {
        let parent = tempfile::tempdir().unwrap();
        let recipe = small_janus();
        let (dir, made) = folder(&recipe, parent.path(), &Silent).unwrap();
        assert!(made);
        let checkpoint = Arc::new(Checkpoint::open(&dir).unwrap());
        checkpoint.scan(&mut |_| {}).unwrap();
        assert_eq!(checkpoint.total_bytes(), recipe.bytes());
        models::load_language(&checkpoint, &models::LoadOptions { kv_blocks: 2, threads: 1 }).unwrap();
        assert!(models::load_vision(&checkpoint, &models::OnnxOptions { threads: 1 }).unwrap().is_some());
        assert!(models::load_vq(&checkpoint, &models::OnnxOptions { threads: 1 }).unwrap().is_some());
        TextCodec::load(&checkpoint).unwrap();
        let weight = checkpoint.tensor("lm_head.weight").unwrap().to_f32();
        let variance = weight.iter().map(|value| value * value).sum::<f32>() / weight.len() as f32;
        assert!((variance * 64.0 - 4.0).abs() < 0.2, "twice as steep as 1 / 64: {variance}");
    }

    #[test]
    fn a_folder_is_made_once_and_never_in_the_place_of_another() {
        let parent = tempfile::tempdir().unwrap();
        let mut recipe = small_janusflow();
        let (dir, made) = folder(&recipe, parent.path(), &Silent).unwrap();
        assert!(made && dir.join("vae/diffusion_pytorch_model.safetensors").is_file());
        let first = fs::read(dir.join("model.safetensors")).unwrap();
        assert_eq!(folder(&recipe, parent.path(), &Silent).unwrap(), (dir.clone(), false));
        recipe.vocabulary += 1;
        assert_eq!(folder(&recipe, parent.path(), &Silent).unwrap(), (dir.clone(), true), "another recipe");
        assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), first, "the same numbers every time");
        fs::remove_file(dir.join(STAMP)).unwrap();
        let refused = folder(&recipe, parent.path(), &Silent).unwrap_err().to_string();
        assert!(refused.contains("was not made by this program"), "{refused}");
        assert!(dir.join("model.safetensors").is_file());
    }

    #[test]
    fn shards_open_as_one() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = small_janus();
        fs::write(dir.path().join("config.json"), recipe.json[0].1.to_string()).unwrap();
        let mut pen = Pen { bar: Silent.start("", 0, Unit::Bytes), done: 0, stream: 0 };
        weights(&recipe.tensors, dir.path(), 100_000, &mut pen).unwrap();
        assert!(!dir.path().join("model.safetensors").exists());
        assert_eq!(Checkpoint::open(dir.path()).unwrap().total_bytes(), recipe.bytes());
    }

    #[test]
    fn tokenizers_grow_to_the_size_of_the_table_and_still_read() {
        for voice in [Voice::Llm, Voice::V2, Voice::Vl, Voice::Janus] {
            let dir = tempfile::tempdir().unwrap();
            let [tokenizer, config] = vocabulary::files(voice, 20_000).unwrap();
            fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
            fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
            let codec = TextCodec::load_dir(dir.path()).unwrap();
            assert!((19_900..20_000).contains(&codec.vocabulary_size()), "{voice:?}: {}", codec.vocabulary_size());
            let text = "The quick river compiles a small theorem: {\"n\": 42} 語";
            assert_eq!(codec.decode(&codec.encode(text, false), false), text, "{voice:?}");
        }
    }
}
