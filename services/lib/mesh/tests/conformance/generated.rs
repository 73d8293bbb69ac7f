//! The service of `conformance.proto`, generated; `tests/bootstrap.rs` checks that it is current.

// The benchmark uses the calls, not the descriptor.
#![allow(clippy::all, clippy::pedantic, dead_code)]

include!("gen/conformance.v1.rs");

pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/descriptor.bin");
