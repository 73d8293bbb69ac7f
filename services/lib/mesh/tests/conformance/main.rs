//! Every case over every wire, with a real nats-server.
//!
//! A case is an `async fn(Over)`; naming it in `conformance!` makes a test of it for each wire in the brackets. Cases about a
//! broker or about another process leave out the wires that have none.

#![allow(clippy::unwrap_used)]

#[macro_use]
mod world;
mod generated;
mod service;

mod basics;
mod broker;
mod bucket;
mod control;
mod limits;
mod pinned;
mod processes;
mod scale;

mod content;
mod faults;
mod script;
mod soak;
mod streams;
