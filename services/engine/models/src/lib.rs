//! Model families: one file per family, chosen by what `config.json` says.
//!
//! | File | Holds |
//! |---|---|
//! | `registry.rs` | which family a checkpoint is of; [`load_language`] and [`card`] |
//! | `text_config.rs` | the decoder's part of a configuration, completed and checked |
//! | `generation.rs` | sampling defaults of `generation_config.json` |
//! | `llama.rs` | DeepSeek LLM: the decoder that the other families share |
//! | `deepseek.rs` | DeepSeekMoE: which layers have experts, and how they are chosen |
//! | `deepseek_v2.rs` | DeepSeek-V2: latent attention and YaRN |
//! | `sizes.rs` | how many numbers a decoder is made of, without its weights; [`sizes`] |
//! | `shard.rs` | some of a checkpoint's routed experts by themselves; [`load_shard`] |
//! | `janus.rs` | Janus: the decoder with a second embedding and a second head for VQ codes |
//! | `janusflow.rs` | JanusFlow: the decoder between the two networks of a flow |
//! | `uvit.rs` | these networks as ONNX graphs: latent maps to rows, hidden states to velocities |
//! | `deepseek_vl.rs` | DeepSeek-VL: the decoder behind one or two vision towers |
//! | `siglip.rs` | the SigLIP tower as an ONNX graph |
//! | `sam/` | the SAM tower of the hybrid models as an ONNX graph |
//! | `vision.rs` | pixels to embeddings: towers and aligner; [`load_vision`] |
//! | `vq.rs` | codes to pixels: the VQ decoder as an ONNX graph; [`load_vq`] |
//! | `vae.rs` | latent maps to pixels: the VAE decoder as an ONNX graph |
//! | `painter.rs` | either of the two, for the model at hand; [`load_painter`] |
//! | `onnx.rs` | what the ONNX models share |

mod deepseek;
mod deepseek_v2;
mod deepseek_vl;
mod generation;
mod janus;
mod janusflow;
mod llama;
mod registry;
mod shard;
mod sizes;
mod text_config;

pub use registry::{LoadOptions, card, kv_block_bytes, load_language, load_language_around, load_language_on};
pub use shard::{Computation, ExpertShape, Shard, expert_of, expert_shape, load_shard};
pub use sizes::{DecoderSizes, ExpertSizes, sizes};

// The vision side (siglip.rs, vq.rs) is declared below this line.
mod onnx;
mod painter;
mod sam;
mod siglip;
mod uvit;
mod vae;
mod vision;
mod vq;

pub use backend_onnx::{RUN_SETTINGS as ONNX_RUN_SETTINGS, SETTINGS as ONNX_SETTINGS, SessionOptions as OnnxOptions, runtime_version};
pub use onnx::Probe;
pub use painter::{Painter, load_painter};
pub use vae::{VaeDecoder, vae_folder};
pub use vision::{Planes, VisionEncoder, load_vision};
pub use vq::{VqDecoder, load_vq, pixels_to_rgb};
