use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoint::Checkpoint;
use clap::Args;
use models::{OnnxOptions, Painter};
use serde_json::json;

use crate::{Failure, terminal};

/// Write the graphs that ONNX Runtime gets for a checkpoint, for other programs to run or to look at
#[derive(Debug, Args)]
#[command(after_help = "The files go beside the weights that they refer to. Prints a line of JSON for each: its name, the file, and
the runtime's settings under which the services run it.")]
pub struct Graphs {
    /// Folder of the checkpoint
    pub dir: PathBuf,
}

/// Runs `janua bench graphs`.
pub async fn run(flags: Graphs) -> Result<(), Failure> {
    let work = move || write(&flags.dir);
    tokio::task::spawn_blocking(work).await.map_err(|error| Failure::software(format!("writing the graphs: {error}")))?
}

fn write(dir: &Path) -> Result<(), Failure> {
    let checkpoint = Arc::new(Checkpoint::open(dir).map_err(Failure::input)?);
    let options = OnnxOptions::default();
    if let Some(encoder) = models::load_vision(&checkpoint, &options).map_err(Failure::input)? {
        save("vision", encoder.onnx())?;
    }
    if let Some(painter) = models::load_painter(&checkpoint, None, &options).map_err(Failure::input)? {
        let name = match painter {
            Painter::Vq(_) => "vq",
            Painter::Vae(_) => "vae",
        };
        save(name, painter.onnx())?;
    }
    Ok(())
}

fn save(name: &str, graph: Option<(&[u8], &Path)>) -> Result<(), Failure> {
    let (bytes, folder) = graph.ok_or_else(|| Failure::input(format!("{name}: its weights lie in several folders")))?;
    let file = folder.join(format!("{name}.onnx"));
    std::fs::write(&file, bytes).map_err(|error| Failure::input(format!("cannot write {}: {error}", file.display())))?;
    let object = |settings: &[(&'static str, &'static str)]| settings.iter().copied().collect::<BTreeMap<_, _>>();
    let (settings, run_settings) = (object(&models::ONNX_SETTINGS), object(&models::ONNX_RUN_SETTINGS));
    terminal::json(&json!({"graph": name, "file": file.display().to_string(), "settings": settings, "run_settings": run_settings}))
        .map(drop)
}
