//! The wire: messages, clients and server traits of package `janua.v1`, generated from `janua/v1/*.proto`.
//!
//! The generated files are committed; `make proto` writes them anew and the test `bootstrap` fails when they are stale.
//! No logic lives here: `wire` turns these messages into the types of `domain` and back.

/// Package `janua.v1`.
#[allow(clippy::all, clippy::pedantic)]
pub mod v1 {
    include!("gen/janua.v1.rs");
}

/// Encoded `FileDescriptorSet` of everything above, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/descriptor.bin");
