//! The mesh's conformance suite: one list of cases, and every case runs over every wire with a real nats-server.

mod bootstrap;
