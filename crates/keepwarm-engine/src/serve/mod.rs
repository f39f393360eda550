//! Sequences of different sessions in one batch, their state in a GPU actor's own blocks.
//!
//! A [`Service`] has a runner per model: a thread that steps up to `batch.max` sequences together, mixing
//! prefill and decode. A turn is prepared before it joins the batch (history compared with the stored
//! transcript, session activated, blocks reserved) and committed after it leaves: the transcript before the
//! answer's last event, the state by checkpoint behind it.

mod branch;
mod kv;
mod plan;
mod replay;
mod runner;
mod turn;

pub use turn::{Service, ServiceError};

#[cfg(test)]
mod tests;
