//! Layers. Shapes in comments: B images, C channels, H x W positions, N rows, D values a row.

use crate::graph::{Graph, Value, float, int, ints, text};

/// Activation functions of the models here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// With the error function, not the tanh approximation.
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// `x * sigmoid(x)`, also called swish.
    Silu,
}

impl Graph {
    /// `x [N, in] * weight [out, in]^T + bias [out]` -> `[N, out]`: weights as checkpoints store them.
    pub fn linear(&mut self, x: &Value, weight: &Value, bias: Option<&Value>) -> Value {
        let inputs: Vec<&Value> = [Some(x), Some(weight), bias].into_iter().flatten().collect();
        self.node("Gemm", &inputs, vec![int("transB", 1)])
    }

    /// Convolution of `x [B, C, H, W]` with `weight [out, C, k, k]`, the same padding on all sides.
    pub fn conv(&mut self, x: &Value, weight: &Value, bias: Option<&Value>, stride: usize, padding: usize) -> Value {
        let inputs: Vec<&Value> = [Some(x), Some(weight), bias].into_iter().flatten().collect();
        self.node("Conv", &inputs, vec![ints("strides", &[stride; 2]), ints("pads", &[padding; 4])])
    }

    /// Convolution of every channel of `x [B, C, H, W]` by itself with `weight [C, 1, k, k]`, the same padding on all sides.
    pub fn depthwise(&mut self, x: &Value, weight: &Value, bias: &Value, channels: usize, padding: usize) -> Value {
        self.node("Conv", &[x, weight, bias], vec![int("group", channels as i64), ints("pads", &[padding; 4])])
    }

    /// Divides the last dimension by its root mean square; then scale.
    pub fn rms_norm(&mut self, x: &Value, weight: &Value, epsilon: f32) -> Value {
        self.node("RMSNormalization", &[x, weight], vec![int("axis", -1), float("epsilon", epsilon)])
    }

    /// Weighs every value of the rows `x [N, D]` of one image by how strong its dimension is over all rows, beside the other dimensions:
    /// `bias + (weight * n + 1) * x`, where `n` is the dimension's Euclidean length over the mean of all (global response normalisation).
    pub fn response_norm(&mut self, x: &Value, weight: &Value, bias: &Value, epsilon: f32) -> Value {
        let (positions, dimensions) = (self.ints(&[0]), self.ints(&[1]));
        let length = self.node("ReduceL2", &[x, &positions], vec![int("keepdims", 1)]); // [1, D]
        let mean = self.node("ReduceMean", &[&length, &dimensions], vec![int("keepdims", 1)]); // [1, 1]
        let (least, one) = (self.floats(&[], &[epsilon]), self.floats(&[], &[1.0]));
        let mean = self.add(&mean, &least);
        let share = self.node("Div", &[&length, &mean], Vec::new());
        let factor = self.mul(weight, &share);
        let factor = self.add(&factor, &one);
        let scaled = self.mul(x, &factor);
        self.add(bias, &scaled)
    }

    /// Normalises the last dimension.
    pub fn layer_norm(&mut self, x: &Value, weight: &Value, bias: &Value, epsilon: f32) -> Value {
        self.node("LayerNormalization", &[x, weight, bias], vec![int("axis", -1), float("epsilon", epsilon)])
    }

    /// Normalises `groups` equal ranges of channels of `x [B, C, H, W]`, each over its channels and positions; then scale and shift per channel.
    ///
    /// Made of InstanceNormalization on `[B, groups, C / groups * H * W]`, for which the runtime has a kernel.
    pub fn group_norm(&mut self, x: &Value, weight: &Value, bias: &Value, (channels, groups): (usize, usize), epsilon: f32) -> Value {
        let shape = self.node("Shape", &[x], Vec::new());
        let grouped = self.ints(&[0, groups as i64, -1]);
        let grouped = self.node("Reshape", &[x, &grouped], Vec::new()); // [B, groups, C / groups * H * W]
        let (one, zero) = (self.floats(&[groups], &vec![1.0; groups]), self.floats(&[groups], &vec![0.0; groups]));
        let normal = self.node("InstanceNormalization", &[&grouped, &one, &zero], vec![float("epsilon", epsilon)]);
        let normal = self.node("Reshape", &[&normal, &shape], Vec::new()); // [B, C, H, W]
        let (weight, bias) = (self.reshape(weight, &[channels as i64, 1, 1]), self.reshape(bias, &[channels as i64, 1, 1]));
        let scaled = self.mul(&normal, &weight);
        self.add(&scaled, &bias)
    }

    /// Elementwise, any shape.
    pub fn activate(&mut self, x: &Value, activation: Activation) -> Value {
        match activation {
            Activation::Gelu => self.node("Gelu", &[x], vec![text("approximate", "none")]),
            Activation::GeluTanh => self.node("Gelu", &[x], vec![text("approximate", "tanh")]),
            Activation::Silu => {
                let gate = self.node("Sigmoid", &[x], Vec::new());
                self.mul(x, &gate)
            }
        }
    }

    /// Full bidirectional attention of `[B, N, heads * d]` queries, keys and values, scale `1 / sqrt(d)` -> `[B, N, heads * d]`.
    ///
    /// The runtime's own operator goes over the keys in blocks that stay in the processor's cache. ONNX's, and the products that other
    /// exporters write, make all `N * N` weights of a head first.
    pub fn attention(&mut self, q: &Value, k: &Value, v: &Value, heads: usize) -> Value {
        self.runtime_node("MultiHeadAttention", &[q, k, v], vec![int("num_heads", heads as i64)])
    }

    /// Full bidirectional attention with a scale of its own: `[B, N, heads * d]` queries and keys, `[B, N, heads * e]` values
    /// -> `[B, N, heads * e]`.
    ///
    /// The runtime's own operator: it goes over the keys in blocks, so that the `N * N` weights of a head are never there at once.
    pub fn attention_in_blocks(&mut self, q: &Value, k: &Value, v: &Value, heads: usize, scale: f32) -> Value {
        self.runtime_node("MultiHeadAttention", &[q, k, v], vec![int("num_heads", heads as i64), float("scale", scale)])
    }

    /// Products of the matrices in the last two dimensions, `[.., M, K] * [.., K, N]` -> `[.., M, N]`; those before them broadcast.
    pub fn mat_mul(&mut self, a: &Value, b: &Value) -> Value {
        self.node("MatMul", &[a, b], Vec::new())
    }

    /// Sum, with the usual broadcasting.
    pub fn add(&mut self, a: &Value, b: &Value) -> Value {
        self.node("Add", &[a, b], Vec::new())
    }

    /// Product, with the usual broadcasting.
    pub fn mul(&mut self, a: &Value, b: &Value) -> Value {
        self.node("Mul", &[a, b], Vec::new())
    }

    /// The same values in another shape: 0 keeps a dimension, -1 is what remains.
    pub fn reshape(&mut self, x: &Value, shape: &[i64]) -> Value {
        let shape = self.ints(shape);
        self.node("Reshape", &[x, &shape], Vec::new())
    }

    /// Dimensions in another order.
    pub fn transpose(&mut self, x: &Value, order: &[usize]) -> Value {
        self.node("Transpose", &[x], vec![ints("perm", order)])
    }

    /// One behind the other along dimension `axis` (-1: the last); the other dimensions are equal.
    pub fn concat(&mut self, parts: &[&Value], axis: i64) -> Value {
        self.node("Concat", parts, vec![int("axis", axis)])
    }

    /// `x [1, ..]` once for every image of `like [B, ..]`, broadcast to `shape` -> `[B, shape..]`.
    pub fn for_each_image(&mut self, x: &Value, like: &Value, shape: &[i64]) -> Value {
        let images = self.node("Shape", &[like], vec![int("start", 0), int("end", 1)]);
        let shape = self.ints(shape);
        let shape = self.concat(&[&images, &shape], 0);
        self.node("Expand", &[x, &shape], Vec::new())
    }

    /// Zeros below and to the right of `[B, H, W, C]`.
    pub fn pad_end(&mut self, x: &Value, below: usize, right: usize) -> Value {
        let pads = self.ints(&[0, 0, 0, 0, 0, below as i64, right as i64, 0]);
        self.node("Pad", &[x, &pads], Vec::new())
    }

    /// The upper left `height` x `width` positions of `[B, H, W, C]`.
    pub fn crop(&mut self, x: &Value, height: usize, width: usize) -> Value {
        let (start, end, axes) = (self.ints(&[0, 0]), self.ints(&[height as i64, width as i64]), self.ints(&[1, 2]));
        self.node("Slice", &[x, &start, &end, &axes], Vec::new())
    }

    /// Cuts the last dimension into three equal parts.
    pub fn thirds(&mut self, x: &Value) -> [Value; 3] {
        self.nodes("Split", &[x], vec![int("axis", -1), int("num_outputs", 3)])
    }

    /// Cuts the last dimension into two equal parts.
    pub fn halves(&mut self, x: &Value) -> [Value; 2] {
        self.nodes("Split", &[x], vec![int("axis", -1), int("num_outputs", 2)])
    }

    /// Puts `row [1, D]` before the rows of each image: `[B, N, D]` -> `[B, 1 + N, D]`.
    pub fn prepend(&mut self, row: &Value, x: &Value, width: usize) -> Value {
        let rows = self.for_each_image(row, x, &[1, width as i64]); // [B, 1, D]
        self.concat(&[&rows, x], 1)
    }

    /// Rows `ids [..]` of `table [N, D]` -> `[.., D]`. The runtime refuses an id outside the table.
    pub fn rows(&mut self, table: &Value, ids: &Value) -> Value {
        self.node("Gather", &[table, ids], vec![int("axis", 0)])
    }

    /// The first row of each image: `[B, N, D]` -> `[B, D]`.
    pub fn first_row(&mut self, x: &Value) -> Value {
        let (start, end, axis) = (self.ints(&[0]), self.ints(&[1]), self.ints(&[1]));
        let row = self.node("Slice", &[x, &start, &end, &axis], Vec::new()); // [B, 1, D]
        self.node("Squeeze", &[&row, &axis], Vec::new())
    }

    /// Divides the last dimension by its Euclidean length, which counts as at least 1e-12.
    pub fn unit_length(&mut self, x: &Value) -> Value {
        let axis = self.ints(&[-1]);
        let length = self.node("ReduceL2", &[x, &axis], vec![int("keepdims", 1)]);
        let least = self.floats(&[], &[1e-12]);
        let length = self.node("Max", &[&length, &least], Vec::new());
        self.node("Div", &[x, &length], Vec::new())
    }

    /// Spreads channels over the map: `[B, C * side * side, H, W]` -> `[B, C, H * side, W * side]`, the `side * side` neighbouring channels row
    /// by row.
    pub fn pixel_shuffle(&mut self, x: &Value, side: usize) -> Value {
        self.node("DepthToSpace", &[x], vec![int("blocksize", side as i64), text("mode", "CRD")])
    }

    /// Doubles height and width of `x [B, in, H, W]` by repeating values, then a convolution with `weight [out, in, 3, 3]` and a border of
    /// one zero: `[B, out, 2 H, 2 W]`.
    ///
    /// Neighbours in the doubled map are mostly the same value. So each of the four kinds of positions (even or odd, down and across) is a
    /// convolution of the small map with 2 x 2 sums of the weights: 16 products for a small position instead of 36. The sums are made once,
    /// when the graph is loaded.
    pub fn upsample_conv(&mut self, x: &Value, weight: &Value, bias: &Value) -> Value {
        // Rows of the 2 x 2 kernel from rows of the 3 x 3 one, at even positions and at odd ones.
        let sums: [[f32; 6]; 2] = [[1.0, 0.0, 0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]]; // [2, 3] each
        let [even, odd] = sums.map(|sum| self.floats(&[2, 3], &sum));
        let across = [&even, &odd].map(|sum| self.transpose(sum, &[1, 0])); // [3, 2]
        let mut kinds = Vec::with_capacity(4);
        for (y, down) in [&even, &odd].into_iter().enumerate() {
            let rows = self.node("MatMul", &[down, weight], Vec::new()); // [out, in, 2, 3]
            for (x_, across) in across.iter().enumerate() {
                let kernel = self.node("MatMul", &[&rows, across], Vec::new()); // [out, in, 2, 2]
                let border = ints("pads", &[1 - y, 1 - x_, y, x_]);
                kinds.push(self.node("Conv", &[x, &kernel, bias], vec![border])); // [B, out, H, W]
            }
        }
        let kinds = self.node("Concat", &kinds.iter().collect::<Vec<_>>(), vec![int("axis", 1)]); // [B, 4 out, H, W]
        self.node("DepthToSpace", &[&kinds], vec![int("blocksize", 2), text("mode", "DCR")])
    }

    /// Scales `[B, C, H, W]` to squares of `side` x `side`, linearly between the centres of pixels. With `antialias`, shrinking takes every
    /// pixel into account; without, only the nearest two of a row or column.
    pub fn resize_linear(&mut self, x: &Value, side: usize, antialias: bool) -> Value {
        let (region, scales, sizes) = (Value::none(), Value::none(), self.ints(&[side as i64; 2]));
        let mut attributes = vec![text("mode", "linear"), text("coordinate_transformation_mode", "half_pixel"), ints("axes", &[2, 3])];
        if antialias {
            // What lies outside the picture has no weight, and the rest has all of it.
            attributes.extend([int("antialias", 1), int("exclude_outside", 1)]);
        }
        self.node("Resize", &[x, &region, &scales, &sizes], attributes)
    }
}
