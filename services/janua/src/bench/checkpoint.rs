use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use proto::v1;
use proto::v1::generate_response::Event;

use super::figures::{self, Figures};
use super::memory::Memory;
use crate::client::Door;
use crate::local::{Local, LocalOptions, model_name};
use crate::{Failure, request, terminal};

/// Load one checkpoint in this process, ask it what it can do, and print time and memory
#[derive(Debug, Args)]
#[command(after_help = "Example:
  janua bench checkpoint ./janus-pro-1b --no-draw")]
pub struct Checkpoint {
    /// Folder of the checkpoint
    pub dir: PathBuf,
    /// Draw no picture, which takes minutes on a small machine
    #[arg(long)]
    pub no_draw: bool,
    /// Steps of a picture that is drawn by a flow; a served request takes 30
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    pub steps: u32,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

const QUESTION: &str = "Why is the sky blue?";
const DRAWING: &str = "a red lantern by the quiet river";
/// Tokens of an answer.
const ANSWER: u32 = 32;
/// Positions of the long prompt, about.
const LONG_PROMPT: usize = 512;
/// Pictures seen; the fastest counts.
const PICTURES: u8 = 2;
/// Sides of the pictures shown, pixels.
const PICTURE_SIDE: u32 = 512;

/// Runs `janua bench checkpoint`.
pub async fn run(flags: Checkpoint) -> Result<(), Failure> {
    let name = model_name(&flags.dir)?;
    let figures = measure(&flags, &name).await?;
    if flags.json {
        return terminal::json(&serde_json::to_value(&figures).map_err(Failure::software)?).map(drop);
    }
    figures::head()?;
    figures::row(&name, &figures)?;
    figures::legend()
}

async fn measure(flags: &Checkpoint, name: &str) -> Result<Figures, Failure> {
    let files = checkpoint::Checkpoint::open(&flags.dir).map_err(Failure::input)?;
    let block = models::kv_block_bytes(&files).map_err(Failure::input)? as u64;
    let flow = models::card(&files).map_err(Failure::input)?.latent_grid();
    let weights = weight_bytes(&flags.dir)?;
    drop(files);
    let begin = Instant::now();
    // Equal beginnings of prompts would otherwise be computed once.
    let settings = [("language.prefix_cache".to_owned(), "false".to_owned())];
    let local = Local::start(LocalOptions::with_settings(vec![(name.to_owned(), flags.dir.clone())], &settings)?).await?;
    let door = Door::of(&local, name).await?;
    let load = begin.elapsed().as_secs_f64();
    let at_rest = Memory::now();
    let model = door.models().await?.into_iter().next().ok_or_else(|| Failure::software("the model is not listed"))?;
    let mut bench = Asking { door, flow: flow.map(|grid| (flags.steps, grid.positions as u64)), most_blocks: 0 };
    let figures = bench.ask(&model, flags.no_draw).await?;
    local.drain().await;
    let loaded = Figures { weights, load, loaded: at_rest.resident, loading_peak: at_rest.peak, ..figures };
    Ok(Figures { kv: bench.most_blocks * block, peak: Memory::now().peak, ..loaded }.concluded())
}

/// Bytes of the weight files in a folder and in the folders below it, where an autoencoder lies.
fn weight_bytes(dir: &Path) -> Result<u64, Failure> {
    let refuse = |error: std::io::Error| Failure::input(format!("{}: {error}", dir.display()));
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).map_err(refuse)? {
        let path = entry.map_err(refuse)?.path();
        if path.is_dir() {
            bytes += weight_bytes(&path)?;
        } else if path.extension().is_some_and(|extension| extension == "safetensors") {
            bytes += std::fs::metadata(&path).map_err(refuse)?.len();
        }
    }
    Ok(bytes)
}

/// Asks the questions, one after the other.
struct Asking {
    door: Door,
    /// Of a model that draws by a flow: the steps of a picture, and the positions that each takes behind the prompt.
    flow: Option<(u32, u64)>,
    /// KV blocks that the largest request filled, at least.
    most_blocks: u64,
}

/// How one answer came.
#[derive(Debug, Clone, Copy, Default)]
struct Timing {
    /// Seconds until the first output.
    first: f64,
    /// Seconds from the first output to the last.
    rest: f64,
    prompt: u32,
    outputs: u32,
    /// Codes or steps of a picture.
    steps: Option<u32>,
}

impl Asking {
    async fn ask(&mut self, model: &v1::Model, no_draw: bool) -> Result<Figures, Failure> {
        let short = self.text(chat(vec![request::text(QUESTION)]), ANSWER).await?;
        let repeated = |times: usize| request::completion(vec![request::text(format!("{QUESTION} ").repeat(times))]);
        let once = self.text(repeated(1), 1).await?;
        let long = self.text(repeated(LONG_PROMPT.div_ceil(once.prompt.saturating_sub(1).max(1) as usize)), ANSWER).await?;
        let (see, drawn) = (
            if model.image_input { Some(self.see().await?) } else { None },
            if model.image_output && !no_draw { Some(self.draw().await?) } else { None },
        );
        Ok(Figures {
            first_token: short.first,
            prompt_tokens: long.prompt,
            prefill_rate: f64::from(long.prompt) / long.first,
            decode_rate: f64::from(long.outputs.saturating_sub(1)) / long.rest,
            see,
            draw: drawn.map(|timing| timing.first + timing.rest),
            draw_steps: drawn.and_then(|timing| timing.steps),
            ..Figures::default()
        })
    }

    async fn text(&mut self, input: v1::generate_request::Input, tokens: u32) -> Result<Timing, Failure> {
        let sampling = v1::Sampling { temperature: Some(0.0), max_tokens: Some(tokens), ignore_eos: true, ..v1::Sampling::default() };
        self.time(input, v1::OutputKind::Text, Some(sampling), None).await
    }

    /// Seconds to embed a picture: what a new one takes longer than the same again, whose embeddings are kept.
    async fn see(&mut self) -> Result<f64, Failure> {
        let (mut new, mut again) = (f64::INFINITY, f64::INFINITY);
        for shade in 0..PICTURES {
            let question = || Ok::<_, Failure>(chat(vec![request::picture(picture(shade)?), request::text(QUESTION)]));
            new = new.min(self.text(question()?, 1).await?.first);
            again = again.min(self.text(question()?, 1).await?.first);
        }
        Ok(new - again)
    }

    async fn draw(&mut self) -> Result<Timing, Failure> {
        let image = self.flow.map(|(steps, _)| v1::ImageSampling { steps: Some(steps), ..v1::ImageSampling::default() });
        self.time(chat(vec![request::text(DRAWING)]), v1::OutputKind::Image, None, image).await
    }

    async fn time(
        &mut self,
        input: v1::generate_request::Input,
        output: v1::OutputKind,
        sampling: Option<v1::Sampling>,
        image: Option<v1::ImageSampling>,
    ) -> Result<Timing, Failure> {
        let begin = Instant::now();
        let mut stream = self.door.generate(input, output, sampling, image).await?;
        let (mut timing, mut first) = (Timing::default(), None);
        while let Some(event) = stream.next().await? {
            match event {
                Event::Text(delta) if delta.token_ids.is_empty() => {}
                Event::Text(_) | Event::Image(_) => _ = first.get_or_insert_with(Instant::now),
                Event::ImageProgress(progress) => {
                    first.get_or_insert_with(Instant::now);
                    timing.steps = Some(progress.total);
                }
                Event::Completed(completed) => {
                    let usage = completed.usage.unwrap_or_default();
                    (timing.prompt, timing.outputs) = (usage.prompt_tokens, usage.output_tokens);
                }
                _ => {}
            }
        }
        let first = first.ok_or_else(|| Failure::software("an answer without output"))?;
        timing.first = (first - begin).as_secs_f64();
        timing.rest = first.elapsed().as_secs_f64();
        let written = u64::from(timing.prompt + timing.outputs.saturating_sub(1));
        let (sequences, positions) = match (output, self.flow) {
            // Guidance has a sequence of its own, which in a flow leaves out most of the prompt.
            (v1::OutputKind::Image, Some((_, positions))) => (2, positions),
            (v1::OutputKind::Image, None) => (2, written),
            _ => (1, written),
        };
        self.most_blocks = self.most_blocks.max(sequences * positions.div_ceil(layers::BLOCK_TOKENS as u64));
        Ok(timing)
    }
}

fn chat(parts: Vec<v1::Part>) -> v1::generate_request::Input {
    request::chat(vec![request::message(v1::Role::User, parts)])
}

/// A colour wash; every `shade` is another picture.
fn picture(shade: u8) -> Result<Vec<u8>, Failure> {
    let value = |at: u32| (at * 255 / PICTURE_SIDE) as u8;
    let pixels = (0..PICTURE_SIDE).flat_map(|y| (0..PICTURE_SIDE).flat_map(move |x| [value(x), shade, value(y)]));
    let picture = pixels::Rgb { width: PICTURE_SIDE, height: PICTURE_SIDE, data: pixels.collect() };
    pixels::encode(&picture, domain::ImageFormat::Png, &BTreeMap::new()).map_err(Failure::software)
}
