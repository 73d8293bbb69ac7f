//! The nats wire: a gRPC call as NATS messages.
//!
//! | Subject | Who listens | What for |
//! |---|---|---|
//! | `janua.<service>.<model>[.<shard>]` | the target's instances, as one queue group | the first message of a call |
//! | `janua-node.<node>` | one process | later messages of its calls, probes |
//! | `janua-all.<service>.<model>[.<shard>]` | each instance of the target | who has my call, who is there |
//! | `janua-one.<service>.<model>[.<shard>].<instance>` | one instance of the target | the first message of a call to it, is it there |
//! | `$SRV.…` | each instance | the NATS services API |
//!
//! | File | Holds |
//! |---|---|
//! | `frame.rs`, `head.rs` | the bytes of a message |
//! | `flow.rs` | credit, and the queue of what has arrived |
//! | `outgoing.rs` | gathering frames into messages |
//! | `node.rs`, `call.rs` | the connection and the calls that use it |
//! | `client.rs`, `server.rs` | making and running a call |
//! | `offer.rs`, `micro.rs` | offering a target, leaving without loss, the services API |
//! | `probe.rs` | noticing that the other end has died |
//! | `store.rs` | buckets, in the server's JetStream |
//!
//! Messages carry gRPC's byte stream and know nothing of its messages: a message of 50 MB is many pieces, a thousand short ones
//! that are ready together are one.

mod call;
mod client;
mod flow;
mod frame;
mod head;
mod micro;
mod node;
mod offer;
mod outgoing;
mod probe;
mod server;
mod store;

pub(crate) use client::call;
pub(crate) use node::{Connected, Node};
pub(crate) use offer::{Found, Located, Offer, find, is_served, locate};
pub(crate) use store::Store;
