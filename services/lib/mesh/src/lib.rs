//! One gRPC contract over three wires.
//!
//! A service author writes a tonic trait impl and hands it to [`Mesh::serve`] in [`Routes`]; a caller builds the generated client
//! on [`Mesh::channel`], or on [`Mesh::channel_to`] to reach one instance and no other. Whether a function call, a nats-server or an HTTP/2 connection lies between the two is configuration.
//!
//! | File | Holds |
//! |---|---|
//! | `mesh.rs` | joining, offering, draining |
//! | `routes.rs`, `health.rs` | what is offered: tonic servers, health and reflection |
//! | `channel.rs` | the client side of every wire: span, trace context, deadline |
//! | `call.rs`, `gate.rs` | the server side of every wire: span, deadline, panics, limit, drain |
//! | `bucket.rs` | small values that all processes see |
//! | `spread.rs` | hashing of call ids |
//! | `local.rs` | wire `in-process` |
//! | `nats/` | wire `nats`: messages through a nats-server |
//! | `direct/` | wire `direct`: HTTP/2, also for clients from outside |
//!
//! No other crate knows NATS or HTTP/2.

mod bucket;
mod call;
mod channel;
mod config;
mod deadline;
mod direct;
mod error;
mod gate;
mod health;
mod local;
mod mesh;
mod nats;
mod routes;
mod spread;
mod target;

pub use bucket::Bucket;
pub use channel::Channel;
pub use config::{MeshConfig, Wire};
pub use direct::listen;
pub use error::MeshError;
pub use mesh::{Mesh, Serving};
pub use routes::Routes;
pub use target::{InstanceName, Target};

/// The longest gRPC message that services send or take, in bytes. Set it on clients and servers with
/// `max_decoding_message_size` and `max_encoding_message_size`; tonic's own default for receiving is 4 MiB.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
