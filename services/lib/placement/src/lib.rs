//! Which shard holds which routed experts: plain data and arithmetic, the same for those who hold experts, call them, and move them.
//!
//! | File | Holds |
//! |---|---|
//! | `range.rs` | [`ExpertRange`]: what a shard is, and its name |
//! | `manifest.rs` | [`Manifest`]: the shards of a model as they stand in the key-value bucket |
//! | `balance.rs` | [`balance`]: which experts to copy where |

mod balance;
mod manifest;
mod range;

pub use balance::{Balance, Copy, balance, loads};
pub use manifest::{BUCKET, Manifest};
pub use range::{ExpertRange, RangeError};
