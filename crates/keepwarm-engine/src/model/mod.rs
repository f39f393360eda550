//! A Llama-type model on the CPU.
//!
//! Rows are independent, bit for bit: a token's keys, values and logits do not depend on what else is in the
//! batch, on how its prompt was cut into chunks, nor on whether it was prefilled or decoded. The promise that
//! an evicted conversation goes on with the tokens it would have had rests on that. It holds because every
//! reduction runs in an order of its own: matrix products go through `gemm` kernels whose order depends on
//! the inner length alone (from two rows on, so one row is padded), attention runs over key tiles aligned to
//! absolute positions, and masked keys contribute exact zeros.

mod attention;
mod forward;
mod gguf;
mod header;
mod kv;
mod math;
mod sample;
mod tiny;
mod weights;

pub use gguf::LoadError;
pub(crate) use gguf::Metadata;
pub use kv::{HeapKv, KvCache};
pub use sample::{Sampler, Sampling};
pub use weights::{Geometry, Model};

/// Most tokens of one sequence in one step.
pub const CHUNK_TOKENS_MAX: usize = 256;

/// One sequence's share of a step.
pub struct Step<'a> {
    /// New tokens, at most [`CHUNK_TOKENS_MAX`].
    pub tokens: &'a [u32],
    /// Position of the first of them.
    pub position: usize,
    /// The sequence's state; its blocks reach to the last new token.
    pub kv: &'a mut dyn KvCache,
    /// Whether the logits of the last token are wanted.
    pub logits: bool,
}

impl std::fmt::Debug for Step<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Step({} tokens at {})", self.tokens.len(), self.position)
    }
}

/// A step that could not be computed.
#[derive(Debug, thiserror::Error)]
#[error("the model failed: {0}")]
pub struct StepError(pub(crate) String);

impl From<candle_core::Error> for StepError {
    fn from(error: candle_core::Error) -> Self {
        Self(error.to_string())
    }
}

#[cfg(test)]
mod tests;
