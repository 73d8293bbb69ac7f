//! Structured output: which tokens may come next, so that a text satisfies a JSON schema, a regular expression or a grammar.
//!
//! The `llguidance` library does the work: it compiles a constraint to a lexer and an Earley parser over bytes and walks a trie of the
//! vocabulary to find the tokens that the parser lives through. This crate gives it the vocabulary of a checkpoint, limits that a hostile
//! constraint cannot pass, and a place in the engine: [`Grammars`] makes [`sched::Guide`]s.
//!
//! Which tokens are allowed depends on the constraint and the tokens before. How forced text is cut into tokens is left to the model: as
//! long as it says what the constraint allows, it says what it would have said without.
//!
//! | File | Holds |
//! |---|---|
//! | `grammars.rs` | [`Grammars`]: the vocabulary of a checkpoint, loaded when the first constraint comes |
//! | `compile.rs` | a constraint as a parser, within limits |
//! | `guide.rs` | the state of one output |

mod compile;
mod grammars;
mod guide;

pub use grammars::Grammars;
