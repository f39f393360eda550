//! Where a sequence's keys and values live: f16, in blocks, plane by plane.
//!
//! Plane `2 * layer` holds a layer's keys (after rotation), plane `2 * layer + 1` its values; a plane of a
//! block is `tokens_per_block` rows of `kv_heads * head_dim` values.

use half::f16;

use super::weights::Geometry;

/// A sequence's state.
pub trait KvCache: Send + Sync {
    /// The rows of a plane in a block: all of the block's tokens, written or not.
    fn plane(&self, block: usize, plane: usize) -> &[f16];

    /// The same, to write. Only blocks at or behind the first new token's are asked for.
    fn plane_mut(&mut self, block: usize, plane: usize) -> &mut [f16];
}

/// State on the heap: for sequences without a session, and for those that found no room.
#[derive(Debug)]
pub struct HeapKv {
    blocks: Vec<Vec<f16>>,
    plane: usize,
}

impl HeapKv {
    /// Room for `tokens` tokens.
    #[must_use]
    pub fn new(geometry: &Geometry, tokens: usize) -> Self {
        let blocks = tokens.div_ceil(geometry.tokens_per_block);
        let plane = geometry.tokens_per_block * geometry.kv_width();
        Self { blocks: vec![vec![f16::ZERO; plane * geometry.planes()]; blocks], plane }
    }
}

impl KvCache for HeapKv {
    fn plane(&self, block: usize, plane: usize) -> &[f16] {
        &self.blocks[block][plane * self.plane..][..self.plane]
    }

    fn plane_mut(&mut self, block: usize, plane: usize) -> &mut [f16] {
        &mut self.blocks[block][plane * self.plane..][..self.plane]
    }
}
