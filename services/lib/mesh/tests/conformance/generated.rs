//! The service of `conformance.proto`, generated; `tests/bootstrap.rs` checks that it is current.

#![allow(clippy::all, clippy::pedantic)]

include!("gen/conformance.v1.rs");

pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/descriptor.bin");
