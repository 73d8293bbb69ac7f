use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use checkpoint::Checkpoint;
use domain::{Input, ModelCard, OutputKind, Part, Prompt, Segment};
use futures::StreamExt;
use layers::RemoteExperts;
use models::{LoadOptions, Painter, VisionEncoder};
use pixels::Processor;
use sched::{Engine, EngineConfig};
use serde_json::Value;
use text::{PreparedSegment, TextCodec};

use super::golden::Golden;
use super::report::Report;
use super::runner::Runner;
use super::tolerance::Tolerances;
use super::{drawing, flow, language, tokenizer, vision};
use crate::Failure;

/// KV blocks for the longest golden prompt many times over.
const KV_BLOCKS: usize = 1024;
/// The token that stands where a picture goes, and the one before a picture.
const PLACEHOLDER: &str = "<image_placeholder>";
const BEGIN_IMAGE: &str = "<begin_of_image>";

/// Keys of `golden.json` that describe how it was made, or what the reference measured about itself.
const NOTES: [&str; 14] = [
    "case",
    "variant",
    "seed",
    "weight_seed",
    "attempts",
    "storage_dtype",
    "compute_dtype",
    "reference",
    "n_decode_steps",
    "eos_ignored_in_greedy",
    "reload_from_disk_max_abs",
    "float32_vs_float64",
    "float64_same_ids_and_routing",
    "float64_same_ids",
];

/// The loaded parts of a model folder, each the one that the services use.
pub struct Parts {
    pub dir: PathBuf,
    pub checkpoint: Arc<Checkpoint>,
    pub codec: TextCodec,
    pub card: ModelCard,
    /// Step by step, for tensors.
    pub runner: Runner,
    /// The same model with all experts in this process, when those of `runner` are elsewhere.
    pub twin: Option<Runner>,
    /// Scheduler and sampler, for what is generated.
    pub engine: Engine,
    pub encoder: Option<VisionEncoder>,
    /// Of a model that draws by a flow.
    pub painter: Option<Painter>,
    pub processor: Option<Processor>,
    pub tolerances: Tolerances,
}

/// Compares a model folder.
pub async fn compare(
    dir: &Path,
    vae: Option<&Path>,
    remote: Option<&Arc<dyn RemoteExperts>>,
    golden: &Golden,
    report: &mut Report,
) -> Result<(), Failure> {
    let mut parts = Parts::load(dir, vae, remote, golden)?;
    for (key, value) in golden.json.as_object().into_iter().flatten() {
        match key.as_str() {
            "prompts" => {
                for (i, entry) in golden.list(key).iter().enumerate() {
                    language::compare(&mut parts, golden, i, entry, report).await?;
                }
            }
            "text_to_image" => {
                for (i, entry) in golden.list(key).iter().enumerate() {
                    drawing::compare(&mut parts, golden, i, entry, report).await?;
                }
            }
            "generation" => flow::compare(&mut parts, golden, value, report).await?,
            "special_ids" => special_ids(&parts, value, report),
            "image_token_id" => report.same(key, &[parts.placeholder()], &super::golden::id(value)),
            "num_image_tokens" => report.same(key, &[parts.patches() as u32], &super::golden::id(value)),
            note if NOTES.contains(&note) || is_remark(value) => {}
            unknown => report.fail(unknown, "not a quantity that this program knows"),
        }
    }
    drawing::compare_decoder(&parts, golden, report)?;
    golden.unasked().into_iter().for_each(|key| report.fail(key, "not a quantity that this program knows"));
    Ok(())
}

/// Texts, flags and nulls are remarks; numbers and lists are quantities.
pub fn is_remark(value: &Value) -> bool {
    matches!(value, Value::String(_) | Value::Bool(_) | Value::Null)
}

impl Parts {
    /// With `remote`, routed experts are computed there.
    pub fn load(dir: &Path, vae: Option<&Path>, remote: Option<&Arc<dyn RemoteExperts>>, golden: &Golden) -> Result<Self, Failure> {
        let checkpoint = Arc::new(Checkpoint::open(dir).map_err(Failure::input)?);
        checkpoint.scan(&mut |_| {}).map_err(Failure::input)?;
        let options = LoadOptions { kv_blocks: KV_BLOCKS, threads: 0 };
        let load = |remote| models::load_language_around(&checkpoint, &options, remote).map_err(Failure::input);
        let encoder = models::load_vision(&checkpoint, &models::OnnxOptions::default()).map_err(Failure::input)?;
        let processor = match checkpoint.json("preprocessor_config.json").map_err(Failure::input)? {
            Some(config) => Some(
                Processor::from_config(&config).map_err(|e| Failure::input(format!("{}: preprocessor_config.json: {e}", dir.display())))?,
            ),
            None => None,
        };
        if let (Some(encoder), Some(processor)) = (&encoder, &processor) {
            ::vision::check_sizes(encoder, processor).map_err(|reason| Failure::input(format!("{}: {reason}", dir.display())))?;
        }
        let card = models::card(&checkpoint).map_err(Failure::input)?;
        let painter = match card.latent_grid() {
            Some(_) => models::load_painter(&checkpoint, vae, &models::OnnxOptions::default()).map_err(Failure::input)?,
            None => None,
        };
        Ok(Self {
            dir: dir.to_owned(),
            codec: TextCodec::load(&checkpoint).map_err(Failure::input)?,
            card,
            painter,
            runner: Runner::new(load(remote)?),
            twin: remote.map(|_| load(None).map(Runner::new)).transpose()?,
            engine: Engine::start(load(remote)?, EngineConfig::default()),
            encoder,
            processor,
            tolerances: Tolerances::of(&golden.json),
            checkpoint,
        })
    }

    /// The id of the token that stands where a picture goes.
    pub fn placeholder(&self) -> u32 {
        self.codec.token_id(PLACEHOLDER).unwrap_or_default()
    }

    /// Rows of a picture that are its own.
    fn patches(&self) -> usize {
        self.card.tokens_per_image.unwrap_or(0) - self.encoder.as_ref().map_or(0, VisionEncoder::extra_rows)
    }

    /// The ids of a prepared prompt as the reference writes them: placeholders for every position of a picture.
    pub fn ids(&self, segments: &[PreparedSegment]) -> Vec<u32> {
        // Rows beside the patches stand where the reference has the token before a picture.
        let begin = vec![self.codec.token_id(BEGIN_IMAGE).unwrap_or_default(); self.card.tokens_per_image.unwrap_or(0) - self.patches()];
        let segment = |segment: &PreparedSegment| match segment {
            PreparedSegment::Tokens(ids) => ids.clone(),
            PreparedSegment::Image(_) => [&begin[..], &vec![self.placeholder(); self.patches()]].concat(),
            PreparedSegment::Padding { id, .. } => vec![*id; self.card.tokens_per_image.unwrap_or(0)],
        };
        segments.iter().flat_map(segment).collect()
    }

    /// The prompt for the language model, pictures in place.
    pub fn prompt(&self, segments: &[PreparedSegment], pictures: &[domain::Embeddings]) -> Result<Prompt, Failure> {
        let picture = |index: u32| {
            let missing = || Failure::input(format!("golden.json: the prompt shows picture {index}, {} are listed", pictures.len()));
            pictures.get(index as usize).ok_or_else(missing)
        };
        let segment = |segment: &PreparedSegment| match *segment {
            PreparedSegment::Tokens(ref ids) => Ok(Segment::Tokens(ids.clone())),
            PreparedSegment::Image(index) => Ok(Segment::Embeddings(picture(index)?.clone())),
            PreparedSegment::Padding { image, id } => Ok(Segment::Tokens(vec![id; picture(image)?.rows()])),
        };
        Ok(Prompt { segments: segments.iter().map(segment).collect::<Result<_, _>>()? })
    }

    /// What the prompt of a golden entry is to the tokenizer, and the files of its pictures.
    pub fn input(&self, entry: &Value) -> Result<Input, Failure> {
        input(&self.dir, entry)
    }

    /// Pictures of a prompt as rows for the language model, computed from the files; what the golden files say about the way there is compared.
    pub fn see(&self, input: &Input, golden: &Golden, prefix: &str, report: &mut Report) -> Result<Vec<domain::Embeddings>, Failure> {
        let pictures: Vec<&Bytes> = input.images().collect();
        if pictures.is_empty() {
            return Ok(Vec::new());
        }
        vision::compare(self, &pictures, golden, prefix, report)
    }

    /// Runs a job through scheduler and sampler and returns what it emits.
    pub async fn generate(&self, job: domain::Job) -> Result<Vec<u32>, Failure> {
        let mut stream = self.engine.submit(job).map_err(Failure::software)?;
        let mut ids = Vec::new();
        while let Some(event) = stream.next().await {
            if let domain::Event::Output { id, .. } = event.map_err(Failure::software)? {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// Segments of a prompt, as the tokenizer service makes them.
    pub fn prepare(&self, input: &Input, output: OutputKind) -> Result<text::Prepared, Failure> {
        self.codec.prepare(input, output).map_err(Failure::input)
    }
}

/// Ids of special tokens, looked up by their names.
fn special_ids(parts: &Parts, expected: &Value, report: &mut Report) {
    for (name, id) in expected.as_object().into_iter().flatten() {
        let found = match name.as_str() {
            "bos" => parts.codec.encode("", true).first().copied(),
            "eos" => parts.codec.eos_token_ids().first().copied(),
            "pad" => parts.codec.token_id("<｜▁pad▁｜>"),
            "boi" => parts.codec.token_id("<begin_of_image>"),
            "eoi" => parts.codec.token_id("<end_of_image>"),
            "image" => parts.codec.token_id(PLACEHOLDER),
            "begin_of_generation" => parts.codec.token_id("<｜begin▁of▁generation｜>"),
            _ => None,
        };
        report.same(&format!("special_ids.{name}"), found.as_slice(), &super::golden::id(id));
    }
}

/// What the prompt of a golden entry is to the tokenizer, and the files of its pictures.
pub fn input(dir: &Path, entry: &Value) -> Result<Input, Failure> {
    let mut pictures = picture_files(dir, entry)?.into_iter();
    let mut next = || pictures.next().unwrap_or_default();
    if let Some(messages) = entry.get("messages") {
        let mut messages = tokenizer::messages(messages).ok_or_else(|| Failure::input("golden.json: messages that cannot be read"))?;
        let slots = messages.iter_mut().flat_map(|message| &mut message.parts);
        slots.filter(|part| matches!(part, Part::Image(_))).for_each(|part| *part = Part::Image(next()));
        return Ok(Input::Chat(messages));
    }
    let text = entry.get("prompt").or_else(|| entry.get("text")).and_then(Value::as_str);
    let text = text.ok_or_else(|| Failure::input("golden.json: a prompt without text"))?;
    let mut parts = Vec::new();
    for (i, piece) in text.split(PLACEHOLDER).enumerate() {
        if i > 0 {
            parts.push(Part::Image(next()));
        }
        if !piece.is_empty() {
            parts.push(Part::Text(piece.to_owned()));
        }
    }
    Ok(Input::Completion { parts, bos: true })
}

fn picture_files(dir: &Path, entry: &Value) -> Result<Vec<Bytes>, Failure> {
    let files = entry.get("images").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let read = |name: &Value| {
        let file = dir.join(name.as_str().unwrap_or_default());
        std::fs::read(&file).map(Bytes::from).map_err(|error| Failure::input(format!("{}: {error}", file.display())))
    };
    files.iter().map(read).collect()
}
