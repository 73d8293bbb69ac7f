//! What a model's drawings become pictures with, whatever they are made of.

use std::path::Path;
use std::sync::Arc;

use backend_onnx::SessionOptions;
use checkpoint::Checkpoint;
use domain::{Canvas, Drawing};
use layers::EngineError;

use crate::vae::{VaeDecoder, vae_folder};
use crate::vq::{VqDecoder, load_vq};

/// The decoder of a model that draws, ready to run. Shared between threads; runs follow one another.
#[derive(Debug)]
pub enum Painter {
    Vq(VqDecoder),
    Vae(VaeDecoder),
}

/// Loads what paints the drawings of a checkpoint; `None` where it does not draw. A flow needs a VAE, in the folder `vae` or, without one, in
/// the folder `vae` of the checkpoint's.
pub fn load_painter(checkpoint: &Arc<Checkpoint>, vae: Option<&Path>, options: &SessionOptions) -> Result<Option<Painter>, EngineError> {
    match crate::registry::canvas(checkpoint)? {
        None => Ok(None),
        Some(Canvas::Codes(_)) => Ok(load_vq(checkpoint, options)?.map(Painter::Vq)),
        Some(Canvas::Latent(grid)) => {
            let weights = Checkpoint::open_diffusers(&vae_folder(checkpoint.dir(), vae)?)?;
            weights.scan(&mut |_| {})?;
            VaeDecoder::load(&weights, grid, options).map(|decoder| Some(Painter::Vae(decoder)))
        }
    }
}

impl Painter {
    /// What it takes.
    pub fn canvas(&self) -> Canvas {
        match self {
            Self::Vq(decoder) => Canvas::Codes(decoder.grid()),
            Self::Vae(decoder) => Canvas::Latent(decoder.grid()),
        }
    }

    /// Width and height of a picture, pixels.
    pub fn image_size(&self) -> (usize, usize) {
        match self {
            Self::Vq(decoder) => decoder.image_size(),
            Self::Vae(decoder) => decoder.image_size(),
        }
    }

    /// The decoder's graph as an ONNX file for other programs, and the folder that it belongs in.
    pub fn onnx(&self) -> Option<(&[u8], &Path)> {
        match self {
            Self::Vq(decoder) => decoder.onnx(),
            Self::Vae(decoder) => decoder.onnx(),
        }
    }

    /// Paints a complete drawing -> `[3, height, width]`, about -1..=1.
    pub fn paint(&self, drawing: &Drawing) -> Result<Vec<f32>, EngineError> {
        match (self, drawing) {
            (Self::Vq(decoder), Drawing::Codes(codes)) => decoder.decode(codes),
            (Self::Vae(decoder), Drawing::Latent(latent)) => decoder.decode(&latent.values),
            (Self::Vq(_), Drawing::Latent(_)) | (Self::Vae(_), Drawing::Codes(_)) => {
                Err(EngineError::Step("a drawing of another kind than the model's".into()))
            }
        }
    }
}
