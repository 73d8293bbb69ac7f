//! What the ONNX models share: layers whose weights are named after the layer, and runs of a session.

use backend_onnx::{Activation, Graph, Input, Session, SessionOptions, Value};
use checkpoint::Checkpoint;
use layers::EngineError;

use crate::text_config::Fields;

/// A named tensor for comparison with reference outputs: name as in the golden files, shape, row-major values.
pub type Probe = (String, Vec<usize>, Vec<f32>);

/// Colours of the pictures that go in.
pub(crate) const CHANNELS: usize = 3;

/// What a tower that takes pixels in 0..=1 does to them first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Normalization {
    mean: [f32; CHANNELS],
    deviation: [f32; CHANNELS],
}

impl Normalization {
    /// From the fields `pixel_mean` and `pixel_std` of an original configuration: a tower that has both normalises by itself (spec: vision.md 5).
    pub fn read(at: &Fields<'_>, mean: Option<[f32; CHANNELS]>, deviation: Option<[f32; CHANNELS]>) -> Result<Option<Self>, EngineError> {
        let both = mean.zip(deviation).map(|(mean, deviation)| Self { mean, deviation });
        match both {
            Some(Self { mean, .. }) if mean.iter().any(|m| !m.is_finite()) => Err(at.refuse("pixel_mean", "must be finite")),
            Some(Self { deviation, .. }) if deviation.iter().any(|d| !d.is_finite() || *d == 0.0) => {
                Err(at.refuse("pixel_std", "must be finite and not zero"))
            }
            both => Ok(both),
        }
    }
}

/// A graph that takes its weights from a checkpoint, every one checked against the shape that the configuration implies.
pub(crate) struct Builder<'a> {
    pub graph: Graph,
    checkpoint: &'a Checkpoint,
    /// Whether intermediate tensors become outputs.
    probing: bool,
}

impl<'a> Builder<'a> {
    pub fn new(checkpoint: &'a Checkpoint, probing: bool) -> Self {
        Self { graph: Graph::new(), checkpoint, probing }
    }

    /// Makes an intermediate tensor an output, when probing.
    pub fn tap(&mut self, name: &str, value: &Value) {
        if self.probing {
            self.graph.output(name, value);
        }
    }

    /// Where the weights are from.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// Whether intermediate tensors become outputs.
    pub fn probing(&self) -> bool {
        self.probing
    }

    /// The tensor `name`, which must have this shape.
    pub fn weight(&mut self, name: &str, shape: &[usize]) -> Result<Value, EngineError> {
        self.graph.weight(&self.checkpoint.tensor_shaped(name, shape)?)
    }

    /// `name.weight [out, in]`, and `name.bias [out]` unless there is none. `x [N, in]` -> `[N, out]`
    pub fn linear(&mut self, x: &Value, name: &str, [output, input]: [usize; 2], bias: bool) -> Result<Value, EngineError> {
        let weight = self.weight(&format!("{name}.weight"), &[output, input])?;
        let bias = if bias { Some(self.weight(&format!("{name}.bias"), &[output])?) } else { None };
        Ok(self.graph.linear(x, &weight, bias.as_ref()))
    }

    /// `name.weight [out, in, side, side]`, `name.bias [out]`. `x [B, in, H, W]`
    pub fn conv(
        &mut self,
        x: &Value,
        name: &str,
        (output, input, side): (usize, usize, usize),
        stride: usize,
    ) -> Result<Value, EngineError> {
        let weight = self.weight(&format!("{name}.weight"), &[output, input, side, side])?;
        let bias = self.weight(&format!("{name}.bias"), &[output])?;
        // Windows that touch each other need no border; sliding ones keep the size.
        let padding = if stride == side { 0 } else { side / 2 };
        Ok(self.graph.conv(x, &weight, Some(&bias), stride, padding))
    }

    /// Twice the height and width, then a 3 x 3 convolution that keeps the number of channels. `x [B, channels, H, W]`
    pub fn upsample_conv(&mut self, x: &Value, name: &str, channels: usize) -> Result<Value, EngineError> {
        let weight = self.weight(&format!("{name}.weight"), &[channels, channels, 3, 3])?;
        let bias = self.weight(&format!("{name}.bias"), &[channels])?;
        Ok(self.graph.upsample_conv(x, &weight, &bias))
    }

    /// `name.weight [out, in, side, side]`, without bias, the map framed by `side / 2` zeros. `x [B, in, H, W]`
    pub fn plain_conv(
        &mut self,
        x: &Value,
        name: &str,
        (output, input, side): (usize, usize, usize),
        stride: usize,
    ) -> Result<Value, EngineError> {
        let weight = self.weight(&format!("{name}.weight"), &[output, input, side, side])?;
        Ok(self.graph.conv(x, &weight, None, stride, side / 2))
    }

    /// `(pixels - mean) / deviation`, channel by channel; the pixels themselves without such numbers. `pixels [B, 3, H, W]`
    pub fn normalize(&mut self, pixels: &Value, by: Option<&Normalization>) -> Value {
        let Some(Normalization { mean, deviation }) = by else { return pixels.clone() };
        let shift = self.graph.floats(&[CHANNELS, 1, 1], &mean.map(|m| -m));
        let factor = self.graph.floats(&[CHANNELS, 1, 1], &deviation.map(|d| 1.0 / d));
        let centered = self.graph.add(pixels, &shift);
        self.graph.mul(&centered, &factor)
    }

    /// `name.weight [width, width]`, or the same as a 1 x 1 convolution `[width, width, 1, 1]`; `name.bias [width]`. `x [N, width]`
    pub fn pointwise(&mut self, x: &Value, name: &str, width: usize) -> Result<Value, EngineError> {
        let weight = format!("{name}.weight");
        if self.checkpoint.tensor(&weight)?.shape.len() != 4 {
            return self.linear(x, name, [width, width], true);
        }
        let weight = self.weight(&weight, &[width, width, 1, 1])?;
        let weight = self.graph.reshape(&weight, &[width as i64, width as i64]);
        let bias = self.weight(&format!("{name}.bias"), &[width])?;
        Ok(self.graph.linear(x, &weight, Some(&bias)))
    }

    /// `name.weight [channels, 1, side, side]`, `name.bias [channels]`; keeps the size. `x [B, channels, H, W]`
    pub fn depthwise(&mut self, x: &Value, name: &str, channels: usize, side: usize) -> Result<Value, EngineError> {
        let weight = self.weight(&format!("{name}.weight"), &[channels, 1, side, side])?;
        let bias = self.weight(&format!("{name}.bias"), &[channels])?;
        Ok(self.graph.depthwise(x, &weight, &bias, channels, side / 2))
    }

    /// `name.weight`. `x [N, width]`
    pub fn rms_norm(&mut self, x: &Value, name: &str, width: usize, epsilon: f32) -> Result<Value, EngineError> {
        let weight = self.weight(&format!("{name}.weight"), &[width])?;
        Ok(self.graph.rms_norm(x, &weight, epsilon))
    }

    /// `name.weight`, `name.bias`. `x [N, width]`
    pub fn layer_norm(&mut self, x: &Value, name: &str, width: usize, epsilon: f32) -> Result<Value, EngineError> {
        let (weight, bias) = (self.weight(&format!("{name}.weight"), &[width])?, self.weight(&format!("{name}.bias"), &[width])?);
        Ok(self.graph.layer_norm(x, &weight, &bias, epsilon))
    }

    /// `name.weight`, `name.bias`. `x [B, channels, H, W]`
    pub fn group_norm(&mut self, x: &Value, name: &str, channels: usize, groups: usize, epsilon: f32) -> Result<Value, EngineError> {
        let (weight, bias) = (self.weight(&format!("{name}.weight"), &[channels])?, self.weight(&format!("{name}.bias"), &[channels])?);
        Ok(self.graph.group_norm(x, &weight, &bias, (channels, groups), epsilon))
    }
}

/// The names that configurations give to activation functions.
pub(crate) fn activation(fields: &Fields<'_>, name: Option<&str>) -> Result<Activation, EngineError> {
    match name {
        None | Some("gelu") => Ok(Activation::Gelu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
        Some(other) => Err(fields.refuse("hidden_act", format!("{other:?} is not supported, only \"gelu\" and \"gelu_pytorch_tanh\""))),
    }
}

/// Runs a graph of one output.
pub(crate) fn run_single(session: &Session, what: &str, inputs: &[Input<'_>]) -> Result<Vec<f32>, EngineError> {
    let values = session.run(inputs)?.pop().map(|output| output.values).unwrap_or_default();
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(values),
        false => Err(EngineError::Compute(format!("NaN or infinity in the output of the {what}"))),
    }
}

/// Runs a graph once for its intermediate tensors; the first dimension, of size 1, is dropped.
pub(crate) fn run_probe(graph: Graph, options: &SessionOptions, inputs: &[Input<'_>]) -> Result<Vec<Probe>, EngineError> {
    let outputs = Session::new(graph, options)?.run(inputs)?;
    let squeezed = |shape: Vec<usize>| if shape.first() == Some(&1) { shape[1..].to_vec() } else { shape };
    Ok(outputs.into_iter().map(|output| (output.name, squeezed(output.shape), output.values)).collect())
}
