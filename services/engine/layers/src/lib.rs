//! What model families are written in: the step they compute, the backend they compute on, and the layers they share.
//!
//! | File | Holds |
//! |---|---|
//! | `step.rs` | one forward pass: rows of many sequences, block tables, heads asked for |
//! | `check.rs` | the contract of a step, checked once before it is computed |
//! | `model.rs` | [`LanguageModel`], what a scheduler sees of a model, and [`Observer`] |
//! | `flow.rs` | [`FlowModel`], what surrounds a language model that draws by a flow |
//! | `backend.rs` | [`Backend`]: the small set of operations that models are made of |
//! | `weights.rs` | tensors of a checkpoint by path, shapes and types checked |
//! | `linear.rs`, `norm.rs`, `rope.rs`, `attention.rs`, `latent.rs`, `mlp.rs` | layers, written once over the backend |
//! | `routing.rs`, `moe.rs`, `experts.rs` | which experts a token goes to; the layer of experts; who computes them |
//! | `output.rs` | from the rows that want logits to the step's output |

pub mod attention;
pub mod backend;
pub mod check;
pub mod error;
pub mod experts;
pub mod flow;
pub mod latent;
pub mod linear;
pub mod mlp;
pub mod model;
pub mod moe;
pub mod norm;
pub mod output;
pub mod rope;
pub mod routing;
pub mod step;
pub mod weights;

pub use attention::{Attention, AttentionShape};
pub use backend::{Attend, Backend, HeadRows, KvEntry, KvShape, Pairs, Rotation};
pub use check::Limits;
pub use error::EngineError;
pub use experts::{Combine, Experts, LocalExperts, Mixture, RemoteExperts, Rows, Term};
pub use flow::{FlowInput, FlowModel};
pub use latent::{LatentAttention, LatentShape};
pub use linear::Linear;
pub use mlp::{Projector, SwiGlu};
pub use model::{LanguageModel, NoObserver, Observer};
pub use moe::{Losses, Moe, MoeShape};
pub use norm::RmsNorm;
pub use output::observe;
pub use rope::{Rope, Yarn};
pub use routing::{Gating, Groups, Routing, Share};
pub use step::{BLOCK_TOKENS, BlockId, Head, RowInput, Slice, Step, StepOutput};
pub use weights::Weights;
