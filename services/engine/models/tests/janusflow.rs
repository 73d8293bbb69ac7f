//! JanusFlow against the reference outputs of its fixture, at sizes that no fixture has, and broken.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use checkpoint::Checkpoint;
use domain::{Canvas, Drawing, Latent, LatentGrid};
use layers::{EngineError, FlowInput, Head, LanguageModel, NoObserver, RowInput, Slice, Step};
use models::{LoadOptions, OnnxOptions, Painter, VaeDecoder, card, load_language, load_painter, load_vision};
use serde_json::{Value, json};
use support::writer::{Random, Stored, write};
use support::{Recorder, assert_close, fixture, golden::Golden, load, naive_flow, naive_pixels, tokens};

const OPTIONS: OnnxOptions = OnnxOptions { threads: 2 };
const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

type Raw = BTreeMap<String, (Stored, Vec<usize>, Vec<u8>)>;

fn open(dir: &Path) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir).unwrap())
}

/// Hidden states of the map's rows behind both prompts.
fn hidden(model: &mut dyn LanguageModel, prompts: [&[u32]; 2], input: &FlowInput, width: usize) -> [Vec<f32>; 2] {
    let place = prompts[0].len();
    let mut half = 0;
    prompts.map(|prompt| {
        half += 1;
        let blocks: Vec<u32> = (0..8).map(|i| 2 * i + half).collect();
        let tail: Vec<_> = (0..input.rows.len() / width).map(|row| RowInput::Embedding { values: input.rows.clone(), row }).collect();
        let mut run = |rows: Vec<RowInput>, start, shift, head| {
            let slices = vec![Slice { rows: 0..rows.len(), start, shift, blocks: blocks.clone(), head, may_lose_experts: false }];
            model.forward(&Step { rows, slices }, &mut NoObserver).unwrap().hidden.remove(0)
        };
        run(tokens(prompt), 0, 0, None);
        let hidden = run(tail, prompt.len(), place - prompt.len(), Some(Head::Hidden)).unwrap();
        hidden[width..].to_vec()
    })
}

#[test]
fn velocities_equal_the_reference() {
    let golden = Golden::open(&fixture("janusflow"));
    let mut model = load(&fixture("janusflow"));
    let (ids, z) = (golden.ids("gen.cond_ids"), golden.values("gen.z0"));
    let prompt = &ids[..ids.len() - 1]; // the time stands where the last token does
    for (i, time) in [0.0, 370.0].into_iter().enumerate() {
        let expect = |name: &str| golden.values(&format!("gen.probe{i}.{name}"));
        let mut seen = Recorder::default();
        let input = model.flow().unwrap().encode(&z, time, &mut seen).unwrap();
        for name in ["z_enc", "t_emb", "z_aligned"] {
            assert_close(name, &seen.tensors[name], &expect(name), 2e-4);
        }
        let [cond, uncond] = hidden(model.as_mut(), [prompt, &prompt[..1]], &input, 64);
        assert_close("llm_hidden_cond", &cond, &expect("llm_hidden_cond"), 2e-4);
        assert_close("llm_hidden_uncond", &uncond, &expect("llm_hidden_uncond"), 2e-4);
        let v_cond = model.flow().unwrap().decode(&cond, &input, &mut seen).unwrap();
        assert_close("dec_input_cond", &seen.tensors["dec_input"], &expect("dec_input_cond"), 2e-4);
        assert_close("v_cond", &v_cond, &expect("v_cond"), 2e-4);
        let v_uncond = model.flow().unwrap().decode(&uncond, &input, &mut NoObserver).unwrap();
        assert_close("v_uncond", &v_uncond, &expect("v_uncond"), 2e-4);
    }
}

#[test]
fn a_picture_begins_with_its_own_row() {
    let golden = Golden::open(&fixture("janusflow"));
    let encoder = load_vision(&open(&fixture("janusflow")), &OPTIONS).unwrap().unwrap();
    assert_eq!((encoder.tokens_per_image(), encoder.extra_rows(), encoder.width(), encoder.image_size()), (37, 1, 64, 48));
    let pixels = golden.values("p0.pixel_values");
    let one = encoder.encode(&pixels).unwrap();
    let begin = open(&fixture("janusflow")).tensor("beg_of_und_embed").unwrap().to_f32();
    assert_eq!(one[..64], begin, "as it is in the checkpoint");
    assert_close("image_features", &one[64..], &golden.values("p0.image_features"), 5e-5);
    let two = encoder.encode(&[&pixels[..], &pixels].concat()).unwrap();
    assert_close("two pictures", &two, &[&one[..], &one].concat(), 1e-5);
    for (name, _, values) in encoder.probe(&pixels).unwrap().iter().filter(|probe| probe.0 != "vision.hidden.final_norm") {
        assert_close(name, values, &golden.values(&format!("p0.{name}")), 1e-4);
    }
}

#[test]
fn the_vae_equals_the_reference() {
    let golden = Golden::open(&fixture("janusflow"));
    let painter = load_painter(&open(&fixture("janusflow")), None, &OPTIONS).unwrap().unwrap();
    let Painter::Vae(vae) = &painter else { panic!("{painter:?}") };
    assert_eq!(painter.image_size(), (24, 24));
    let steps = golden.values("gen.z_trajectory");
    let last = &steps[steps.len() - vae.grid().len()..];
    assert_close("latent_in", &vae.unscaled(last), &golden.values("vae.latent_in"), 5e-4);
    assert_close("pixels", &vae.decode(last).unwrap(), &golden.values("vae.pixels"), 5e-4);
    assert_close("probe_pixels", &vae.decode_unscaled(&golden.values("gen.z0")).unwrap(), &golden.values("vae.probe_pixels"), 5e-4);
    let drawing = Drawing::Latent(Latent::new(vae.grid(), last));
    assert_eq!(painter.paint(&drawing).unwrap(), vae.decode(last).unwrap());
    assert!(matches!(painter.paint(&Drawing::Codes(vec![1])), Err(EngineError::Step(_))));
    assert!(matches!(vae.decode(&last[1..]), Err(EngineError::Step(_))));
}

#[test]
fn the_card_says_what_the_files_say() {
    let card = card(&open(&fixture("janusflow"))).unwrap();
    let grid = LatentGrid { channels: 4, rows: 12, columns: 12, positions: 37 };
    assert_eq!((card.family.as_str(), card.canvas, card.tokens_per_image), ("multi_modality", Some(Canvas::Latent(grid)), Some(37)));
    let drawing = card.default_image_sampling;
    assert_eq!((drawing.guidance, drawing.steps, drawing.solver), (2.0, 30, domain::Solver::Euler));
}

/// Random values for `shapes`, small where many are summed.
fn random(shapes: &naive_pixels::Shapes, seed: u64) -> (Raw, naive_pixels::Tensors) {
    let mut random = Random(seed);
    let (mut raw, mut plain) = (Raw::new(), naive_pixels::Tensors::new());
    for (name, shape) in shapes {
        let response = name.contains("channelwise_norm");
        let fan_in = if response { 1.0 } else { shape[1..].iter().product::<usize>() as f64 };
        let scale = if shape.len() == 1 { 0.3 } else { 1.7 / fan_in.sqrt() };
        let centre = f64::from(u8::from(shape.len() == 1 && name.ends_with("weight")));
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| (centre + scale * random.uniform()) as f32).collect();
        raw.insert(name.clone(), (Stored::F32, shape.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect()));
        plain.insert(name.clone(), values.iter().map(|&v| f64::from(v)).collect());
    }
    (raw, plain)
}

/// A language model of one layer with heads of 6 dimensions, under the names of the original repository.
fn language_shapes(hidden: usize) -> naive_pixels::Shapes {
    let layer = "language_model.model.layers.0";
    let mut shapes: naive_pixels::Shapes = vec![
        ("language_model.model.embed_tokens.weight".into(), vec![11, hidden]),
        ("language_model.lm_head.weight".into(), vec![11, hidden]),
        ("language_model.model.norm.weight".into(), vec![hidden]),
    ];
    shapes.extend(["q", "k", "v", "o"].map(|part| (format!("{layer}.self_attn.{part}_proj.weight"), vec![hidden, hidden])));
    shapes.extend(["gate", "up"].map(|part| (format!("{layer}.mlp.{part}_proj.weight"), vec![10, hidden])));
    shapes.push((format!("{layer}.mlp.down_proj.weight"), vec![hidden, 10]));
    shapes.extend(["input", "post_attention"].map(|part| (format!("{layer}.{part}_layernorm.weight"), vec![hidden])));
    shapes
}

#[test]
fn networks_of_odd_sizes() {
    let sizes = naive_flow::Networks {
        side: 5,
        latent: 3,
        channels: 10,
        decoder: 7,
        hidden: 18,
        layers: [1, 3],
        epsilon: 1e-3,
        hidden_epsilon: 1e-2,
    };
    let (mut raw, plain) = random(&sizes.shapes(), 21);
    raw.extend(random(&language_shapes(18), 22).0);
    let enc = json!({
        "input_channels": 3, "kernel_size": 2, "stride": 2, "padding": 0, "block_out_channels": [10], "layers_in_middle": 1,
        "hidden_size": 18, "norm_eps": 1e-3, "use_bias": true, "use_mid_block": true,
    });
    let dec = json!({
        "in_channels": 7, "out_channels": 3, "block_out_channels": [10], "upsamples": 1, "layers_in_middle": 3, "hidden_size": 18,
        "norm_eps": 1e-3,
    });
    let config = json!({
        "model_type": "multi_modality",
        "language_config": {
            "hidden_size": 18, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 11,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-2,
        },
        "vision_und_enc_config": {"params": {"image_size": 35, "width": 12, "layers": 1, "heads": 2, "patch_size": 7}},
        "vision_gen_enc_config": {"params": enc},
        "vision_gen_dec_config": {"params": dec},
    });
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &raw, &config);
    let grid = LatentGrid { channels: 3, rows: 10, columns: 10, positions: 26 };
    assert_eq!(card(&open(dir.path())).unwrap().canvas, Some(Canvas::Latent(grid)));
    let model = load_language(&open(dir.path()), &LoadOptions { kv_blocks: 8, threads: 2 }).unwrap();
    let flow = model.flow().unwrap();
    let mut random = Random(23);
    let mut values = |count: usize| (0..count).map(|_| (1.7 * random.uniform()) as f32).collect::<Vec<_>>();
    for time in [0.0, 1.5, 612.5, 1000.0] {
        let (z, states) = (values(grid.len()), values(25 * 18));
        let input = flow.encode(&z, time, &mut NoObserver).unwrap();
        let (rows, skip) = sizes.encode(&plain, &z, time);
        assert_close("rows", &input.rows, &rows, 2e-5);
        assert_close("skip", &input.skip, &skip, 2e-5);
        let expected = sizes.decode(&plain, &states, &input.skip, &input.rows[..18]);
        assert_close("velocity", &flow.decode(&states, &input, &mut NoObserver).unwrap(), &expected, 2e-5);
    }
    assert!(matches!(flow.encode(&[0.0; 5], 0.0, &mut NoObserver), Err(EngineError::Step(_))));
    let input = flow.encode(&values(grid.len()), 0.0, &mut NoObserver).unwrap();
    assert!(matches!(flow.decode(&[0.0; 18], &input, &mut NoObserver), Err(EngineError::Step(_))));
}

fn write_vae(dir: &Path, raw: &Raw, config: &Value) {
    write(dir, raw, config);
    fs::rename(dir.join("model.safetensors"), dir.join(WEIGHTS)).unwrap();
}

fn vae(dir: &Path, grid: LatentGrid) -> Result<VaeDecoder, EngineError> {
    VaeDecoder::load(&Checkpoint::open_diffusers(dir)?, grid, &OPTIONS)
}

/// Newer and older names of the attention, as matrices and as convolutions of one pixel.
#[test]
fn a_vae_of_odd_sizes_under_all_names() {
    let sizes = naive_flow::Vae { side: 5, latent: 3, levels: vec![12, 6, 9], blocks: 3, groups: 3 };
    let grid = LatentGrid { channels: 3, rows: 5, columns: 5, positions: 26 };
    let (raw, plain) = random(&sizes.shapes(), 31);
    let config = json!({
        "_class_name": "AutoencoderKL", "block_out_channels": [9, 6, 12], "layers_per_block": 2, "latent_channels": 3,
        "norm_num_groups": 3, "scaling_factor": 0.5, "shift_factor": 0.25,
    });
    let mut random = Random(32);
    let z: Vec<f32> = (0..grid.len()).map(|_| (1.7 * random.uniform()) as f32).collect();
    let unscaled: Vec<f32> = z.iter().map(|v| v / 0.5 + 0.25).collect();
    let expected = sizes.run(&plain, &unscaled);
    let old = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];
    for (renamed, convolutions) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut named = Raw::new();
        for (name, (stored, shape, bytes)) in &raw {
            let part = old.iter().find(|(new, _)| name.contains(&format!(".attentions.0.{new}.")));
            let name = part.filter(|_| renamed).map_or(name.clone(), |(new, old)| name.replace(new, old));
            let pixel = convolutions && part.is_some() && shape.len() == 2;
            let shape = if pixel { [&shape[..], &[1, 1]].concat() } else { shape.clone() };
            named.insert(name, (*stored, shape, bytes.clone()));
        }
        let dir = tempfile::tempdir().unwrap();
        write_vae(dir.path(), &named, &config);
        let decoder = vae(dir.path(), grid).unwrap();
        assert_eq!(decoder.image_size(), (20, 20));
        assert_close("pixels", &decoder.decode(&z).unwrap(), &expected, 5e-5);
    }
}

/// The tensors and the configuration of a part of the fixture.
fn parts(folder: &Path, weights: &str) -> (Raw, Value) {
    let file = fs::read(folder.join(weights)).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let stored =
        |view: &safetensors::tensor::TensorView<'_>| if view.dtype() == safetensors::Dtype::F32 { Stored::F32 } else { Stored::BF16 };
    let raw = tensors.iter().map(|(name, view)| (name.to_owned(), (stored(&view), view.shape().to_vec(), view.data().to_vec())));
    (raw.collect(), serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap())
}

type Change = fn(&mut Raw, &mut Value);

/// What is wrong with a checkpoint is said in one line that names the tensor or the field.
#[test]
fn broken_checkpoints_are_refused() {
    fn enc(config: &mut Value) -> &mut Value {
        &mut config["vision_gen_enc_config"]["params"]
    }
    fn dec(config: &mut Value) -> &mut Value {
        &mut config["vision_gen_dec_config"]["params"]
    }
    fn forget(params: &mut Value, field: &str) {
        params.as_object_mut().unwrap().remove(field);
    }
    let rows: [(&str, Change); 22] = [
        ("missing tensor vision_gen_dec_aligner_norm.weight", |raw, _| drop(raw.remove("vision_gen_dec_aligner_norm.weight"))),
        ("missing tensor vision_gen_enc_model.mid_block.res_blocks.2.depthwise.weight", |_, c| enc(c)["layers_in_middle"] = json!(3)),
        ("tensor vision_gen_dec_aligner.weight: wrong shape", |_, c| dec(c)["in_channels"] = json!(16)),
        ("field vision_gen_enc_config.params", |_, c| forget(&mut c["vision_gen_enc_config"], "params")),
        ("field vision_gen_dec_config", |_, c| forget(c, "vision_gen_dec_config")),
        ("missing field `stride`", |_, c| forget(enc(c), "stride")),
        ("missing field `block_out_channels`", |_, c| forget(dec(c), "block_out_channels")),
        ("field vision_gen_enc_config.params.block_out_channels: 2 levels", |_, c| enc(c)["block_out_channels"] = json!([32, 64])),
        ("field vision_gen_enc_config.params.block_out_channels: 33 channels", |_, c| enc(c)["block_out_channels"] = json!([33])),
        ("field vision_gen_dec_config.params.block_out_channels: 64, but", |_, c| dec(c)["block_out_channels"] = json!([64])),
        ("field vision_gen_dec_config.params.out_channels: 8, but", |_, c| dec(c)["out_channels"] = json!(8)),
        ("field vision_gen_dec_config.params.upsamples: 2, but", |_, c| dec(c)["upsamples"] = json!(2)),
        ("field vision_gen_enc_config.params.hidden_size: 128, but", |_, c| enc(c)["hidden_size"] = json!(128)),
        ("field vision_gen_dec_config.params.hidden_size: 128, but", |_, c| dec(c)["hidden_size"] = json!(128)),
        ("field vision_gen_enc_config.params.use_bias: false", |_, c| enc(c)["use_bias"] = json!(false)),
        ("field vision_gen_dec_config.params.use_mid_block: false", |_, c| dec(c)["use_mid_block"] = json!(false)),
        ("field vision_gen_enc_config.params.norm_eps: -1", |_, c| enc(c)["norm_eps"] = json!(-1.0)),
        ("field vision_gen_enc_config.params.kernel_size", |_, c| enc(c)["kernel_size"] = json!(4)),
        ("field vision_gen_enc_config.params.stride: 0", |_, c| enc(c)["stride"] = json!(0)),
        ("field vision_gen_dec_config.params.upsamples: enlarges", |_, c| {
            (enc(c)["stride"], enc(c)["kernel_size"]) = (json!(4), json!(4));
        }),
        ("field language_config.max_position_embeddings", |_, c| c["language_config"]["max_position_embeddings"] = json!(37)),
        ("field vision_und_enc_config", |_, c| forget(c, "vision_und_enc_config")),
    ];
    for (expected, change) in rows {
        let dir = tempfile::tempdir().unwrap();
        let (mut raw, mut config) = parts(&fixture("janusflow"), "model.safetensors");
        change(&mut raw, &mut config);
        write(dir.path(), &raw, &config);
        let Err(error) = load_language(&open(dir.path()), &LoadOptions { kv_blocks: 8, threads: 1 }) else { panic!("{expected}: loaded") };
        let error = error.to_string();
        assert!(error.contains(expected) && error.lines().count() == 1, "{error}\nshould name: {expected}");
    }
}

#[test]
fn broken_vaes_are_refused() {
    let grid = LatentGrid { channels: 4, rows: 12, columns: 12, positions: 37 };
    let rows: [(&str, Change); 12] = [
        ("missing tensor decoder.conv_in.weight", |raw, _| drop(raw.remove("decoder.conv_in.weight"))),
        ("tensor decoder.up_blocks.1.resnets.0.conv1.weight: wrong shape", |_, c| c["block_out_channels"] = json!([8, 32])),
        ("missing tensor decoder.up_blocks.0.resnets.2.norm1.weight", |_, c| c["layers_per_block"] = json!(2)),
        ("field block_out_channels: 16 channels cannot be split into 5 groups", |_, c| c["norm_num_groups"] = json!(5)),
        ("field block_out_channels: 0 levels", |_, c| c["block_out_channels"] = json!([])),
        ("missing field `block_out_channels`", |_, c| drop(c.as_object_mut().unwrap().remove("block_out_channels"))),
        ("field latent_channels: 16, but the model draws maps of 4", |_, c| c["latent_channels"] = json!(16)),
        ("field scaling_factor: 0", |_, c| c["scaling_factor"] = json!(0.0)),
        ("field act_fn: \"relu\"", |_, c| c["act_fn"] = json!("relu")),
        ("field up_block_types: \"Other\"", |_, c| c["up_block_types"] = json!(["UpDecoderBlock2D", "Other"])),
        ("field latents_mean", |_, c| c["latents_mean"] = json!([0.0, 0.0, 0.0, 0.0])),
        ("field _class_name: missing", |_, c| drop(c.as_object_mut().unwrap().remove("_class_name"))),
    ];
    for (expected, change) in rows {
        let dir = tempfile::tempdir().unwrap();
        let (mut raw, mut config) = parts(&fixture("janusflow").join("vae"), WEIGHTS);
        change(&mut raw, &mut config);
        write_vae(dir.path(), &raw, &config);
        let Err(error) = vae(dir.path(), grid) else { panic!("{expected}: loaded") };
        let error = error.to_string();
        assert!(error.contains(expected) && error.lines().count() == 1, "{error}\nshould name: {expected}");
    }
}

#[test]
fn a_missing_vae_is_named_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, config) = parts(&fixture("janusflow"), "model.safetensors");
    write(dir.path(), &raw, &config);
    let inside = load_painter(&open(dir.path()), None, &OPTIONS).unwrap_err().to_string();
    let given = load_painter(&open(dir.path()), Some(Path::new("/no/such/vae")), &OPTIONS).unwrap_err().to_string();
    assert!(inside.starts_with(&dir.path().join("vae").display().to_string()) && inside.contains("--vae"), "{inside}");
    assert!(given.starts_with("/no/such/vae: ") && given.contains("is missing"), "{given}");
    // Weights that are no numbers are found before anything is painted.
    let folder = dir.path().join("vae");
    fs::create_dir(&folder).unwrap();
    let (mut raw, config) = parts(&fixture("janusflow").join("vae"), WEIGHTS);
    raw.get_mut("decoder.conv_out.bias").unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    write_vae(&folder, &raw, &config);
    let nan = load_painter(&open(dir.path()), None, &OPTIONS).unwrap_err().to_string();
    assert!(nan.contains("decoder.conv_out.bias") && nan.contains("NaN"), "{nan}");
}
