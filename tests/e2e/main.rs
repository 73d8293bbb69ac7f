//! Real requests to real services in this process, through the public gRPC door.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod company;
mod experts;
mod fairness;
mod flow;
mod golden;
mod options;
mod pictures;
mod structured;
