//! Processes that are killed, stopped and cut off while they work, and networks that lose what is sent.
//!
//! | File | Holds |
//! |---|---|
//! | `installation.rs` | a broker, the services and replicas of shards, each a process |
//! | `load.rs` | streams whose ids are known, again and again |
//! | `killed.rs` | replicas that die, hang and leave |
//! | `network.rs` | shards behind links with delay and loss |
//! | `link.rs` | such links, between namespaces |
//! | `rhythm.rs` | what such a link makes of questions and answers, measured and calculated |
//!
//! `JANUA_FAULT_SECONDS` says how long replicas are killed (10), and with it how long everything else takes. `make faults` gives a minute.
#![allow(clippy::unwrap_used)]

mod installation;
mod killed;
mod link;
mod load;
mod network;
mod rhythm;
