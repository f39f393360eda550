//! Executors, batchers and the built-in engine.
//!
//! - [`chat`]: what a chat backend asks of an executor, and what comes back.
//! - [`model`]: a Llama-type model on the CPU, with its state in paged blocks.
//! - [`text`]: tokens, the chat template, stop texts.
//! - [`serve`]: sequences of different sessions in one batch, their state in a GPU actor's own blocks.

pub mod chat;
pub mod model;
pub mod serve;
pub mod text;
pub mod weights;

/// The real model's file for tests; says so where it is missing.
#[cfg(test)]
fn tests_model() -> Option<std::path::PathBuf> {
    let path = weights::cached();
    if path.is_none() {
        eprintln!("SKIPPED: no model weights; fetch them with `keepwarm model fetch`");
    }
    path
}
