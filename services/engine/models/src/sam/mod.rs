//! SAM-B as DeepSeek-VL uses it: window and global attention with relative positions, two necks, two convolutions that lead to the grid of
//! the low-resolution tower (spec: vision.md 3).
//!
//! | File | Holds |
//! |---|---|
//! | `mod.rs` | the graph |
//! | `config.rs` | sizes and names |
//!
//! Shapes in comments: B pictures, g x g patches, S x S positions that attend to each other (a window, or the whole map), C channels.

mod config;

use backend_onnx::Value;
use layers::EngineError;

use crate::onnx::{Builder, CHANNELS};

use config::Names;
pub(crate) use config::Sam;

/// Of the necks' norms, whatever the configuration says about the others.
const NECK_EPSILON: f32 = 1e-6;
/// The two convolutions behind the necks halve the map twice.
const SHRINKING: usize = 4;

/// Positions that attend to each other.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Region {
    /// S: sides, patches.
    side: usize,
    /// How many of them lie side by side in a map.
    across: usize,
}

impl Sam {
    /// `pixels [B, 3, S, S]` -> tokens `[B * side * side, width]`, row by row. Probes: `sam.*`.
    pub fn build(&self, builder: &mut Builder<'_>, pixels: &Value, side: usize) -> Result<Value, EngineError> {
        let mut x = self.embed(builder, pixels)?; // [B * g * g, hidden]
        self.tap(builder, "sam.hidden.embed", &x);
        let mut places = Vec::new(); // one for each kind of region
        let mut source = None; // of the second neck
        for layer in 0..self.layers {
            x = self.block(builder, &x, layer, &mut places)?;
            self.tap(builder, &format!("sam.hidden.layer{layer}"), &x);
            if layer == self.second_source {
                source = Some(x.clone());
            }
        }
        let last = self.neck(builder, &x, self.names.neck())?; // [B, C, g, g]
        builder.tap("sam.neck", &last);
        let mut mixed = self.downsample(builder, &last, side)?; // [B, width, side, side]
        if let Some(source) = source {
            let second = self.neck(builder, &source, self.names.second_neck())?;
            let second = self.downsample(builder, &second, side)?;
            let alpha = builder.weight(self.names.alpha(), &[1])?;
            let second = builder.graph.mul(&second, &alpha);
            mixed = builder.graph.add(&mixed, &second);
        }
        let tokens = builder.graph.transpose(&mixed, &[0, 2, 3, 1]); // [B, side, side, width]
        let (positions, width) = ((side * side) as i64, self.width() as i64);
        let images = builder.graph.reshape(&tokens, &[-1, positions, width]);
        builder.tap("sam.high_res_features", &images);
        Ok(builder.graph.reshape(&images, &[-1, width]))
    }

    /// 1. patches; 2. a learned position is added to each.
    fn embed(&self, builder: &mut Builder<'_>, pixels: &Value) -> Result<Value, EngineError> {
        let (hidden, grid) = (self.hidden_size, self.grid());
        let pixels = builder.normalize(pixels, self.normalization.as_ref());
        let name = self.names.of("patch_embed.projection", "patch_embed.proj");
        let patches = builder.conv(&pixels, &name, (hidden, CHANNELS, self.patch_size), self.patch_size)?; // [B, hidden, g, g]
        let patches = builder.graph.transpose(&patches, &[0, 2, 3, 1]); // [B, g, g, hidden]
        let positions = builder.weight(&self.names.of("pos_embed", "pos_embed"), &[1, grid, grid, hidden])?;
        let x = builder.graph.add(&patches, &positions);
        Ok(builder.graph.reshape(&x, &[-1, hidden as i64]))
    }

    /// `x [B * g * g, hidden]` -> the same shape.
    fn block(&self, builder: &mut Builder<'_>, x: &Value, layer: usize, places: &mut Vec<(Region, Value)>) -> Result<Value, EngineError> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let root = self.names.of(&format!("layers.{layer}."), &format!("blocks.{layer}."));
        let norm = match self.names {
            Names::Port => "layer_norm",
            Names::Original => "norm",
        };
        let region = self.region(layer);
        // 1. x += attention(norm1(x)), windows cut after the norm: their padding is zeros
        let h = builder.layer_norm(x, &format!("{root}{norm}1"), hidden, self.epsilon)?;
        let h = self.cut(builder, &h, region); // [B * regions * S * S, hidden]
        let h = self.attention(builder, &h, &format!("{root}attn."), region, places)?;
        let h = self.join(builder, &h, region); // [B * g * g, hidden]
        let x = builder.graph.add(x, &h);
        // 2. x += mlp(norm2(x))
        let h = builder.layer_norm(&x, &format!("{root}{norm}2"), hidden, self.epsilon)?;
        let h = builder.linear(&h, &format!("{root}mlp.lin1"), [inner, hidden], true)?; // [B * g * g, inner]
        let h = builder.graph.activate(&h, self.activation);
        let h = builder.linear(&h, &format!("{root}mlp.lin2"), [hidden, inner], true)?;
        Ok(builder.graph.add(&x, &h))
    }

    /// What attends to each other in a layer. The last windows of a row or column may stick out of the map.
    fn region(&self, layer: usize) -> Region {
        match self.global.contains(&layer) {
            true => Region { side: self.grid(), across: 1 },
            false => Region { side: self.window, across: self.grid().div_ceil(self.window) },
        }
    }

    /// `x [B * g * g, hidden]` -> `[B * regions * S * S, hidden]`.
    fn cut(&self, builder: &mut Builder<'_>, x: &Value, Region { side, across }: Region) -> Value {
        let (grid, hidden) = (self.grid() as i64, self.hidden_size as i64);
        if across == 1 && side == self.grid() {
            return x.clone();
        }
        let missing = side * across - self.grid();
        let map = builder.graph.reshape(x, &[-1, grid, grid, hidden]);
        let map = builder.graph.pad_end(&map, missing, missing); // [B, across * S, across * S, hidden]
        let (side, across) = (side as i64, across as i64);
        let map = builder.graph.reshape(&map, &[-1, across, side, across, side, hidden]);
        let windows = builder.graph.transpose(&map, &[0, 1, 3, 2, 4, 5]); // [B, across, across, S, S, hidden]
        builder.graph.reshape(&windows, &[-1, hidden])
    }

    /// The way back.
    fn join(&self, builder: &mut Builder<'_>, x: &Value, Region { side, across }: Region) -> Value {
        let (grid, hidden) = (self.grid(), self.hidden_size as i64);
        if across == 1 && side == grid {
            return x.clone();
        }
        let whole = (side * across) as i64;
        let (side, across) = (side as i64, across as i64);
        let windows = builder.graph.reshape(x, &[-1, across, across, side, side, hidden]);
        let map = builder.graph.transpose(&windows, &[0, 1, 3, 2, 4, 5]); // [B, across, S, across, S, hidden]
        let map = builder.graph.reshape(&map, &[-1, whole, whole, hidden]);
        let map = builder.graph.crop(&map, grid, grid);
        builder.graph.reshape(&map, &[-1, hidden])
    }

    /// `x [R * S * S, hidden]` -> the same shape, for R regions.
    ///
    /// The bias of query (h, w) and key (h', w') is `q . Rh[h - h' + S - 1] + q . Rw[w - w' + S - 1]`. For S = 64 that is 4096 x 4096
    /// numbers a head. They are never written down: a query carries its products with all `Rh` and `Rw` as 2 S further values, a key has
    /// ones there at h' and w', and so the product of both holds the bias.
    fn attention(
        &self,
        builder: &mut Builder<'_>,
        x: &Value,
        root: &str,
        region: Region,
        places: &mut Vec<(Region, Value)>,
    ) -> Result<Value, EngineError> {
        let (hidden, side, heads) = (self.hidden_size, region.side as i64, self.heads as i64);
        let size = hidden as i64 / heads; // of a head
        let positions = side * side;
        let fused = builder.linear(x, &format!("{root}qkv"), [3 * hidden, hidden], self.attention_bias)?; // [R * S * S, 3 * hidden]
        let [q, k, v] = builder.graph.thirds(&fused);
        let places = self.places(builder, x, region, places); // [R, S * S, heads, 2 * S]
        let down = self.relative(builder, &q, &format!("{root}rel_pos_h"), region, Axis::Down)?; // [R, S * S, heads, S]
        let right = self.relative(builder, &q, &format!("{root}rel_pos_w"), region, Axis::Right)?;

        let scale = builder.graph.floats(&[], &[1.0 / (size as f32).sqrt()]);
        let q = builder.graph.mul(&q, &scale);
        let [q, k] = [q, k].map(|x| builder.graph.reshape(&x, &[-1, positions, heads, size]));
        let q = builder.graph.concat(&[&q, &down, &right]); // [R, S * S, heads, size + 2 * S]
        let k = builder.graph.concat(&[&k, &places]);
        let [q, k] = [q, k].map(|x| builder.graph.reshape(&x, &[-1, positions, heads * (size + 2 * side)]));
        let v = builder.graph.reshape(&v, &[-1, positions, hidden as i64]);
        let h = builder.graph.attention_in_blocks(&q, &k, &v, self.heads, 1.0); // [R, S * S, hidden]
        let h = builder.graph.reshape(&h, &[-1, hidden as i64]);
        builder.linear(&h, &format!("{root}proj"), [hidden, hidden], true)
    }

    /// Products of every query with the vectors that belong to the S distances along an axis: `q [R * S * S, hidden]` -> `[R, S * S, heads, S]`.
    fn relative(&self, builder: &mut Builder<'_>, q: &Value, name: &str, region: Region, axis: Axis) -> Result<Value, EngineError> {
        let (side, heads) = (region.side as i64, self.heads as i64);
        let size = self.hidden_size as i64 / heads;
        let table = builder.weight(name, &[2 * region.side - 1, size as usize])?;
        let distances: Vec<i64> = (0..side).flat_map(|from| (0..side).map(move |to| from - to + side - 1)).collect();
        let distances = builder.graph.ints(&distances);
        let vectors = builder.graph.rows(&table, &distances); // [S * S, size]
        let vectors = builder.graph.reshape(&vectors, &[side, side, size]);
        let vectors = builder.graph.transpose(&vectors, &[0, 2, 1]); // [S from, size, S to]
        // Queries by their place on the axis, so that one matrix serves all that share it.
        let q = builder.graph.reshape(q, &[-1, side, side, heads, size]);
        let q = axis.first(builder, &q);
        let q = builder.graph.reshape(&q, &[-1, side, side * heads, size]);
        let products = builder.graph.mat_mul(&q, &vectors); // [R, S from, S * heads, S to]
        let products = builder.graph.reshape(&products, &[-1, side, side, heads, side]);
        let products = axis.first(builder, &products);
        Ok(builder.graph.reshape(&products, &[-1, side * side, heads, side]))
    }

    /// For every key a one at its row and a one at its column: `[R, S * S, heads, 2 * S]`. `x [R * S * S, hidden]` tells R.
    fn places(&self, builder: &mut Builder<'_>, x: &Value, region: Region, known: &mut Vec<(Region, Value)>) -> Value {
        if let Some((_, places)) = known.iter().find(|(other, _)| *other == region) {
            return places.clone();
        }
        let side = region.side;
        let mut ones = vec![0.0; side * side * 2 * side]; // [S * S, 2 * S]
        for (position, row) in ones.chunks_exact_mut(2 * side).enumerate() {
            row[position / side] = 1.0;
            row[side + position % side] = 1.0;
        }
        let one = builder.graph.floats(&[1, side * side, 1, 2 * side], &ones);
        let regions = builder.graph.reshape(x, &[-1, (side * side) as i64, self.hidden_size as i64]); // [R, S * S, hidden]
        let shape = [side * side, self.heads, 2 * side].map(|size| size as i64);
        let places = builder.graph.for_each_image(&one, &regions, &shape);
        known.push((region, places.clone()));
        places
    }

    /// Conv 1 x 1, norm over the channels, conv 3 x 3, norm: `x [B * g * g, hidden]` -> `[B, C, g, g]`.
    fn neck(&self, builder: &mut Builder<'_>, x: &Value, names: [String; 4]) -> Result<Value, EngineError> {
        let (grid, channels) = (self.grid() as i64, self.neck_channels);
        let [conv1, norm1, conv2, norm2] = names;
        let map = builder.graph.reshape(x, &[-1, grid, grid, self.hidden_size as i64]);
        let map = builder.graph.transpose(&map, &[0, 3, 1, 2]); // [B, hidden, g, g]
        let map = builder.plain_conv(&map, &conv1, (channels, self.hidden_size, 1), 1)?; // [B, C, g, g]
        let map = channel_norm(builder, &map, &norm1, channels)?;
        let map = builder.plain_conv(&map, &conv2, (channels, channels, 3), 1)?;
        channel_norm(builder, &map, &norm2, channels)
    }

    /// `map [B, C, g, g]` -> `[B, width, side, side]`.
    fn downsample(&self, builder: &mut Builder<'_>, map: &Value, side: usize) -> Result<Value, EngineError> {
        let [first, second] = self.downsample_channels;
        let [conv1, conv2] = self.names.downsamples();
        let map = builder.graph.resize_linear(map, SHRINKING * side, false); // [B, C, 4 * side, 4 * side]
        let map = builder.plain_conv(&map, conv1, (first, self.neck_channels, 3), 2)?; // [B, first, 2 * side, 2 * side]
        builder.plain_conv(&map, conv2, (second, first, 3), 2)
    }

    fn tap(&self, builder: &mut Builder<'_>, name: &str, rows: &Value) {
        if builder.probing() {
            let grid = self.grid() as i64;
            let map = builder.graph.reshape(rows, &[-1, grid, grid, self.hidden_size as i64]);
            builder.tap(name, &map);
        }
    }
}

/// Which way distances are measured.
#[derive(Debug, Clone, Copy)]
enum Axis {
    Down,
    Right,
}

impl Axis {
    /// `[R, S, S, heads, n]` with the axis in front of the other one; a second time brings back the order.
    fn first(self, builder: &mut Builder<'_>, x: &Value) -> Value {
        match self {
            Self::Down => x.clone(),
            Self::Right => builder.graph.transpose(x, &[0, 2, 1, 3, 4]),
        }
    }
}

/// LayerNorm over the channels of `[B, C, H, W]`.
fn channel_norm(builder: &mut Builder<'_>, map: &Value, name: &str, channels: usize) -> Result<Value, EngineError> {
    let rows = builder.graph.transpose(map, &[0, 2, 3, 1]); // [B, H, W, C]
    let rows = builder.layer_norm(&rows, name, channels, NECK_EPSILON)?;
    Ok(builder.graph.transpose(&rows, &[0, 3, 1, 2]))
}
