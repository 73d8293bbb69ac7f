//! Pixels to embeddings of the language model: a vision tower and the aligner behind it.

use std::path::Path;
use std::sync::Arc;

use backend_onnx::{Activation, Input, Session, SessionOptions, Value};
use checkpoint::Checkpoint;
use layers::EngineError;
use serde::Deserialize;

use crate::onnx::{Builder, Probe, run_probe, run_single};
use crate::siglip::Siglip;
use crate::text_config::Fields;

/// The vision side of a checkpoint, ready to run. Shared between threads; runs follow one another.
#[derive(Debug)]
pub struct VisionEncoder {
    checkpoint: Arc<Checkpoint>,
    options: SessionOptions,
    model: VisionModel,
    session: Session,
}

/// A tower and an MLP that takes its tokens to the language model's width.
#[derive(Debug, Clone, PartialEq)]
struct VisionModel {
    tower: Siglip,
    /// Names of the linear layers, an activation between each two.
    aligner: Vec<String>,
    activation: Activation,
    /// Hidden size of the language model.
    width: usize,
}

/// Loads the vision side of a checkpoint; `None` where it has none.
pub fn load_vision(checkpoint: &Arc<Checkpoint>, options: &SessionOptions) -> Result<Option<VisionEncoder>, EngineError> {
    let Some(model) = VisionModel::read(checkpoint)? else { return Ok(None) };
    let graph = model.build(checkpoint, false)?.graph;
    let session = Session::new(graph, options)?;
    Ok(Some(VisionEncoder { checkpoint: checkpoint.clone(), options: *options, model, session }))
}

impl VisionEncoder {
    /// Rows that one picture becomes.
    pub fn tokens_per_image(&self) -> usize {
        self.model.tower.tokens()
    }

    /// Values of a row: the hidden size of the language model.
    pub fn width(&self) -> usize {
        self.model.width
    }

    /// Sides of the input, pixels.
    pub fn image_size(&self) -> usize {
        self.model.tower.image_size
    }

    /// A digest of everything that decides the result: the graph and its weights. Reads every weight once.
    pub fn fingerprint(&self) -> String {
        self.session.fingerprint()
    }

    /// Embeds pictures: `[3, size, size]` each, one after the other -> `[pictures * tokens_per_image, width]`.
    pub fn encode(&self, pixel_values: &[f32]) -> Result<Vec<f32>, EngineError> {
        let shape = self.shape(pixel_values)?;
        run_single(&self.session, "vision tower", Input::Floats { shape: &shape, values: pixel_values })
    }

    /// The graph as an ONNX file for other programs, and the folder that it belongs in.
    pub fn onnx(&self) -> Option<(&[u8], &Path)> {
        self.session.onnx()
    }

    /// The intermediate tensors for one picture, named as in reference outputs: `vision.hidden.*`, `image_features`.
    pub fn probe(&self, pixel_values: &[f32]) -> Result<Vec<Probe>, EngineError> {
        let shape = self.shape(pixel_values)?;
        let graph = self.model.build(&self.checkpoint, true)?.graph;
        run_probe(graph, &self.options, Input::Floats { shape: &shape, values: pixel_values })
    }

    fn shape(&self, pixel_values: &[f32]) -> Result<[usize; 4], EngineError> {
        let (side, one) = (self.image_size(), self.model.tower.input_len());
        if pixel_values.is_empty() || !pixel_values.len().is_multiple_of(one) {
            return Err(EngineError::Step(format!("{} pixel values, {one} make a picture of {side} x {side}", pixel_values.len())));
        }
        Ok([pixel_values.len() / one, 3, side, side])
    }
}

#[derive(Debug, Deserialize)]
struct AlignerFields {
    depth: Option<usize>,
    projection_dim: Option<usize>,
    hidden_act: Option<String>,
}

#[derive(Debug, Deserialize)]
struct OriginalAligner {
    projector_type: Option<String>,
    depth: Option<usize>,
    n_embed: Option<usize>,
}

const MOST_LAYERS: usize = 64;
const MOST_UNITS: usize = 1 << 16;

impl VisionModel {
    /// What the checkpoint's configuration says; `None` for a model that does not see.
    fn read(checkpoint: &Checkpoint) -> Result<Option<Self>, EngineError> {
        let has = |field: &str| checkpoint.config().get(field).is_some();
        match checkpoint.model_type() {
            "janus" => Self::read_port(checkpoint).map(Some),
            "multi_modality" if has("gen_vision_config") => Self::read_original(checkpoint).map(Some),
            _ => Ok(None),
        }
    }

    fn read_port(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let tower = Siglip::read_port(checkpoint, "vision_config", "model.vision_model.")?;
        let fields: AlignerFields = checkpoint.config_as("/vision_config")?;
        let at = Fields { checkpoint, path: "vision_config" };
        let depth = at.size("depth", fields.depth, 2, MOST_LAYERS)?;
        let layer = |index: usize| match index {
            0 => "model.aligner.fc1".to_owned(),
            _ => format!("model.aligner.hidden_layers.{}", index - 1),
        };
        Ok(Self {
            activation: crate::onnx::activation(&at, fields.hidden_act.as_deref())?,
            width: at.size("projection_dim", fields.projection_dim, 2048, MOST_UNITS)?,
            aligner: (0..depth).map(layer).collect(),
            tower,
        })
    }

    fn read_original(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let tower = Siglip::read_original(checkpoint, "vision_config", "vision_model.vision_tower.")?;
        let params: OriginalAligner = checkpoint.config_as("/aligner_config/params")?;
        let at = Fields { checkpoint, path: "aligner_config/params" };
        match params.projector_type.as_deref() {
            None | Some("mlp_gelu") => (),
            Some(other) => return Err(at.refuse("projector_type", format!("{other:?} is not supported, only \"mlp_gelu\""))),
        }
        let depth = at.size("depth", params.depth, 2, MOST_LAYERS)?;
        Ok(Self {
            activation: Activation::Gelu,
            width: at.size("n_embed", params.n_embed, 2048, MOST_UNITS)?,
            aligner: (0..depth).map(|index| format!("aligner.layers.{}", 2 * index)).collect(), // the activations count
            tower,
        })
    }

    /// `pixel_values [B, 3, S, S]` -> `image_features [B * N, width]`; with the batch apart, when probing.
    fn build<'a>(&self, checkpoint: &'a Checkpoint, probing: bool) -> Result<Builder<'a>, EngineError> {
        let mut builder = Builder::new(checkpoint, probing);
        let pixels = builder.graph.input("pixel_values", &self.tower.input());
        let tokens = self.tower.build(&mut builder, &pixels)?; // [B * N, hidden]
        let features = self.align(&mut builder, tokens)?; // [B * N, width]
        let shape = if probing { vec![-1, self.tower.tokens() as i64, self.width as i64] } else { vec![-1, self.width as i64] };
        let features = builder.graph.reshape(&features, &shape);
        builder.graph.output("image_features", &features);
        Ok(builder)
    }

    fn align(&self, builder: &mut Builder<'_>, mut x: Value) -> Result<Value, EngineError> {
        let mut input = self.tower.hidden_size;
        for (index, name) in self.aligner.iter().enumerate() {
            if index > 0 {
                x = builder.graph.activate(&x, self.activation);
            }
            x = builder.linear(&x, name, [self.width, input], true)?;
            input = self.width;
        }
        Ok(x)
    }
}
