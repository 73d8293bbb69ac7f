use std::path::{Path, PathBuf};
use std::pin::pin;

use clap::Args;
use proto::v1;
use proto::v1::generate_response::Event;

use crate::client::{Door, Events};
use crate::local::{Local, LocalOptions, model_name};
use crate::models::describe;
use crate::terminal::{self, BOLD, DIM, GOOD, MARK, paint};
use crate::{Failure, chat, image, request, serve};

/// Start everything in this process, show one request of each kind, and keep serving
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  janua demo --model tests/fixtures/janus
  janua demo --model ./janus-pro-1b --image cat.jpg --once")]
pub struct Demo {
    /// Folder of the checkpoint
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// End after the three requests
    #[arg(long)]
    pub once: bool,
    /// The picture to ask about; otherwise the first one in the model's folder, or a colour wash
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// Where the drawn picture is saved
    #[arg(long, value_name = "FILE", default_value = "target/run/demo.png")]
    pub out: PathBuf,
    /// Address of the gRPC door
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:50051")]
    pub listen: std::net::SocketAddr,
}

const QUESTION: &str = "Why is the sky blue?";
const IMAGE_QUESTION: &str = "What is in the image?";
const DRAWING: &str = "a red lantern by the quiet river";
/// Enough to see that it works, little enough to wait for.
const MAX_TOKENS: u32 = 48;
const SEED: u64 = 7;

/// Runs `janua demo`.
pub async fn run(flags: Demo) -> Result<(), Failure> {
    let name = model_name(&flags.model)?;
    // Once is for scripts: a free port never collides with a server that is already running.
    let listen = if flags.once { std::net::SocketAddr::new(flags.listen.ip(), 0) } else { flags.listen };
    let options = LocalOptions { listen: Some(listen), ..LocalOptions::embedded(vec![(name.clone(), flags.model.clone())])? };
    let settings = telemetry::TelemetryConfig { level: "warn".to_owned(), ..telemetry::TelemetryConfig::default() };
    let telemetry = telemetry::init(&settings, "janua").await.map_err(Failure::software)?;
    let work = async {
        let local = Local::start(options).await?;
        let door = Door::of(&local, &name).await?;
        let model = door.models().await?.into_iter().find(|model| model.name == name);
        let model = model.ok_or_else(|| Failure::software(format!("{name} was started but is not listed")))?;
        terminal::line(&format!("{}\n", describe(&model)))?;
        show(&flags, &door, &model).await?;
        Ok(local)
    };
    let mut signal = pin!(serve::signal());
    let local = tokio::select! {
        biased;
        stop = &mut signal => return stop,
        local = work => local?,
    };
    if flags.once {
        terminal::line(&paint(GOOD, "done"))?;
    } else {
        serve::announce(&local, false).await?;
        signal.await?;
        terminal::remark(&paint(DIM, "draining"));
    }
    local.drain().await;
    telemetry.shutdown().await;
    Ok(())
}

/// One request for each thing the model can do.
async fn show(flags: &Demo, door: &Door, model: &v1::Model) -> Result<(), Failure> {
    heading("text in, text out", QUESTION)?;
    let mut stream = ask(door, vec![request::text(QUESTION)]).await?;
    chat::print_text(&mut stream, 1).await?;
    if model.image_input {
        let (told, data) = picture(flags)?;
        heading("picture in, text out", &format!("{IMAGE_QUESTION} {}", paint(DIM, format!("({told})"))))?;
        let mut stream = ask(door, vec![request::picture(data), request::text(IMAGE_QUESTION)]).await?;
        chat::print_text(&mut stream, 1).await?;
    }
    if model.image_output {
        heading("text in, picture out", DRAWING)?;
        draw(flags, door).await?;
    }
    terminal::line("").map(drop)
}

fn heading(kind: &str, question: &str) -> Result<(), Failure> {
    terminal::line(&format!("{}\n{} {question}", paint(BOLD, kind), paint(MARK, "›"))).map(drop)
}

async fn ask(door: &Door, parts: Vec<v1::Part>) -> Result<Events, Failure> {
    let input = request::chat(vec![request::message(v1::Role::User, parts)]);
    let sampling = v1::Sampling { temperature: Some(0.0), max_tokens: Some(MAX_TOKENS), ..v1::Sampling::default() };
    door.generate(input, v1::OutputKind::Text, Some(sampling), None).await
}

async fn draw(flags: &Demo, door: &Door) -> Result<(), Failure> {
    let input = request::chat(vec![request::message(v1::Role::User, vec![request::text(DRAWING)])]);
    let sampling = v1::ImageSampling { seed: Some(SEED), ..v1::ImageSampling::default() };
    let mut stream = door.generate(input, v1::OutputKind::Image, None, Some(sampling)).await?;
    let mut bar = None;
    while let Some(event) = stream.next().await? {
        match event {
            Event::ImageProgress(progress) => {
                let bar = bar.get_or_insert_with(|| terminal::bar(u64::from(progress.total), "drawing"));
                bar.set_position(u64::from(progress.done));
            }
            Event::Image(picture) => {
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                }
                if let Some(folder) = flags.out.parent() {
                    std::fs::create_dir_all(folder)
                        .map_err(|error| Failure::input(format!("cannot make {}: {error}", folder.display())))?;
                }
                image::save(&flags.out, &picture.data)?;
                terminal::line(&format!("saved to {} {}", paint(BOLD, flags.out.display()), paint(DIM, image::facts(&picture))))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// What the picture is called, and its bytes.
fn picture(flags: &Demo) -> Result<(String, Vec<u8>), Failure> {
    let file = flags.image.clone().or_else(|| first_picture(&flags.model));
    let Some(file) = file else {
        return Ok(("a colour wash".to_owned(), colour_wash()?));
    };
    let data = std::fs::read(&file).map_err(|error| Failure::input(format!("cannot read the picture {}: {error}", file.display())))?;
    Ok((file.display().to_string(), data))
}

fn first_picture(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.filter(|file| file.extension().is_some_and(|e| e == "png" || e == "jpg" || e == "jpeg")).min()
}

/// A square that goes from blue to orange, as PNG.
fn colour_wash() -> Result<Vec<u8>, Failure> {
    const SIZE: u32 = 96;
    let pixels = (0..SIZE * SIZE).flat_map(|i| {
        let (x, y) = ((i % SIZE) * 255 / SIZE, (i / SIZE) * 255 / SIZE);
        [x as u8, 128, 255 - y as u8]
    });
    let picture = pixels::Rgb { width: SIZE, height: SIZE, data: pixels.collect() };
    pixels::encode(&picture, domain::ImageFormat::Png, &std::collections::BTreeMap::new()).map_err(Failure::software)
}
