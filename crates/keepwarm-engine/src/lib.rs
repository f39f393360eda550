//! Executors, batchers and the built-in engine.
//!
//! - [`chat`]: what a chat backend asks of an executor, and what comes back.

pub mod chat;
