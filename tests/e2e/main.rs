//! Real requests to real services in this process, through the public gRPC door.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod company;
mod fairness;
mod golden;
mod options;
mod pictures;
