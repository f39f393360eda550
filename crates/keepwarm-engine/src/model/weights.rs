//! A model's weights and geometry.

use candle_core::Tensor;

use crate::text::Tokenizer;

/// Tokens of a block of state.
pub(super) const TOKENS_PER_BLOCK: usize = 16;

/// A model's sizes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Geometry {
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
    /// Base of the rotation's frequencies.
    pub rope_base: f32,
    /// Added to the mean square.
    pub epsilon: f32,
    /// Tokens of a block of state.
    pub tokens_per_block: usize,
}

impl Geometry {
    /// Values of a token's keys (or values) in a layer.
    #[must_use]
    pub const fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Planes of the state: keys and values of each layer.
    #[must_use]
    pub const fn planes(&self) -> usize {
        2 * self.layers
    }

    /// Bytes of a token in a plane.
    #[must_use]
    pub const fn plane_bytes_per_token(&self) -> usize {
        2 * self.kv_width()
    }

    /// Bytes of a token's state.
    #[must_use]
    pub const fn kv_bytes_per_token(&self) -> usize {
        self.planes() * self.plane_bytes_per_token()
    }

    /// Bytes of a block of state.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.kv_bytes_per_token() * self.tokens_per_block
    }
}

/// A layer's weights: matrices as `inner x columns`.
pub(super) struct Layer {
    pub(super) attention_norm: Vec<f32>,
    /// Queries, keys and values, side by side.
    pub(super) qkv: Tensor,
    pub(super) output: Tensor,
    pub(super) ffn_norm: Vec<f32>,
    /// Gate and up, side by side.
    pub(super) gate_up: Tensor,
    pub(super) down: Tensor,
}

/// A model, ready to run. Shared by all its contexts.
pub struct Model {
    pub(super) geometry: Geometry,
    pub(super) embeddings: Vec<f32>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    /// `width x vocab`, lying transposed.
    pub(super) unembedding: Tensor,
    pub(super) tokenizer: Tokenizer,
    pub(super) fingerprint: String,
    pub(super) random: bool,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("geometry", &self.geometry)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

impl Model {
    /// Its sizes.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Its vocabulary and chat template.
    #[must_use]
    pub const fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// What changes the meaning of its state: the weights, and how this engine lays keys and values.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Whether its weights are random, for want of real ones.
    #[must_use]
    pub const fn is_random(&self) -> bool {
        self.random
    }
}
