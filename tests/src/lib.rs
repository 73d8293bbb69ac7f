//! What the end-to-end tests share: services started in this process over any wire, requests, answers, and golden outputs.
#![allow(clippy::unwrap_used)]

mod answer;
mod golden;
pub mod request;
mod world;

pub use answer::Answer;
pub use golden::{Drawing, Golden, GoldenPrompt};
pub use world::{Client, Wire, World};
