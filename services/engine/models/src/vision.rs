//! Pixels to embeddings of the language model: a vision tower and the aligner behind it.

use std::path::Path;
use std::sync::Arc;

use backend_onnx::{Activation, Dim, Input, Session, SessionOptions, Value};
use checkpoint::Checkpoint;
use layers::EngineError;
use serde::Deserialize;

use crate::janusflow::TOWER;
use crate::onnx::{Builder, CHANNELS, Probe, run_probe, run_single};
use crate::sam::Sam;
use crate::siglip::{self, Siglip};
use crate::text_config::{Fields, TextConfig};

/// The vision side of a checkpoint, ready to run. Shared between threads; runs follow one another.
#[derive(Debug)]
pub struct VisionEncoder {
    checkpoint: Arc<Checkpoint>,
    options: SessionOptions,
    model: VisionModel,
    session: Session,
}

/// Pictures as the encoder takes them: `[3, size, size]` each, one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Planes<'a> {
    /// Sides of [`VisionEncoder::image_size`].
    pub main: &'a [f32],
    /// The same pictures with sides of [`VisionEncoder::high_res_size`], where there is such a size.
    pub high_res: Option<&'a [f32]>,
}

/// Pictures for a model that takes each of them once.
impl<'a, T: AsRef<[f32]> + ?Sized> From<&'a T> for Planes<'a> {
    fn from(main: &'a T) -> Self {
        Self { main: main.as_ref(), high_res: None }
    }
}

/// One or two towers, and an aligner that takes their tokens to the language model's width.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VisionModel {
    tower: Siglip,
    high_res: Option<HighRes>,
    aligner: Aligner,
    /// Hidden size of the language model.
    width: usize,
    /// A learned row `[1, width]` that comes before those of every picture.
    first_row: Option<&'static str>,
}

/// The second tower of a hybrid model.
#[derive(Debug, Clone, PartialEq)]
struct HighRes {
    tower: Sam,
    /// Whether the picture comes once, for this tower, and the other one gets it shrunk by the model itself (spec: vision.md 5).
    shared: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Aligner {
    /// Linear layers by name, an activation between each two.
    Mlp { layers: Vec<String>, activation: Activation },
    /// Each tower's tokens to half the width, high resolution first; then an activation and a linear layer for each name (spec: vision.md 4).
    Split { high_res: &'static str, low_res: &'static str, layers: Vec<String> },
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
        self.model.tokens()
    }

    /// How many of these rows come before the features of the picture: learned ones, the same for all pictures.
    pub fn extra_rows(&self) -> usize {
        usize::from(self.model.first_row.is_some())
    }

    /// Values of a row: the hidden size of the language model.
    pub fn width(&self) -> usize {
        self.model.width
    }

    /// Sides of the main input, pixels.
    pub fn image_size(&self) -> usize {
        match &self.model.high_res {
            Some(HighRes { tower, shared: true }) => tower.image_size,
            _ => self.model.tower.image_size,
        }
    }

    /// Sides of the high-resolution input, pixels; `None` for a model that takes each picture once.
    pub fn high_res_size(&self) -> Option<usize> {
        match &self.model.high_res {
            Some(HighRes { tower, shared: false }) => Some(tower.image_size),
            _ => None,
        }
    }

    /// A digest of everything that decides the result: the graph and its weights. Reads every weight once.
    pub fn fingerprint(&self) -> String {
        self.session.fingerprint()
    }

    /// Embeds pictures -> `[pictures * tokens_per_image, width]`, picture by picture.
    pub fn encode<'a>(&self, pictures: impl Into<Planes<'a>>) -> Result<Vec<f32>, EngineError> {
        self.with_inputs(pictures.into(), |inputs| run_single(&self.session, "vision tower", inputs))
    }

    /// The graph as an ONNX file for other programs, and the folder that it belongs in.
    pub fn onnx(&self) -> Option<(&[u8], &Path)> {
        self.session.onnx()
    }

    /// The intermediate tensors for one picture, named as in reference outputs: `vision.hidden.*`, `sam.*`, `image_features`.
    pub fn probe<'a>(&self, picture: impl Into<Planes<'a>>) -> Result<Vec<Probe>, EngineError> {
        let graph = self.model.build(&self.checkpoint, true)?.graph;
        self.with_inputs(picture.into(), |inputs| run_probe(graph, &self.options, inputs))
    }

    /// The planes as inputs of the graph, once their sizes are found to be right.
    fn with_inputs<T>(&self, planes: Planes<'_>, run: impl FnOnce(&[Input<'_>]) -> Result<T, EngineError>) -> Result<T, EngineError> {
        let shape = shape(planes.main, self.image_size())?;
        let main = Input::Floats { shape: &shape, values: planes.main };
        match (self.high_res_size(), planes.high_res) {
            (None, None) => run(&[main]),
            (Some(size), Some(values)) => {
                let high = self::shape(values, size)?;
                if high[0] != shape[0] {
                    return Err(EngineError::Step(format!("{} pictures, {} of high resolution", shape[0], high[0])));
                }
                run(&[main, Input::Floats { shape: &high, values }])
            }
            (Some(size), None) => Err(EngineError::Step(format!("no pictures of {size} x {size}, which the high-resolution tower needs"))),
            (None, Some(_)) => Err(EngineError::Step("pictures of high resolution, which this model does not take".into())),
        }
    }
}

/// Shape of pictures with sides of `size` pixels.
fn shape(values: &[f32], size: usize) -> Result<[usize; 4], EngineError> {
    let one = CHANNELS * size * size;
    if values.is_empty() || !values.len().is_multiple_of(one) {
        return Err(EngineError::Step(format!("{} pixel values, {one} make a picture of {size} x {size}", values.len())));
    }
    Ok([values.len() / one, CHANNELS, size, size])
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

/// `vision_config.params` of the original hybrid tower.
#[derive(Debug, Deserialize)]
struct OriginalHybrid {
    concat_type: Option<String>,
}

const MOST_LAYERS: usize = 64;
const MOST_UNITS: usize = 1 << 16;

const MLP: &str = "mlp_gelu";
const SPLIT: &str = "low_high_hybrid_split_mlp_gelu";

impl VisionModel {
    /// What the checkpoint's configuration says; `None` for a model that does not see.
    pub fn read(checkpoint: &Checkpoint) -> Result<Option<Self>, EngineError> {
        let has = |field: &str| checkpoint.config().get(field).is_some();
        match checkpoint.model_type() {
            "janus" => Self::read_janus_port(checkpoint).map(Some),
            "deepseek_vl" => Self::read_vl_port(checkpoint, false).map(Some),
            "deepseek_vl_hybrid" => Self::read_vl_port(checkpoint, true).map(Some),
            "multi_modality" if has("vision_config") => Self::read_original(checkpoint).map(Some),
            "multi_modality" if has("vision_gen_enc_config") => Self::read_janusflow(checkpoint).map(Some),
            _ => Ok(None),
        }
    }

    fn read_janus_port(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let tower = Siglip::read_port(checkpoint, "vision_config", "model.vision_model.", &siglip::LARGE)?;
        let fields: AlignerFields = checkpoint.config_as("/vision_config")?;
        let at = Fields { checkpoint, path: "vision_config" };
        let depth = at.size("depth", fields.depth, 2, MOST_LAYERS)?;
        let layer = |index: usize| match index {
            0 => "model.aligner.fc1".to_owned(),
            _ => format!("model.aligner.hidden_layers.{}", index - 1),
        };
        let activation = crate::onnx::activation(&at, fields.hidden_act.as_deref())?;
        Ok(Self {
            aligner: Aligner::Mlp { layers: (0..depth).map(layer).collect(), activation },
            width: at.size("projection_dim", fields.projection_dim, 2048, MOST_UNITS)?,
            high_res: None,
            first_row: None,
            tower,
        })
    }

    fn read_vl_port(checkpoint: &Checkpoint, hybrid: bool) -> Result<Self, EngineError> {
        // Files written by older versions of the library have one level more.
        let doubled = "model.vision_model.vision_model.";
        let prefix = match checkpoint.contains(&format!("{doubled}embeddings.patch_embedding.weight")) {
            true => doubled,
            false => "model.vision_model.",
        };
        let aligner = match hybrid {
            false => {
                Aligner::Mlp { layers: vec!["model.aligner.linear1".into(), "model.aligner.linear2".into()], activation: Activation::Gelu }
            }
            true => Aligner::Split {
                high_res: "model.aligner.high_res_vision_proj",
                low_res: "model.aligner.vision_proj",
                layers: vec!["model.aligner.proj".into()],
            },
        };
        let high_res = match hybrid {
            false => None,
            true => Some(HighRes { tower: Sam::read_port(checkpoint, "high_res_vision_config")?, shared: false }),
        };
        Self {
            tower: Siglip::read_port(checkpoint, "vision_config", prefix, &siglip::BASE)?,
            high_res,
            aligner,
            width: TextConfig::read(checkpoint, "/text_config")?.hidden_size,
            first_row: None,
        }
        .checked(Fields { checkpoint, path: "text_config" }, "hidden_size")
    }

    fn read_original(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        let (tower, high_res) = match class(checkpoint)? {
            Class::Clip => (Siglip::read_original(checkpoint, "vision_config", "vision_model.vision_tower.")?, None),
            Class::Hybrid => {
                let params: OriginalHybrid = checkpoint.config_as("/vision_config/params")?;
                if let Some(other) = params.concat_type.filter(|kind| kind != "tuple") {
                    let at = Fields { checkpoint, path: "vision_config/params" };
                    return Err(at.refuse("concat_type", format!("{other:?} is not supported, only \"tuple\"")));
                }
                let low = "vision_model.vision_tower_low.vision_tower.";
                let tower = Siglip::read_params(checkpoint, "vision_config/params/low_res_cfg", low)?;
                (tower, Some(HighRes { tower: Sam::read_original(checkpoint, "vision_config/params/high_res_cfg")?, shared: true }))
            }
        };
        let params: OriginalAligner = checkpoint.config_as("/aligner_config/params")?;
        let at = Fields { checkpoint, path: "aligner_config/params" };
        let known = if high_res.is_some() { SPLIT } else { MLP };
        match params.projector_type.as_deref() {
            Some(projector) if projector == known => (),
            None if high_res.is_none() => (),
            None => return Err(at.refuse("projector_type", format!("missing, {known:?} expected"))),
            Some(other) => return Err(at.refuse("projector_type", format!("{other:?} is not supported for this tower, only {known:?}"))),
        }
        let depth = at.size("depth", params.depth, 2, MOST_LAYERS)?;
        let layer = |index: usize| format!("aligner.layers.{index}");
        Self {
            aligner: match high_res {
                // The activations count.
                None => Aligner::Mlp { layers: (0..depth).map(|index| layer(2 * index)).collect(), activation: Activation::Gelu },
                Some(_) => Aligner::Split {
                    high_res: "aligner.high_up_proj",
                    low_res: "aligner.low_up_proj",
                    layers: (1..depth).map(|index| layer(2 * index - 1)).collect(),
                },
            },
            width: at.size("n_embed", params.n_embed, 2048, MOST_UNITS)?,
            high_res,
            first_row: None,
            tower,
        }
        .checked(at, "n_embed")
    }

    /// One linear layer, and a row that says that a picture begins (spec: janusflow.md 4).
    fn read_janusflow(checkpoint: &Checkpoint) -> Result<Self, EngineError> {
        Ok(Self {
            tower: Siglip::read_original(checkpoint, TOWER.0, TOWER.1)?,
            high_res: None,
            aligner: Aligner::Mlp { layers: vec!["vision_und_enc_aligner".to_owned()], activation: Activation::Gelu },
            width: TextConfig::read(checkpoint, "/language_config")?.hidden_size,
            first_row: Some("beg_of_und_embed"),
        })
    }

    fn checked(self, at: Fields<'_>, width: &str) -> Result<Self, EngineError> {
        match &self.aligner {
            Aligner::Split { .. } if !self.width.is_multiple_of(2) => {
                Err(at.refuse(width, format!("{} is odd: each of two towers takes half of it", self.width)))
            }
            _ => Ok(self),
        }
    }

    /// Rows that one picture becomes.
    pub fn tokens(&self) -> usize {
        self.tower.tokens() + usize::from(self.first_row.is_some())
    }

    /// Values of a row: the hidden size of the language model.
    pub fn width(&self) -> usize {
        self.width
    }

    /// `pixel_values [B, 3, S, S]`, and for a second tower `high_res_pixel_values` -> `image_features [B * N, width]`; with the batch apart
    /// and without a first row, when probing.
    fn build<'a>(&self, checkpoint: &'a Checkpoint, probing: bool) -> Result<Builder<'a>, EngineError> {
        let mut builder = Builder::new(checkpoint, probing);
        let (low, high) = self.inputs(&mut builder);
        let low = self.tower.build(&mut builder, &low)?; // [B * N, hidden]
        let high = match (&self.high_res, high) {
            (Some(HighRes { tower, .. }), Some(pixels)) => Some((tower.build(&mut builder, &pixels, self.tower.side())?, tower.width())),
            _ => None,
        };
        let (rows, hidden, width) = (self.tower.tokens() as i64, self.tower.hidden_size as i64, self.width as i64);
        if probing && self.first_row.is_some() {
            let pictures = builder.graph.reshape(&low, &[-1, rows, hidden]);
            builder.tap("vision.features", &pictures);
        }
        let mut features = self.align(&mut builder, low, high)?; // [B * N, width]
        if let Some(name) = self.first_row.filter(|_| !probing) {
            let first = builder.weight(name, &[1, self.width])?;
            let pictures = builder.graph.reshape(&features, &[-1, rows, width]);
            features = builder.graph.prepend(&first, &pictures, self.width); // [B, 1 + N, width]
        }
        let shape = if probing { vec![-1, rows, width] } else { vec![-1, width] };
        let features = builder.graph.reshape(&features, &shape);
        builder.graph.output("image_features", &features);
        Ok(builder)
    }

    /// The pixels for each tower.
    fn inputs(&self, builder: &mut Builder<'_>) -> (Value, Option<Value>) {
        let square = |size| [Dim::Named("images"), Dim::Fixed(CHANNELS), Dim::Fixed(size), Dim::Fixed(size)];
        match &self.high_res {
            None => (builder.graph.input("pixel_values", &square(self.tower.image_size)), None),
            Some(HighRes { tower, shared: false }) => {
                let low = builder.graph.input("pixel_values", &square(self.tower.image_size));
                (low, Some(builder.graph.input("high_res_pixel_values", &square(tower.image_size))))
            }
            Some(HighRes { tower, shared: true }) => {
                let high = builder.graph.input("pixel_values", &square(tower.image_size));
                (builder.graph.resize_linear(&high, self.tower.image_size, true), Some(high))
            }
        }
    }

    /// `low [B * N, hidden]`, and `high` with its width, if there is one -> `[B * N, width]`.
    fn align(&self, builder: &mut Builder<'_>, low: Value, high: Option<(Value, usize)>) -> Result<Value, EngineError> {
        let (mut x, rest, activation) = match (&self.aligner, high) {
            (Aligner::Split { high_res, low_res, layers }, Some((high, high_width))) => {
                let half = self.width / 2;
                let high = builder.linear(&high, high_res, [half, high_width], true)?;
                let low = builder.linear(&low, low_res, [half, self.tower.hidden_size], true)?;
                (builder.graph.concat(&[&high, &low], -1), &layers[..], Activation::Gelu)
            }
            (Aligner::Mlp { layers, activation }, _) => {
                let (first, rest) = layers.split_at(1);
                (builder.linear(&low, &first[0], [self.width, self.tower.hidden_size], true)?, rest, *activation)
            }
            (Aligner::Split { .. }, None) => return Err(EngineError::Compute("an aligner for two towers, and one tower".into())),
        };
        for name in rest {
            x = builder.graph.activate(&x, activation);
            x = builder.linear(&x, name, [self.width, self.width], true)?;
        }
        Ok(x)
    }
}

/// Which towers an original configuration means.
enum Class {
    Clip,
    Hybrid,
}

fn class(checkpoint: &Checkpoint) -> Result<Class, EngineError> {
    let at = Fields { checkpoint, path: "vision_config" };
    match checkpoint.config().pointer("/vision_config/cls").map(|cls| cls.as_str()) {
        Some(Some("CLIPVisionTower")) => Ok(Class::Clip),
        Some(Some("HybridVisionTower")) => Ok(Class::Hybrid),
        Some(Some(other)) => {
            Err(at.refuse("cls", format!("{other:?} is not supported, only \"CLIPVisionTower\" and \"HybridVisionTower\"")))
        }
        Some(None) => Err(at.refuse("cls", "a string expected")),
        None => Err(at.refuse("cls", "missing")),
    }
}
