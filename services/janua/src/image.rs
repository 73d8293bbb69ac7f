use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::ProgressBar;
use proto::v1;
use proto::v1::generate_response::Event;
use serde_json::Value;

use crate::client::{Door, Events, ServerFlags};
use crate::request::{self, FlowSolver, PictureFormat};
use crate::terminal::{self, BOLD, DIM, paint};
use crate::{Failure, events};

/// Draw a picture from a description
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  janua image --out lantern.png \"a red lantern by the quiet river\"
  janua image --n 4 --seed 7 --out cats.webp \"four cats\"          (saves cats-0.webp to cats-3.webp)
  janua image --preview-every 48 --out slow.png \"a slow painting\" (saves slow-preview.png while it draws)
  janua image --steps 50 --solver heun --out flow.png \"a harbor\"  (models that draw by a flow: JanusFlow)")]
pub struct Image {
    /// What to draw
    pub prompt: String,
    /// A picture to show before the description, to a model that can see; may be repeated
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Where the picture is saved; with several, their numbers go before the dot
    #[arg(long, short, value_name = "FILE", default_value = "janua.png")]
    pub out: PathBuf,
    /// Number of pictures
    #[arg(long, value_name = "COUNT")]
    pub n: Option<u32>,
    /// Strength of classifier-free guidance
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub guidance: Option<f32>,
    /// 0 always takes the likeliest code (models that draw codes: Janus)
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Steps from noise to picture, 1 to 1000 (models that draw by a flow: JanusFlow)
    #[arg(long, value_name = "COUNT")]
    pub steps: Option<u32>,
    /// How a step is taken (models that draw by a flow)
    #[arg(long, value_enum)]
    pub solver: Option<FlowSolver>,
    /// The same seed and request give the same picture
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// Save an unfinished picture after every so many codes or steps
    #[arg(long, value_name = "COUNT")]
    pub preview_every: Option<u32>,
    /// Encoding; taken from the name of the file when left out
    #[arg(long, value_enum)]
    pub format: Option<PictureFormat>,
    /// The prompt is what the model reads, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// Print every event as a line of JSON, with the file it was saved to
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub server: ServerFlags,
}

/// Runs `janua image`.
pub async fn run(flags: Image) -> Result<(), Failure> {
    let format = flags.format.or_else(|| PictureFormat::of(&flags.out)).unwrap_or(PictureFormat::Png);
    let mut parts = request::pictures(&flags.image)?;
    let door = Door::open(&flags.server).await?;
    parts.push(request::text(&flags.prompt));
    let input = if flags.raw { request::completion(parts) } else { request::chat(vec![request::message(v1::Role::User, parts)]) };
    let sampling = v1::ImageSampling {
        guidance: flags.guidance,
        temperature: flags.temperature,
        seed: flags.seed,
        n: flags.n,
        preview_every: flags.preview_every,
        format: format.message().into(),
        steps: flags.steps,
        solver: flags.solver.map_or(v1::FlowSolver::Unspecified, FlowSolver::message).into(),
    };
    let mut stream = door.generate(input, v1::OutputKind::Image, None, Some(sampling)).await?;
    let files = Files { out: flags.out.clone(), several: flags.n.unwrap_or(1) > 1, extension: format.extension() };
    receive(&mut stream, &files, flags.json).await?;
    door.close().await;
    Ok(())
}

/// Draws the bar and saves what arrives.
pub async fn receive(stream: &mut Events, files: &Files, json: bool) -> Result<(), Failure> {
    let mut bar: Option<ProgressBar> = None;
    let mut done = std::collections::BTreeMap::new(); // picture -> codes or steps
    while let Some(event) = stream.next().await? {
        let mut value = events::to_json(&event);
        match &event {
            Event::ImageProgress(progress) => {
                done.insert(progress.image, u64::from(progress.done));
                let bar = bar.get_or_insert_with(|| terminal::bar(u64::from(progress.total), "drawing"));
                bar.set_length(u64::from(progress.total) * done.len() as u64);
                bar.set_position(done.values().sum());
            }
            Event::ImagePreview(preview) => {
                let file = files.preview(preview.image);
                save(&file, &preview.data)?;
                value["file"] = Value::from(file.display().to_string());
            }
            Event::Image(image) => {
                let file = files.finished(image.image);
                save(&file, &image.data)?;
                value["file"] = Value::from(file.display().to_string());
                let told = format!("{} {}", paint(BOLD, file.display()), paint(DIM, facts(image)));
                if !json && !bar.as_ref().map_or_else(|| terminal::line(&told), |bar| bar.suspend(|| terminal::line(&told)))? {
                    return Ok(());
                }
            }
            _ => {}
        }
        if json && !terminal::json(&value)? {
            return Ok(());
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(())
}

/// Size and seed of a picture, for people.
pub fn facts(image: &v1::GeneratedImage) -> String {
    format!("{} x {} pixels, seed {}", image.width, image.height, image.seed)
}

/// Where pictures are saved.
pub struct Files {
    pub out: PathBuf,
    pub several: bool,
    /// For an `out` without one.
    pub extension: &'static str,
}

impl Files {
    fn finished(&self, image: u32) -> PathBuf {
        self.named(if self.several { format!("-{image}") } else { String::new() })
    }

    fn preview(&self, image: u32) -> PathBuf {
        self.named(if self.several { format!("-{image}-preview") } else { "-preview".to_owned() })
    }

    fn named(&self, suffix: String) -> PathBuf {
        let stem = self.out.file_stem().map_or_else(|| "janua".into(), |stem| stem.to_string_lossy());
        let extension = self.out.extension().map_or_else(|| self.extension.into(), |extension| extension.to_string_lossy());
        self.out.with_file_name(format!("{stem}{suffix}.{extension}"))
    }
}

/// Writes a picture beside its place and moves it there, so that nobody ever reads half of one.
pub fn save(file: &Path, data: &[u8]) -> Result<(), Failure> {
    let partial = file.with_extension("partial");
    let written = std::fs::write(&partial, data).and_then(|()| std::fs::rename(&partial, file));
    written.map_err(|error| Failure::input(format!("cannot save {}: {error}; choose another place with --out", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named() {
        let one = Files { out: "a/b.png".into(), several: false, extension: "png" };
        assert_eq!(one.finished(0), PathBuf::from("a/b.png"));
        assert_eq!(one.preview(0), PathBuf::from("a/b-preview.png"));
        let many = Files { out: "b".into(), several: true, extension: "webp" };
        assert_eq!(many.finished(3), PathBuf::from("b-3.webp"));
        assert_eq!(many.preview(3), PathBuf::from("b-3-preview.webp"));
    }
}
