//! Multimodal models at the sizes that were published (spec: janus.md 1, janusflow.md 1, vision.md 1).

use serde_json::{Value, json};

use super::image_parts::{Autoencoder, Sam, Tower, Vq, flow};
use super::recipe::{Fill, Recipe, Tensors, Vae, Voice};
use super::text_recipes::{Decoder, generation, merge};

/// The decoder of DeepSeek-VL 7B with 4 of its 30 layers.
pub const DECODER_7B: Decoder = Decoder { hidden: 4096, inner: 11_008, layers: 4, heads: 32, vocabulary: 102_400, context: 16_384 };

/// Channels of JanusFlow's encoder and decoder on the side of the latents.
pub const FLOW_WIDTH: usize = 768;

/// Janus in the layout of transformers: sees, and draws code by code.
pub fn janus(decoder: &Decoder, tower: &Tower, vq: &Vq) -> Recipe {
    let (mut tensors, hidden) = (Tensors::default(), decoder.hidden);
    decoder.tensors(&mut tensors, "model.language_model", "lm_head");
    tower.port(&mut tensors, "model.vision_model", "projection_layer");
    tensors.weight("model.aligner.fc1", &[hidden, tower.hidden], true);
    tensors.weight("model.aligner.hidden_layers.0", &[hidden, hidden], true);
    vq.port(&mut tensors, "model.vqmodel");
    tensors.table("model.generation_embeddings", vq.codebook, vq.code);
    tensors.weight("model.generation_aligner.fc1", &[hidden, vq.code], true);
    tensors.weight("model.generation_aligner.hidden_layers.0", &[hidden, hidden], true);
    tensors.weight("model.generation_head.proj_out", &[hidden, hidden], true);
    tensors.weight("model.generation_head.vision_head", &[vq.codebook, hidden], true);
    let config = json!({
        "model_type": "janus", "architectures": ["JanusForConditionalGeneration"], "image_token_id": 488, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "text_config": decoder.config(),
        "vision_config": {
            "model_type": "janus_vision_model", "hidden_size": tower.hidden, "num_hidden_layers": tower.layers, "hidden_act": "gelu",
            "num_attention_heads": tower.heads, "image_size": tower.image, "patch_size": tower.patch, "num_channels": 3,
            "mlp_ratio": tower.inner as f64 / tower.hidden as f64, "layer_norm_eps": 1e-6, "attention_bias": true, "use_qk_norm": false,
            "num_image_tokens": tower.tokens(), "projection_dim": hidden, "depth": 2,
        },
        "vq_config": {
            "model_type": "janus_vqgan", "embed_dim": vq.code, "num_embeddings": vq.codebook, "latent_channels": vq.latent,
            "base_channels": vq.base, "channel_multiplier": vq.multipliers, "num_res_blocks": vq.blocks, "double_latent": false,
            "num_patches": vq.side, "in_channels": 3, "out_channels": 3, "num_hidden_layers": 2, "projection_dim": hidden,
            "image_token_embed_dim": hidden,
        },
    });
    let mut drawing = generation();
    merge(&mut drawing, json!({"temperature": 1.0, "guidance_scale": 5, "pad_token_id": 482, "generation_kwargs": {"boi_token_id": 489}}));
    let json = vec![
        ("config.json", config),
        ("generation_config.json", drawing),
        ("preprocessor_config.json", preprocessor("JanusImageProcessor", "JanusProcessor", tower.image)),
        (
            "processor_config.json",
            json!({"num_image_tokens": tower.tokens(), "processor_class": "JanusProcessor", "use_default_system_prompt": true}),
        ),
    ];
    let vocabulary = decoder.vocabulary;
    Recipe { name: "janus", about: "Janus 1.3B", tokenizer: Voice::Janus, vocabulary, json, tensors, vae: None }
}

/// JanusFlow in the layout of its repository: sees, and draws by rectified flow in the latents of an autoencoder.
pub fn janusflow(decoder: &Decoder, tower: &Tower, width: usize, autoencoder: &Autoencoder) -> Recipe {
    let (mut tensors, hidden) = (Tensors::default(), decoder.hidden);
    decoder.tensors(&mut tensors, "language_model.model", "language_model.lm_head");
    tower.original(&mut tensors, "vision_und_enc_model.vision_tower");
    tensors.weight("vision_und_enc_aligner", &[hidden, tower.hidden], true);
    tensors.add("beg_of_und_embed", &[1, hidden], Fill::Noise(1.0));
    flow(&mut tensors, width, hidden, autoencoder.latent);
    let mut painter = Tensors::default();
    autoencoder.tensors(&mut painter);
    let shallow = json!({
        "block_out_channels": [width], "layers_in_middle": 2, "hidden_size": hidden, "norm_eps": 1e-6, "use_bias": true,
        "elementwise_affine": true, "dropout": 0.0, "use_mid_block": true,
    });
    let with = |fields: Value| {
        let mut params = shallow.clone();
        merge(&mut params, fields);
        params
    };
    let config = json!({
        "model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"], "torch_dtype": "bfloat16",
        "language_config": decoder.config(),
        "vision_und_enc_config": {"cls": "CLIPVisionTower", "model_type": "vision_und_enc", "params": {
            "image_size": tower.image, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1,
            "width": tower.hidden, "layers": tower.layers, "heads": tower.heads, "patch_size": tower.patch,
            "mlp_ratio": tower.inner / tower.hidden,
        }},
        "vision_gen_enc_config": {"cls": "ShallowUViTEncoder", "model_type": "vision_gen_enc", "params":
            with(json!({"input_channels": autoencoder.latent, "stride": 2, "kernel_size": 2, "padding": 0}))},
        "vision_gen_dec_config": {"cls": "ShallowUViTDecoder", "model_type": "vision_gen_dec", "params":
            with(json!({"in_channels": width, "out_channels": autoencoder.latent, "upsamples": 1}))},
    });
    let json = vec![
        ("config.json", config),
        ("generation_config.json", generation()),
        ("preprocessor_config.json", original_preprocessor(tower.image)),
        (
            "processor_config.json",
            json!({"add_special_token": false, "ignore_id": -100, "image_tag": "<image_placeholder>", "mask_prompt": true,
                   "num_image_tokens": tower.tokens(), "processor_class": "VLChatProcessor", "sft_format": "deepseek"}),
        ),
    ];
    let vae = Some(Vae { config: autoencoder_config(autoencoder), tensors: painter });
    let vocabulary = decoder.vocabulary;
    Recipe { name: "janusflow", about: "JanusFlow 1.3B with SDXL-VAE", tokenizer: Voice::Janus, vocabulary, json, tensors, vae }
}

/// DeepSeek-VL with both towers, in the layout of transformers: sees only.
pub fn vl_hybrid(decoder: &Decoder, tower: &Tower, sam: &Sam) -> Recipe {
    let (mut tensors, hidden) = (Tensors::default(), decoder.hidden);
    decoder.tensors(&mut tensors, "model.language_model", "lm_head");
    tower.port(&mut tensors, "model.vision_model.vision_model", "out_proj");
    sam.port(&mut tensors);
    tensors.weight("model.aligner.vision_proj", &[hidden / 2, tower.hidden], true);
    tensors.weight("model.aligner.high_res_vision_proj", &[hidden / 2, 4 * sam.output], true);
    tensors.weight("model.aligner.proj", &[hidden, hidden], true);
    let config = json!({
        "model_type": "deepseek_vl_hybrid", "architectures": ["DeepseekVLHybridForConditionalGeneration"], "image_token_id": 495,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "text_config": decoder.config(),
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": tower.hidden, "intermediate_size": tower.inner, "hidden_act": "gelu",
            "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads, "image_size": tower.image, "patch_size": tower.patch,
            "num_channels": 3, "layer_norm_eps": 1e-6, "vision_use_head": false,
        },
        "high_res_vision_config": {
            "model_type": "sam_vision_model", "hidden_size": sam.hidden, "mlp_dim": sam.inner, "num_hidden_layers": sam.layers,
            "num_attention_heads": sam.heads, "image_size": sam.image, "patch_size": sam.patch, "window_size": sam.window,
            "global_attn_indexes": sam.global, "output_channels": sam.output, "num_channels": 3, "hidden_act": "gelu",
            "layer_norm_eps": 1e-6, "qkv_bias": true, "use_abs_pos": true, "use_rel_pos": true,
        },
    });
    let mean = json!([0.481_454_66, 0.457_827_5, 0.408_210_73]);
    let deviation = json!([0.268_629_54, 0.261_302_58, 0.275_777_11]);
    let mut processor = preprocessor("DeepseekVLHybridImageProcessor", "DeepseekVLHybridProcessor", tower.image);
    merge(
        &mut processor,
        json!({
            "background_color": [122, 116, 104], "image_mean": mean, "image_std": deviation, "high_res_background_color": [122, 116, 104],
            "high_res_image_mean": mean, "high_res_image_std": deviation, "high_res_resample": 3,
            "high_res_size": {"height": sam.image, "width": sam.image},
        }),
    );
    let json = vec![
        ("config.json", config),
        ("generation_config.json", generation()),
        ("preprocessor_config.json", processor),
        ("processor_config.json", json!({"num_image_tokens": tower.tokens(), "processor_class": "DeepseekVLHybridProcessor"})),
    ];
    let (about, vocabulary) = ("DeepSeek-VL 7B, hybrid tower, 4 of 30 layers", decoder.vocabulary);
    Recipe { name: "vl-hybrid", about, tokenizer: Voice::Vl, vocabulary, json, tensors, vae: None }
}

/// Of the transformers ports whose pixels go from -1 to 1.
fn preprocessor(image_processor: &str, processor: &str, side: usize) -> Value {
    json!({
        "image_processor_type": image_processor, "processor_class": processor, "size": {"height": side, "width": side}, "min_size": 14,
        "background_color": [127, 127, 127], "do_resize": true, "do_pad": true, "do_rescale": true, "rescale_factor": 1.0 / 255.0,
        "do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3,
    })
}

fn original_preprocessor(side: usize) -> Value {
    json!({
        "image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor", "image_size": side, "min_size": 14,
        "background_color": [127, 127, 127], "rescale_factor": 1.0 / 255.0, "do_normalize": true, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    })
}

fn autoencoder_config(autoencoder: &Autoencoder) -> Value {
    let levels = autoencoder.channels.len();
    json!({
        "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3, "latent_channels": autoencoder.latent,
        "block_out_channels": autoencoder.channels, "layers_per_block": autoencoder.blocks, "norm_num_groups": autoencoder.groups,
        "down_block_types": vec!["DownEncoderBlock2D"; levels], "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": true, "mid_block_add_attention": true,
        "use_quant_conv": true, "use_post_quant_conv": true,
    })
}
