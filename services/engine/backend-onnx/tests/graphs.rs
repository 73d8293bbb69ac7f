//! Small graphs against sums written out by hand, and weights in every kind of file.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use backend_onnx::{Activation, Dim, Graph, Input, Output, Session, SessionOptions, Value};
use checkpoint::Checkpoint;
use layers::EngineError;
use safetensors::tensor::{Dtype, TensorView};

const OPTIONS: SessionOptions = SessionOptions { threads: 2 };

/// Numbers without a pattern, in -1..1.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// One graph of floats: inputs by shape, the outputs that `build` returns.
fn evaluate(inputs: &[(&[usize], &[f32])], build: impl FnOnce(&mut Graph, &[Value]) -> Vec<Value>) -> Vec<Output> {
    let mut graph = Graph::new();
    let values: Vec<Value> = inputs
        .iter()
        .enumerate()
        .map(|(index, (shape, _))| graph.input(&format!("in{index}"), &shape.iter().map(|&size| Dim::Fixed(size)).collect::<Vec<_>>()))
        .collect();
    for (index, value) in build(&mut graph, &values).iter().enumerate() {
        graph.output(&format!("out{index}"), value);
    }
    let session = Session::new(graph, &OPTIONS).unwrap();
    session.run(&inputs.iter().map(|(shape, values)| Input::Floats { shape, values }).collect::<Vec<_>>()).unwrap()
}

fn assert_close(output: &Output, shape: &[usize], expected: &[f32]) {
    assert_eq!(output.shape, shape);
    assert_eq!(output.values.len(), expected.len());
    let worst = output.values.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-5, "{}: off by {worst}", output.name);
}

#[test]
fn linear_takes_weights_as_stored() {
    let (x, w, b) = (numbers(3 * 5, 1), numbers(4 * 5, 2), numbers(4, 3));
    let out = evaluate(&[(&[3, 5], &x), (&[4, 5], &w), (&[4], &b)], |g, v| {
        vec![g.linear(&v[0], &v[1], Some(&v[2])), g.linear(&v[0], &v[1], None)]
    });
    let product = |n: usize, o: usize| (0..5).map(|i| x[n * 5 + i] * w[o * 5 + i]).sum::<f32>();
    let plain: Vec<f32> = (0..12).map(|i| product(i / 4, i % 4)).collect();
    assert_close(&out[0], &[3, 4], &(0..12).map(|i| plain[i] + b[i % 4]).collect::<Vec<_>>());
    assert_close(&out[1], &[3, 4], &plain);
}

#[test]
fn norms_take_the_right_ranges() {
    let (x, w, b) = (numbers(2 * 6 * 2 * 3, 4), numbers(6, 5), numbers(6, 6));
    let normal = |values: &[f32], epsilon: f32| {
        let n = values.len() as f32;
        let mean = values.iter().sum::<f32>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
        values.iter().map(|v| (v - mean) / (variance + epsilon).sqrt()).collect::<Vec<_>>()
    };
    let out = evaluate(&[(&[2, 6, 2, 3], &x), (&[6], &w), (&[6], &b)], |g, v| vec![g.group_norm(&v[0], &v[1], &v[2], (6, 3), 1e-3)]);
    let expected: Vec<f32> =
        x.chunks(2 * 6).flat_map(|group| normal(group, 1e-3)).enumerate().map(|(i, v)| v * w[i / 6 % 6] + b[i / 6 % 6]).collect();
    assert_close(&out[0], &[2, 6, 2, 3], &expected);

    let out = evaluate(&[(&[12, 6], &x), (&[6], &w), (&[6], &b)], |g, v| vec![g.layer_norm(&v[0], &v[1], &v[2], 1e-3)]);
    let expected: Vec<f32> = x.chunks(6).flat_map(|row| normal(row, 1e-3)).enumerate().map(|(i, v)| v * w[i % 6] + b[i % 6]).collect();
    assert_close(&out[0], &[12, 6], &expected);
}

#[test]
fn attention_looks_at_every_position() {
    let (rows, heads, size) = (5, 2, 3);
    let width = heads * size;
    let (q, k, v) = (numbers(rows * width, 7), numbers(rows * width, 8), numbers(rows * width, 9));
    let shape: &[usize] = &[1, rows, width];
    let out = evaluate(&[(shape, &q), (shape, &k), (shape, &v)], |g, x| vec![g.attention(&x[0], &x[1], &x[2], heads)]);
    let mut expected = vec![0.0; rows * width];
    for head in 0..heads {
        let at = |row: usize, i: usize| row * width + head * size + i;
        for row in 0..rows {
            let scores = (0..rows).map(|other| (0..size).map(|i| q[at(row, i)] * k[at(other, i)]).sum::<f32>() / (size as f32).sqrt());
            let weights: Vec<f32> = scores.map(f32::exp).collect();
            for other in 0..rows {
                for i in 0..size {
                    expected[at(row, i)] += weights[other] / weights.iter().sum::<f32>() * v[at(other, i)];
                }
            }
        }
    }
    assert_close(&out[0], shape, &expected);
}

/// Values may be shorter than queries and keys, the scale is given, and there are more positions than fit one block.
#[test]
fn attention_in_blocks_looks_at_every_position() {
    for (images, rows, heads, size, value, scale) in [(1, 5, 2, 3, 4, 0.5), (3, 7, 1, 6, 1, 1.0), (1, 600, 2, 40, 8, 0.25)] {
        let (wide, narrow) = (heads * size, heads * value);
        let (q, k) = (numbers(images * rows * wide, 31), numbers(images * rows * wide, 32));
        let v = numbers(images * rows * narrow, 33);
        let shape: &[usize] = &[images, rows, wide];
        let inputs: [(&[usize], &[f32]); 3] = [(shape, &q), (shape, &k), (&[images, rows, narrow], &v)];
        let out = evaluate(&inputs, |g, x| vec![g.attention_in_blocks(&x[0], &x[1], &x[2], heads, scale)]);
        let mut expected = vec![0.0; images * rows * narrow];
        for (image, head) in (0..images).flat_map(|image| (0..heads).map(move |head| (image, head))) {
            let at = |row: usize| &q[(image * rows + row) * wide + head * size..][..size];
            let key = |row: usize| &k[(image * rows + row) * wide + head * size..][..size];
            for row in 0..rows {
                let weights: Vec<f32> =
                    (0..rows).map(|other| (at(row).iter().zip(key(other)).map(|(a, b)| a * b).sum::<f32>() * scale).exp()).collect();
                let total: f32 = weights.iter().sum();
                for (other, i) in (0..rows).flat_map(|other| (0..value).map(move |i| (other, i))) {
                    expected[(image * rows + row) * narrow + head * value + i] +=
                        weights[other] / total * v[(image * rows + other) * narrow + head * value + i];
                }
            }
        }
        assert_close(&out[0], &[images, rows, narrow], &expected);
    }
}

#[test]
fn squares_are_resized_between_the_centres_of_pixels() {
    let x: Vec<f32> = vec![0.0, 4.0, 8.0, 12.0]; // each row of the picture
    let rows = x.repeat(4);
    let out = evaluate(&[(&[1, 1, 4, 4], &rows)], |g, v| {
        vec![g.resize_linear(&v[0], 8, false), g.resize_linear(&v[0], 2, false), g.resize_linear(&v[0], 2, true)]
    });
    assert_close(&out[0], &[1, 1, 8, 8], &[0.0, 1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 12.0].repeat(8));
    assert_close(&out[1], &[1, 1, 2, 2], &[2.0, 10.0].repeat(2));
    // Triangles of reach 2 around 1 and 3 (in pixels, from the left edge): what falls over the edge counts for the rest.
    let left = (0.75 * 0.0 + 0.75 * 4.0 + 0.25 * 8.0) / 1.75;
    assert_close(&out[2], &[1, 1, 2, 2], &[left, 12.0 - left].repeat(2));
}

#[test]
fn maps_are_padded_cut_and_put_together() {
    let x: Vec<f32> = (1..=6).map(|value| value as f32).collect();
    let out = evaluate(&[(&[1, 2, 3, 1], &x), (&[2, 3, 1], &x), (&[1, 1, 2], &x[..2])], |g, v| {
        let padded = g.pad_end(&v[0], 1, 2);
        let cropped = g.crop(&padded, 2, 2);
        let both = g.concat(&[&v[1], &v[1]], -1);
        let each = g.for_each_image(&v[2], &v[1], &[3, 2]);
        let turned = g.transpose(&v[2], &[0, 2, 1]); // [1, 2, 1]
        let product = g.mat_mul(&each, &turned);
        vec![padded, cropped, both, each, product]
    });
    assert_close(&out[0], &[1, 3, 5, 1], &[1.0, 2.0, 3.0, 0.0, 0.0, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    assert_close(&out[1], &[1, 2, 2, 1], &[1.0, 2.0, 4.0, 5.0]);
    assert_close(&out[2], &[2, 3, 2], &[1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0, 6.0, 6.0]);
    assert_close(&out[3], &[2, 3, 2], &[1.0, 2.0].repeat(6));
    assert_close(&out[4], &[2, 3, 1], &[5.0; 6]);
}

#[test]
fn convolution_pads_and_strides() {
    let (x, w) = (numbers(2 * 4 * 4, 10), numbers(3 * 2 * 3 * 3, 11));
    let out = evaluate(&[(&[1, 2, 4, 4], &x), (&[3, 2, 3, 3], &w)], |g, v| vec![g.conv(&v[0], &v[1], None, 2, 1)]);
    let pixel = |c: usize, y: i32, x_: i32| {
        if (0..4).contains(&y) && (0..4).contains(&x_) { x[c * 16 + y as usize * 4 + x_ as usize] } else { 0.0 }
    };
    let mut expected = Vec::new();
    for o in 0..3 {
        for (y, x_) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let taps = (0..2 * 9).map(|i| w[o * 18 + i] * pixel(i / 9, y * 2 - 1 + (i % 9 / 3) as i32, x_ * 2 - 1 + (i % 3) as i32));
            expected.push(taps.sum::<f32>());
        }
    }
    assert_close(&out[0], &[1, 3, 2, 2], &expected);
}

#[test]
fn a_doubled_map_is_convolved_without_being_made() {
    for (channels, output, height, width) in [(2, 3, 3, 4), (1, 1, 1, 1), (4, 4, 5, 2)] {
        let (x, w, b) = (numbers(2 * channels * height * width, 21), numbers(output * channels * 9, 22), numbers(output, 23));
        let twice = |row: &[f32]| row.iter().flat_map(|&value| [value; 2]).collect::<Vec<_>>().repeat(2);
        let doubled: Vec<f32> = x.chunks(width).flat_map(twice).collect();
        let wide = [2, channels, 2 * height, 2 * width];
        let inputs: [(&[usize], &[f32]); 4] =
            [(&[2, channels, height, width], &x), (&wide, &doubled), (&[output, channels, 3, 3], &w), (&[output], &b)];
        let out = evaluate(&inputs, |g, v| vec![g.upsample_conv(&v[0], &v[2], &v[3]), g.conv(&v[1], &v[2], Some(&v[3]), 1, 1)]);
        assert_close(&out[0], &[2, output, 2 * height, 2 * width], &out[1].values);
    }
}

#[test]
fn the_other_operations() {
    let x = [3.0, -4.0, 0.0, 0.0, 1.0, 2.0];
    let out = evaluate(&[(&[3, 2], &x), (&[1, 2, 3], &x)], |g, v| {
        let unit = g.unit_length(&v[0]);
        let [first, second, third] = g.thirds(&v[1]);
        let sum = g.add(&second, &third);
        let first = g.mul(&first, &sum);
        let row = g.first_row(&v[1]);
        let gelu = g.activate(&v[0], Activation::Gelu);
        let silu = g.activate(&v[0], Activation::Silu);
        vec![unit, first, row, gelu, silu]
    });
    assert_close(&out[0], &[3, 2], &[0.6, -0.8, 0.0, 0.0, 1.0 / 5f32.sqrt(), 2.0 / 5f32.sqrt()]);
    assert_close(&out[1], &[1, 2, 1], &[-12.0, 0.0]);
    assert_close(&out[2], &[1, 3], &[3.0, -4.0, 0.0]);
    assert_close(&out[3], &[3, 2], &[2.995_950_3, -0.000_126_68, 0.0, 0.0, 0.841_344_7, 1.954_499_7]);
    assert_close(&out[4], &[3, 2], &x.map(|v| v / (1.0 + (-v).exp())));
}

#[test]
fn a_channel_is_convolved_by_itself() {
    let (x, w, b) = (numbers(3 * 5 * 4, 12), numbers(3 * 9, 13), numbers(3, 14));
    let out = evaluate(&[(&[1, 3, 5, 4], &x), (&[3, 1, 3, 3], &w), (&[3], &b)], |g, v| vec![g.depthwise(&v[0], &v[1], &v[2], 3, 1)]);
    let pixel = |c: usize, y: i32, x_: i32| {
        if (0..5).contains(&y) && (0..4).contains(&x_) { x[c * 20 + y as usize * 4 + x_ as usize] } else { 0.0 }
    };
    let value = |i: usize| {
        let (c, y, x_) = (i / 20, (i / 4 % 5) as i32, (i % 4) as i32);
        b[c] + (0..9).map(|tap| w[c * 9 + tap] * pixel(c, y + tap as i32 / 3 - 1, x_ + tap as i32 % 3 - 1)).sum::<f32>()
    };
    assert_close(&out[0], &[1, 3, 5, 4], &(0..60).map(value).collect::<Vec<_>>());
}

#[test]
fn norms_without_a_mean() {
    let (rows, width) = (3, 5);
    let (x, w, b) = (numbers(rows * width, 15), numbers(width, 16), numbers(width, 17));
    let out = evaluate(&[(&[rows, width], &x), (&[width], &w), (&[width], &b)], |g, v| {
        vec![g.rms_norm(&v[0], &v[1], 1e-2), g.response_norm(&v[0], &v[1], &v[2], 1e-2)]
    });
    let root = |row: &[f32]| (row.iter().map(|v| v * v).sum::<f32>() / width as f32 + 1e-2).sqrt();
    let expected: Vec<f32> =
        x.chunks(width).flat_map(|row| row.iter().zip(&w).map(|(v, w)| v / root(row) * w).collect::<Vec<_>>()).collect();
    assert_close(&out[0], &[rows, width], &expected);
    let lengths: Vec<f32> = (0..width).map(|d| (0..rows).map(|row| x[row * width + d].powi(2)).sum::<f32>().sqrt()).collect();
    let mean = lengths.iter().sum::<f32>() / width as f32 + 1e-2;
    let value = |i: usize| b[i % width] + (w[i % width] * lengths[i % width] / mean + 1.0) * x[i];
    assert_close(&out[1], &[rows, width], &(0..rows * width).map(value).collect::<Vec<_>>());
}

#[test]
fn values_move_and_stay_what_they_are() {
    let x: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let out = evaluate(&[(&[1, 8, 1, 3], &x), (&[2, 3, 4], &x), (&[1, 4], &x[..4])], |g, v| {
        let [left, right] = g.halves(&v[1]);
        vec![g.pixel_shuffle(&v[0], 2), g.concat(&[&right, &left], 1), g.prepend(&v[2], &v[1], 4)]
    });
    // Channel 4 c + 2 a + b of position (i, j) goes to channel c at (2 i + a, 2 j + b).
    let shuffled: Vec<f32> = (0..24)
        .map(|at| {
            let (c, y, x_) = (at / 12, at / 6 % 2, at % 6);
            ((4 * c + 2 * y + x_ % 2) * 3 + x_ / 2) as f32
        })
        .collect();
    assert_close(&out[0], &[1, 2, 2, 6], &shuffled);
    let swapped: Vec<f32> = x
        .chunks(12)
        .flat_map(|image| {
            let part = |from: usize| image.chunks(4).flat_map(move |row| row[from..from + 2].to_vec());
            part(2).chain(part(0)).collect::<Vec<_>>()
        })
        .collect();
    assert_close(&out[1], &[2, 6, 2], &swapped);
    assert_close(&out[2], &[2, 4, 4], &[&x[..4], &x[..12], &x[..4], &x[12..]].concat());
}

/// A folder with weights `a` [2, 3] and `b` [2, 3] in files of its own choice. `shift` bytes of padding in the header move the data.
fn folder(dir: &Path, dtype: Dtype, file: &str, name: &str, values: &[f32], shift: usize) {
    let bytes: Vec<u8> = match dtype {
        Dtype::BF16 => values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect(),
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => vec![0; values.len() * 8],
    };
    let view = TensorView::new(dtype, vec![2, 3], &bytes).unwrap();
    let data = safetensors::serialize([(name, view)], None).unwrap();
    let length = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
    let mut shifted = ((length + shift) as u64).to_le_bytes().to_vec();
    shifted.extend(&data[8..8 + length]);
    shifted.extend(vec![b' '; shift]);
    shifted.extend(&data[8 + length..]);
    fs::write(dir.join(file), shifted).unwrap();
}

/// `a + 10 b`, with the weights of a checkpoint.
fn combine(checkpoint: &Checkpoint) -> Result<Vec<f32>, EngineError> {
    let mut graph = Graph::new();
    let factor = graph.input("factor", &[Dim::Named("any")]);
    let (a, b) = (graph.weight(&checkpoint.tensor("a")?)?, graph.weight(&checkpoint.tensor("b")?)?);
    assert_eq!(format!("{a:?}"), format!("{:?}", graph.weight(&checkpoint.tensor("a")?)?), "a weight used twice is there once");
    let scaled = graph.mul(&b, &factor);
    let sum = graph.add(&a, &scaled);
    graph.output("sum", &sum);
    let outputs = Session::new(graph, &OPTIONS)?.run(&[Input::Floats { shape: &[1], values: &[10.0] }])?;
    Ok(outputs[0].values.clone())
}

const A: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
const B: [f32; 6] = [0.5, 1.5, -2.0, 0.25, 0.0, 8.0];
const SUM: [f32; 6] = [6.0, 17.0, -17.0, 6.5, 5.0, 86.0];

fn sharded(dir: &Path, first: &str, second: &str) -> Checkpoint {
    let index = format!(r#"{{"metadata": {{}}, "weight_map": {{"a": "{first}", "b": "{second}"}}}}"#);
    fs::write(dir.join("config.json"), r#"{"model_type": "test"}"#).unwrap();
    fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    Checkpoint::open(dir).unwrap()
}

#[test]
fn weights_of_every_alignment_and_type() {
    for dtype in [Dtype::F32, Dtype::BF16] {
        for shift in 0..4 {
            let dir = tempfile::tempdir().unwrap();
            folder(dir.path(), dtype, "1.safetensors", "a", &A, shift);
            folder(dir.path(), Dtype::F32, "2.safetensors", "b", &B, 0);
            assert_eq!(combine(&sharded(dir.path(), "1.safetensors", "2.safetensors")).unwrap(), SUM, "{dtype:?} moved by {shift}");
        }
    }
}

/// The layout of the Hugging Face cache, with blobs in folders of their own on top.
#[cfg(unix)]
#[test]
fn weights_behind_links() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two, snapshot) = (dir.path().join("blobs"), dir.path().join("elsewhere"), dir.path().join("snapshot"));
    for folder in [&one, &two, &snapshot] {
        fs::create_dir(folder).unwrap();
    }
    folder(&one, Dtype::F32, "b10b", "a", &A, 0);
    folder(&two, Dtype::F32, "2fad", "b", &B, 0);
    std::os::unix::fs::symlink("../blobs/b10b", snapshot.join("1.safetensors")).unwrap();
    std::os::unix::fs::symlink(two.join("2fad"), snapshot.join("2.safetensors")).unwrap();
    assert_eq!(combine(&sharded(&snapshot, "1.safetensors", "2.safetensors")).unwrap(), SUM);
}

#[test]
fn a_weight_of_integers_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), Dtype::I64, "1.safetensors", "a", &A, 0);
    folder(dir.path(), Dtype::F32, "2.safetensors", "b", &B, 0);
    let error = combine(&sharded(dir.path(), "1.safetensors", "2.safetensors")).unwrap_err();
    assert_eq!(error, EngineError::Checkpoint("tensor a: a weight cannot be I64".into()));
}

#[test]
fn a_graph_that_makes_no_sense_is_an_error() {
    let mut graph = Graph::new();
    let (a, b) = (graph.input("a", &[Dim::Fixed(2)]), graph.input("b", &[Dim::Fixed(3)]));
    let sum = graph.add(&a, &b);
    graph.output("sum", &sum);
    let error = Session::new(graph, &OPTIONS).unwrap_err().to_string();
    assert!(error.starts_with("compute: a graph cannot be loaded: ") && error.lines().count() == 1, "{error}");
}

#[test]
fn an_input_of_another_shape_is_an_error() {
    let mut graph = Graph::new();
    let a = graph.input("a", &[Dim::Fixed(2)]);
    graph.output("b", &a);
    let session = Session::new(graph, &OPTIONS).unwrap();
    assert!(matches!(session.run(&[Input::Floats { shape: &[3], values: &[0.0; 3] }]), Err(EngineError::Compute(_))));
    assert!(matches!(session.run(&[Input::Floats { shape: &[2], values: &[0.0; 3] }]), Err(EngineError::Compute(_))));
    assert_eq!(session.run(&[Input::Floats { shape: &[2], values: &[1.0, 2.0] }]).unwrap()[0].values, [1.0, 2.0]);
}

#[test]
fn sessions_may_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Session>();
}

/// A large weight is held once: packed for the matrix kernel, and then no longer resident as it lies in the file.
#[cfg(target_os = "linux")]
#[test]
fn large_weights_are_held_once() {
    const ROWS: usize = 4096;
    let dir = tempfile::tempdir().unwrap();
    let bytes = vec![0; ROWS * 4096 * 4]; // 64 MiB
    let view = TensorView::new(Dtype::F32, vec![ROWS, 4096], &bytes).unwrap();
    fs::write(dir.path().join("model.safetensors"), safetensors::serialize([("w", view)], None).unwrap()).unwrap();
    fs::write(dir.path().join("config.json"), r#"{"model_type": "test"}"#).unwrap();
    drop(bytes);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let before = resident_memory();
    let mut graph = Graph::new();
    let x = graph.input("x", &[Dim::Fixed(8), Dim::Fixed(4096)]);
    let weight = graph.weight(&checkpoint.tensor("w").unwrap()).unwrap();
    let y = graph.linear(&x, &weight, None);
    graph.output("y", &y);
    let session = Session::new(graph, &OPTIONS).unwrap();
    session.run(&[Input::Floats { shape: &[8, 4096], values: &vec![1.0; 8 * 4096] }]).unwrap();
    let grown = resident_memory().saturating_sub(before);
    assert!(grown < (64 + 40) << 20, "{grown} bytes more for a weight of 64 MiB");
}

/// Bytes of this process that are in memory, mapped files included.
#[cfg(target_os = "linux")]
fn resident_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}
