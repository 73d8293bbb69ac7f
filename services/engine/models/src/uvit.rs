//! The two shallow networks around the language model of JanusFlow: a latent map to rows, hidden states to a velocity (spec: janusflow.md 1).
//!
//! Both are ConvNeXt blocks over one small map, conditioned on the time. Between the convolutions a map lies as rows, one per position.

use std::sync::Arc;

use backend_onnx::{Activation, Dim, Input, Session, SessionOptions, Value};
use checkpoint::Checkpoint;
use domain::LatentGrid;
use layers::{EngineError, FlowInput, FlowModel, Observer};
use serde::Deserialize;

use crate::onnx::Builder;
use crate::text_config::{Fields, TextConfig};

const ENCODER: &str = "vision_gen_enc_model";
const DECODER: &str = "vision_gen_dec_model";
/// Side of the depthwise convolutions.
const KERNEL: usize = 7;
/// Factor between the two linear layers of a block.
const WIDENING: usize = 4;
/// Added to the mean of the responses.
const RESPONSE_EPSILON: f32 = 1e-6;
/// The longest period of the time features is so many times the shortest.
const PERIODS: f64 = 10_000.0;
/// Factor by which the decoder enlarges the map.
const SHUFFLE: usize = 2;
/// Largest sizes that are believed.
const MOST_UNITS: usize = 1 << 16;
const MOST_LAYERS: usize = 1 << 8;

/// Both networks as the configuration describes them, every number in agreement with the others.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UVit {
    pub grid: LatentGrid,
    /// Sides of the map of positions.
    side: usize,
    /// Hidden size of the language model.
    hidden: usize,
    /// Epsilon of the norm between the language model and the decoder.
    hidden_epsilon: f32,
    /// Channels of the map of positions, behind the encoder.
    channels: usize,
    /// Channels that the language model's rows are brought to before the decoder.
    decoder_channels: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    encoder: Middle,
    decoder: Middle,
}

/// The blocks of a network.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Middle {
    layers: usize,
    epsilon: f32,
}

/// `params` of `vision_gen_enc_config`.
#[derive(Debug, Deserialize)]
struct EncoderParams {
    input_channels: usize,
    kernel_size: usize,
    stride: usize,
    #[serde(default)]
    padding: usize,
    #[serde(flatten)]
    common: Params,
}

/// `params` of `vision_gen_dec_config`.
#[derive(Debug, Deserialize)]
struct DecoderParams {
    in_channels: usize,
    out_channels: usize,
    upsamples: usize,
    #[serde(flatten)]
    common: Params,
}

#[derive(Debug, Deserialize)]
struct Params {
    block_out_channels: Vec<usize>,
    layers_in_middle: usize,
    hidden_size: usize,
    norm_eps: Option<f64>,
    use_bias: Option<bool>,
    use_mid_block: Option<bool>,
}

impl UVit {
    /// The networks of a checkpoint, which sees pictures as a map of `side * side` positions: a picture is drawn as the same map.
    pub fn read(checkpoint: &Checkpoint, text: &TextConfig, side: usize) -> Result<Self, EngineError> {
        let encoder: EncoderParams = checkpoint.config_as("/vision_gen_enc_config/params")?;
        let decoder: DecoderParams = checkpoint.config_as("/vision_gen_dec_config/params")?;
        let at = Fields { checkpoint, path: "vision_gen_enc_config/params" };
        let (channels, encoder_middle) = encoder.common.check(&at, text.hidden_size)?;
        if !channels.is_multiple_of(2) {
            return Err(at.refuse("block_out_channels", format!("{channels} channels cannot hold pairs of time features")));
        }
        let size = |field, size| at.size(field, Some(size), 0, MOST_UNITS);
        let (kernel, stride) = (size("kernel_size", encoder.kernel_size)?, size("stride", encoder.stride)?);
        let (latent_channels, padding) = (size("input_channels", encoder.input_channels)?, encoder.padding.min(MOST_UNITS));
        let latent_side = side * stride;
        let covered = (latent_side + 2 * padding).checked_sub(kernel).map(|rest| rest / stride + 1);
        if covered != Some(side) {
            let reason = format!("a map of {latent_side} x {latent_side} does not become {side} x {side} positions with stride {stride}");
            return Err(at.refuse("kernel_size", reason));
        }
        let at = Fields { checkpoint, path: "vision_gen_dec_config/params" };
        let (skip, decoder_middle) = decoder.common.check(&at, text.hidden_size)?;
        for (field, found, expected, why) in [
            ("block_out_channels", skip, channels, "the encoder's block_out_channels"),
            ("out_channels", decoder.out_channels, latent_channels, "the encoder's input_channels"),
            ("upsamples", decoder.upsamples, 1, "the only supported number"),
        ] {
            if found != expected {
                return Err(at.refuse(field, format!("{found}, but {why} is {expected}")));
            }
        }
        if stride != SHUFFLE {
            return Err(at.refuse("upsamples", format!("enlarges the map {SHUFFLE} times, but the encoder's stride is {stride}")));
        }
        Ok(Self {
            grid: LatentGrid { channels: latent_channels, rows: latent_side, columns: latent_side, positions: 1 + side * side },
            side,
            hidden: text.hidden_size,
            hidden_epsilon: text.rms_norm_eps,
            channels,
            decoder_channels: at.size("in_channels", Some(decoder.in_channels), 0, MOST_UNITS)?,
            kernel,
            stride,
            padding,
            encoder: encoder_middle,
            decoder: decoder_middle,
        })
    }

    /// Positions of the map.
    fn positions(&self) -> usize {
        self.side * self.side
    }

    /// `z [1, C, h, w]`, `features [1, channels]` -> `rows [1 + N, hidden]`, `skip [N, channels]`
    fn build_encoder<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Builder<'a>, EngineError> {
        let mut builder = Builder::new(checkpoint, false);
        let b = &mut builder;
        let LatentGrid { channels: latent, rows, columns, .. } = self.grid;
        let z = b.graph.input("z", &[1, latent, rows, columns].map(Dim::Fixed));
        let features = b.graph.input("features", &[1, self.channels].map(Dim::Fixed));
        // 1. the time
        let time = b.linear(&features, &format!("{ENCODER}.time_embed.linear_1"), [self.hidden, self.channels], true)?;
        let time = b.graph.activate(&time, Activation::Silu);
        let time = b.linear(&time, &format!("{ENCODER}.time_embed.linear_2"), [self.hidden, self.hidden], true)?; // [1, hidden]
        // 2. the map
        let weight = b.weight(&format!("{ENCODER}.in_conv.weight"), &[self.channels, latent, self.kernel, self.kernel])?;
        let bias = b.weight(&format!("{ENCODER}.in_conv.bias"), &[self.channels])?;
        let x = b.graph.conv(&z, &weight, Some(&bias), self.stride, self.padding); // [1, channels, side, side]
        let x = self.to_rows(b, &x, self.channels); // [N, channels]
        let x = self.middle(b, x, &time, ENCODER, self.channels, self.encoder)?;
        b.graph.output("skip", &x);
        // 3. rows for the language model, the time first
        let x = b.linear(&x, "vision_gen_enc_aligner", [self.hidden, self.channels], true)?; // [N, hidden]
        let x = b.graph.concat(&[&time, &x], 0); // [1 + N, hidden]
        b.graph.output("rows", &x);
        Ok(builder)
    }

    /// `states [N, hidden]`, `skip [N, channels]`, `time [1, hidden]` -> `velocity [1, C, h, w]`, and what the blocks got: `dec_input [N, D]`
    fn build_decoder<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Builder<'a>, EngineError> {
        let mut builder = Builder::new(checkpoint, false);
        let b = &mut builder;
        let (n, width) = (self.positions(), self.decoder_channels + self.channels);
        let states = b.graph.input("states", &[n, self.hidden].map(Dim::Fixed));
        let skip = b.graph.input("skip", &[n, self.channels].map(Dim::Fixed));
        let time = b.graph.input("time", &[1, self.hidden].map(Dim::Fixed));
        // 1. from the language model, beside what the encoder had
        let x = b.rms_norm(&states, "vision_gen_dec_aligner_norm", self.hidden, self.hidden_epsilon)?;
        let x = b.linear(&x, "vision_gen_dec_aligner", [self.decoder_channels, self.hidden], true)?; // [N, D]
        b.graph.output("dec_input", &x);
        let x = b.rms_norm(&x, &format!("{DECODER}.input_norm"), self.decoder_channels, self.decoder.epsilon)?;
        let x = b.graph.concat(&[&x, &skip], 1); // [N, D + channels]
        let x = self.middle(b, x, &time, DECODER, width, self.decoder)?;
        // 2. to a larger map of fewer channels
        let x = b.rms_norm(&x, &format!("{DECODER}.out_convs.0.norm"), width, self.decoder.epsilon)?;
        let x = self.to_map(b, &x, width); // [1, D + channels, side, side]
        let output = self.grid.channels * SHUFFLE * SHUFFLE;
        let x = b.conv(&x, &format!("{DECODER}.out_convs.0.unpatch_conv"), (output, width, 1), 1)?;
        let velocity = b.graph.pixel_shuffle(&x, SHUFFLE); // [1, C, h, w]
        b.graph.output("velocity", &velocity);
        Ok(builder)
    }

    /// `x [N, width]` -> the same shape, through the blocks of a network.
    fn middle(&self, b: &mut Builder<'_>, x: Value, time: &Value, root: &str, width: usize, middle: Middle) -> Result<Value, EngineError> {
        let time = b.graph.activate(time, Activation::Silu); // [1, hidden]
        let mut x = x;
        for layer in 0..middle.layers {
            x = self.block(b, &x, &time, &format!("{root}.mid_block.res_blocks.{layer}"), width, middle.epsilon)?;
        }
        Ok(x)
    }

    /// A ConvNeXt block with the time (spec: janusflow.md 1.2).
    fn block(&self, b: &mut Builder<'_>, x: &Value, time: &Value, root: &str, width: usize, epsilon: f32) -> Result<Value, EngineError> {
        let wide = WIDENING * width;
        // 1. positions
        let h = self.to_map(b, x, width); // [1, width, side, side]
        let h = b.depthwise(&h, &format!("{root}.depthwise"), width, KERNEL)?;
        let h = self.to_rows(b, &h, width); // [N, width]
        let h = b.rms_norm(&h, &format!("{root}.norm"), width, epsilon)?;
        // 2. channels
        let h = b.linear(&h, &format!("{root}.channelwise_linear_1"), [wide, width], true)?; // [N, wide]
        let h = b.graph.activate(&h, Activation::Gelu);
        let mut vector = |part: &str| -> Result<Value, EngineError> {
            let vector = b.weight(&format!("{root}.channelwise_norm.{part}"), &[1, 1, 1, wide])?;
            Ok(b.graph.reshape(&vector, &[1, wide as i64]))
        };
        let (weight, bias) = (vector("weight")?, vector("bias")?);
        let h = b.graph.response_norm(&h, &weight, &bias, RESPONSE_EPSILON);
        let h = b.linear(&h, &format!("{root}.channelwise_linear_2"), [width, wide], true)?; // [N, width]
        let x = b.graph.add(&h, x);
        // 3. the time
        let mapped = b.linear(time, &format!("{root}.cond_embeds_mapper"), [2 * width, self.hidden], true)?; // [1, 2 * width]
        let [scale, shift] = b.graph.halves(&mapped);
        let one = b.graph.floats(&[], &[1.0]);
        let scale = b.graph.add(&scale, &one);
        let scaled = b.graph.mul(&x, &scale);
        Ok(b.graph.add(&scaled, &shift))
    }

    /// `[1, width, side, side]` -> `[N, width]`
    fn to_rows(&self, b: &mut Builder<'_>, map: &Value, width: usize) -> Value {
        let x = b.graph.transpose(map, &[0, 2, 3, 1]);
        b.graph.reshape(&x, &[-1, width as i64])
    }

    /// `[N, width]` -> `[1, width, side, side]`
    fn to_map(&self, b: &mut Builder<'_>, rows: &Value, width: usize) -> Value {
        let x = b.graph.reshape(rows, &[1, self.side as i64, self.side as i64, width as i64]);
        b.graph.transpose(&x, &[0, 3, 1, 2])
    }

    /// What the network is told of a time: cosines, then sines, of the time at periods that grow from one to [`PERIODS`].
    ///
    /// As in the reference the angle is rounded to f32; its cosine and sine are computed in f64, so nothing is added to that.
    fn time_features(&self, time: f32) -> Vec<f32> {
        let half = self.channels / 2;
        let frequency = |k: usize| (-PERIODS.ln() * k as f64 / half as f64).exp() as f32;
        let angles = (0..half).map(|k| f64::from(time * frequency(k)));
        angles.clone().map(f64::cos).chain(angles.map(f64::sin)).map(|value| value as f32).collect()
    }
}

impl Params {
    /// Channels of the only level, and the blocks.
    fn check(&self, at: &Fields<'_>, hidden: usize) -> Result<(usize, Middle), EngineError> {
        for (field, value) in [("use_bias", self.use_bias), ("use_mid_block", self.use_mid_block)] {
            if value == Some(false) {
                return Err(at.refuse(field, "false is not supported"));
            }
        }
        if self.hidden_size != hidden {
            return Err(at.refuse("hidden_size", format!("{}, but the language model's is {hidden}", self.hidden_size)));
        }
        let &[channels] = self.block_out_channels.as_slice() else {
            return Err(at.refuse("block_out_channels", format!("{} levels, only one is supported", self.block_out_channels.len())));
        };
        let epsilon = self.norm_eps.unwrap_or(1e-6);
        if !(epsilon > 0.0 && epsilon.is_finite()) {
            return Err(at.refuse("norm_eps", format!("{epsilon} is not a positive number")));
        }
        let layers = at.size("layers_in_middle", Some(self.layers_in_middle), 0, MOST_LAYERS)?;
        let channels = at.size("block_out_channels", Some(channels), 0, MOST_UNITS)?;
        Ok((channels, Middle { layers, epsilon: epsilon as f32 }))
    }
}

/// Both networks, ready to run.
#[derive(Debug)]
pub(crate) struct FlowNetworks {
    model: UVit,
    encoder: Session,
    decoder: Session,
}

impl FlowNetworks {
    pub fn load(checkpoint: &Checkpoint, model: UVit, options: &SessionOptions) -> Result<Self, EngineError> {
        let encoder = Session::new(model.build_encoder(checkpoint)?.graph, options)?;
        let decoder = Session::new(model.build_decoder(checkpoint)?.graph, options)?;
        Ok(Self { model, encoder, decoder })
    }

    /// Rows `[N, width]` as the map `[width, side, side]` that reference outputs have.
    fn map(&self, rows: &[f32]) -> Vec<f32> {
        let (n, width) = (self.model.positions(), rows.len() / self.model.positions());
        (0..rows.len()).map(|at| rows[at % n * width + at / n]).collect()
    }
}

impl FlowModel for FlowNetworks {
    fn encode(&self, z: &[f32], time: f32, observer: &mut dyn Observer) -> Result<FlowInput, EngineError> {
        let UVit { grid, channels, hidden, .. } = self.model;
        if z.len() != grid.len() {
            return Err(EngineError::Step(format!("{} latent values, the map has {}", z.len(), grid.len())));
        }
        let features = self.model.time_features(time);
        let z = Input::Floats { shape: &[1, grid.channels, grid.rows, grid.columns], values: z };
        let [skip, rows] = run(&self.encoder, "flow encoder", &[z, Input::Floats { shape: &[1, channels], values: &features }])?;
        if observer.active() {
            observer.tensor("z_enc", &self.map(&skip), self.model.side);
            observer.tensor("t_emb", &rows[..hidden], hidden);
            observer.tensor("z_aligned", &rows[hidden..], hidden);
        }
        Ok(FlowInput { rows: Arc::from(rows), skip })
    }

    fn decode(&self, states: &[f32], input: &FlowInput, observer: &mut dyn Observer) -> Result<Vec<f32>, EngineError> {
        let UVit { channels, hidden, .. } = self.model;
        let n = self.model.positions();
        if states.len() != n * hidden || input.rows.len() != (n + 1) * hidden || input.skip.len() != n * channels {
            return Err(EngineError::Step(format!("{} hidden values, the map has {n} rows of {hidden}", states.len())));
        }
        let inputs = [
            Input::Floats { shape: &[n, hidden], values: states },
            Input::Floats { shape: &[n, channels], values: &input.skip },
            Input::Floats { shape: &[1, hidden], values: &input.rows[..hidden] },
        ];
        let [dec_input, velocity] = run(&self.decoder, "flow decoder", &inputs)?;
        if observer.active() {
            observer.tensor("dec_input", &self.map(&dec_input), self.model.side);
        }
        Ok(velocity)
    }
}

/// Runs a graph of two outputs.
fn run(session: &Session, what: &str, inputs: &[Input<'_>]) -> Result<[Vec<f32>; 2], EngineError> {
    let outputs: Vec<_> = session.run(inputs)?.into_iter().map(|output| output.values).collect();
    let outputs: [Vec<f32>; 2] = outputs.try_into().map_err(|_| EngineError::Compute(format!("the {what} has lost an output")))?;
    match outputs.iter().flatten().all(|value| value.is_finite()) {
        true => Ok(outputs),
        false => Err(EngineError::Compute(format!("NaN or infinity in the output of the {what}"))),
    }
}
