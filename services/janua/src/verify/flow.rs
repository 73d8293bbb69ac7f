use std::path::Path;

use domain::{Event, FlowState, ImageSampling, Job, Latent, LatentGrid, Mode, OutputKind, Solver};
use futures::StreamExt;
use layers::{FlowInput, RowInput};
use models::{Painter, VaeDecoder};
use sched::solver::{self, Integrator};
use serde_json::Value;

use super::drawing::{self, NearStep};
use super::golden::{Golden, Tensor, Values, ids};
use super::language::{number, reals};
use super::model::Parts;
use super::report::Report;
use super::runner::{Seen, Sequence, rows};
use crate::Failure;

/// The picture that the reference saved, where there is one.
const PICTURE: &str = "generated.png";
/// The token that the reference puts in the place of what unconditional rows do not see.
const PAD: &str = "<｜▁pad▁｜>";

/// The example of a model that draws by a flow, as golden.json describes it.
struct Example {
    prepared: text::Prepared,
    sampling: ImageSampling,
    /// Noise to begin with.
    z0: Vec<f32>,
    grid: LatentGrid,
}

/// Compares the example of a model that draws by a flow: prompts, single velocities, the way from noise to map, pixels.
pub async fn compare(parts: &mut Parts, golden: &Golden, entry: &Value, report: &mut Report) -> Result<(), Failure> {
    let grid = parts.card.latent_grid().ok_or_else(|| Failure::input("golden.json has a flow of a model that has none"))?;
    let example = Example {
        prepared: parts.prepare(&parts.input(entry)?, OutputKind::Image)?,
        sampling: sampling(entry),
        z0: golden.tensor("gen.z0").map(reals).unwrap_or_default().to_vec(),
        grid,
    };
    prompts(parts, golden, entry, &example, report)?;
    velocities(parts, golden, entry, &example, report)?;
    let trajectory = trajectory(parts, &example).await?;
    close(parts, golden, "gen.z_trajectory", &trajectory, report);
    let last = &trajectory[trajectory.len() - grid.len()..];
    pixels(parts, golden, last, &example, report)?;
    for (field, value) in entry.as_object().into_iter().flatten() {
        match field.as_str() {
            "latent" => {
                let shape = [grid.channels, grid.rows, grid.columns].map(|size| size as u32);
                report.same("generation.latent", &shape, &ids(value).unwrap_or_default());
            }
            // What was read above, and what the reference measured about itself.
            "text" | "cond_ids" | "cfg_weight" | "num_inference_steps" | "probe_t" | "prompt_kv_cache_vs_full_recompute_max_abs" => {}
            unknown => report.fail(&format!("generation.{unknown}"), "not a quantity that this program knows"),
        }
    }
    Ok(())
}

fn sampling(entry: &Value) -> ImageSampling {
    let defaults = ImageSampling::default();
    let steps = entry.get("num_inference_steps").and_then(Value::as_u64).map_or(defaults.steps, |steps| steps as u32);
    ImageSampling { guidance: number(&entry["cfg_weight"]) as f32, steps, solver: Solver::Euler, ..defaults }
}

/// Prompts as the reference writes them: with the tag at the end of the conditional one, with padding in the unconditional one that a mask
/// hides.
fn prompts(parts: &Parts, golden: &Golden, entry: &Value, example: &Example, report: &mut Report) -> Result<(), Failure> {
    let (cond, uncond) = (parts.ids(&example.prepared.segments), parts.ids(&example.prepared.unconditional));
    let whole = parts.codec.encode(entry["text"].as_str().unwrap_or_default(), true);
    let tagged: Vec<u32> = cond.iter().copied().chain(whole.get(cond.len()).copied()).collect();
    let pad = parts.codec.token_id(PAD).ok_or_else(|| Failure::input(format!("the tokenizer lacks {PAD}")))?;
    let padded: Vec<u32> = (0..tagged.len()).map(|i| uncond.get(i).copied().unwrap_or(pad)).collect();
    let positions = cond.len() + example.grid.positions;
    let seen = |i: usize| u32::from(i < uncond.len() || i >= cond.len());
    let mask: Vec<u32> = std::iter::repeat_n(1, positions).chain((0..positions).map(seen)).collect();
    for (key, found) in [("gen.cond_ids", &tagged), ("gen.uncond_ids", &padded), ("gen.attention_mask", &mask)] {
        if let Some(expected) = golden.ids(key) {
            report.same(key, found, expected);
        }
    }
    report.same("generation.cond_ids", &tagged, &ids(&entry["cond_ids"]).unwrap_or_default());
    Ok(())
}

/// Single velocities at the times that the reference was asked for, with everything on the way, and those of every step.
fn velocities(parts: &mut Parts, golden: &Golden, entry: &Value, example: &Example, report: &mut Report) -> Result<(), Failure> {
    let pair = Pair::new(parts, example)?;
    let times = entry.get("probe_t").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    for (i, time) in times.iter().enumerate() {
        let seen = pair.velocity(parts, &example.z0, number(time) as f32, example.sampling.guidance)?;
        for (name, values) in &seen.tensors {
            close(parts, golden, &format!("gen.probe{i}.{name}"), values, report);
        }
    }
    let mut flow = Integrator::new(example.sampling.solver, example.sampling.steps, 0, example.z0.clone());
    let mut trajectory = Vec::new();
    while !flow.is_over() {
        let (z, time) = flow.point();
        let mut seen = pair.velocity(parts, &z, time, example.sampling.guidance)?;
        let velocity = seen.tensors.remove("v").unwrap_or_default();
        trajectory.extend_from_slice(&velocity);
        flow.advance(velocity);
    }
    close(parts, golden, "gen.v_trajectory", &trajectory, report);
    pair.sequences.into_iter().for_each(|sequence| parts.runner.release(sequence));
    Ok(())
}

/// Both prompts in the cache of the runner.
struct Pair {
    sequences: [Sequence; 2],
    /// Positions that the rows behind the unconditional prompt stand higher.
    shift: usize,
    /// Hidden size.
    width: usize,
}

impl Pair {
    fn new(parts: &mut Parts, example: &Example) -> Result<Self, Failure> {
        let prompts = [&example.prepared.segments, &example.prepared.unconditional].map(|segments| parts.prompt(segments, &[]));
        let [cond, uncond] = prompts;
        let (cond, uncond, width) = (cond?, uncond?, parts.card.hidden_size);
        let shift = cond.len() - uncond.len();
        let mut read = |prompt: &domain::Prompt| -> Result<Sequence, Failure> {
            let mut sequence = parts.runner.sequence(prompt.len() + example.grid.positions).map_err(Failure::software)?;
            let read = parts.runner.prefill(&mut sequence, &rows(prompt), layers::Head::Text, &mut layers::NoObserver);
            read.map(|_| sequence).map_err(Failure::software)
        };
        Ok(Self { sequences: [read(&cond)?, read(&uncond)?], shift, width })
    }

    /// One guided velocity, `v`, and everything on the way to it.
    fn velocity(&self, parts: &mut Parts, z: &[f32], time: f32, guidance: f32) -> Result<Seen, Failure> {
        let mut seen = Seen::default();
        let input = parts.runner.flow().and_then(|flow| flow.encode(z, time, &mut seen)).map_err(Failure::software)?;
        let mut halves = Vec::new();
        for (sequence, (name, shift)) in self.sequences.iter().zip([("cond", 0), ("uncond", self.shift)]) {
            let hidden = parts.runner.hidden(sequence, &embeddings(&input, self.width), shift).map_err(Failure::software)?;
            let hidden = &hidden[self.width..]; // the first row is the time
            let mut inside = Seen::default();
            let velocity = parts.runner.flow().and_then(|flow| flow.decode(hidden, &input, &mut inside)).map_err(Failure::software)?;
            seen.tensors.insert(format!("llm_hidden_{name}"), hidden.to_vec());
            seen.tensors.extend(inside.tensors.into_iter().map(|(key, values)| (format!("{key}_{name}"), values)));
            seen.tensors.insert(format!("v_{name}"), velocity.clone());
            halves.push(velocity);
        }
        let mut velocity = std::mem::take(&mut halves[0]);
        solver::guide(&mut velocity, &halves[1], guidance);
        seen.tensors.insert("v".to_owned(), velocity);
        Ok(seen)
    }
}

fn embeddings(input: &FlowInput, width: usize) -> Vec<RowInput> {
    (0..input.rows.len() / width).map(|row| RowInput::Embedding { values: input.rows.clone(), row }).collect()
}

/// The maps from the reference's noise to the last one, through the scheduler, one after the other.
async fn trajectory(parts: &Parts, example: &Example) -> Result<Vec<f32>, Failure> {
    let from = FlowState { done: 0, z: Latent::new(example.grid, example.z0.clone()) };
    let mut maps = example.z0.clone();
    for z in flow(parts, &example.prepared, example.sampling.clone(), Some(from)).await? {
        maps.extend_from_slice(&z.values);
    }
    Ok(maps)
}

/// The map after every step.
async fn flow(parts: &Parts, prepared: &text::Prepared, sampling: ImageSampling, from: Option<FlowState>) -> Result<Vec<Latent>, Failure> {
    let unconditional = parts.prompt(&prepared.unconditional, &[])?;
    let mode = Mode::Flow { unconditional, sampling, estimate_every: None, from };
    let job = Job { prompt: parts.prompt(&prepared.segments, &[])?, mode, emitted: Vec::new() };
    let mut stream = parts.engine.submit(job).map_err(Failure::software)?;
    let mut maps = Vec::new();
    while let Some(event) = stream.next().await {
        if let Event::Flow { state, .. } = event.map_err(Failure::software)? {
            maps.push(state.z);
        }
    }
    Ok(maps)
}

/// What the VAE makes of the last map, and of the noise as it is.
fn pixels(parts: &Parts, golden: &Golden, z: &[f32], example: &Example, report: &mut Report) -> Result<(), Failure> {
    let vae = decoder(parts)?;
    let pixels = vae.decode(z).map_err(Failure::software)?;
    close(parts, golden, "vae.latent_in", &vae.unscaled(z), report);
    close(parts, golden, "vae.pixels", &pixels, report);
    close(parts, golden, "vae.probe_pixels", &vae.decode_unscaled(&example.z0).map_err(Failure::software)?, report);
    let levels = models::pixels_to_rgb(&pixels);
    let near = NearStep::of(golden.tensor("vae.pixels"), parts.tolerances.get("vae.pixels"), vae.image_size());
    if let Some(Tensor { values: Values::U8(expected), .. }) = golden.tensor("vae.pixels_u8") {
        report.levels("vae.pixels_u8", &levels, expected, |i| near.levels(i));
    }
    if parts.dir.join(PICTURE).is_file() {
        drawing::compare_picture(parts, PICTURE, &Value::from(PICTURE), &levels, &near, report)?;
    }
    Ok(())
}

fn decoder(parts: &Parts) -> Result<&VaeDecoder, Failure> {
    match &parts.painter {
        Some(Painter::Vae(decoder)) => Ok(decoder),
        _ => Err(Failure::software("a model that draws by a flow has no VAE")),
    }
}

fn close(parts: &Parts, golden: &Golden, key: &str, found: &[f32], report: &mut Report) {
    if let Some(reference) = golden.tensor(key) {
        report.close(key, found, reference, parts.tolerances.get(key));
    }
}

/// The picture of the golden example that `seed` gives without services between: 8-bit values `[height, width, 3]`.
pub async fn direct(dir: &Path, vae: Option<&Path>, golden: &Golden, entry: &Value, seed: u64) -> Result<Vec<u8>, Failure> {
    let parts = Parts::load(dir, vae, None, golden)?;
    let prepared = parts.prepare(&parts.input(entry)?, OutputKind::Image)?;
    let maps = flow(&parts, &prepared, ImageSampling { seed, ..sampling(entry) }, None).await?;
    let last = maps.last().ok_or_else(|| Failure::software("a flow without a step"))?;
    Ok(models::pixels_to_rgb(&decoder(&parts)?.decode(&last.values).map_err(Failure::software)?))
}
