//! A sequence's state in a GPU's memory: shared sealed blocks, then working blocks of its own.
//!
//! On a host device the CPU engine computes in place: what it writes is the GPU's memory. Elsewhere the blocks lie in a
//! region of the host's that the node copies from the GPU and, once they are sealed, to it.

use half::f16;
use keepwarm_memory::{Block, BlockMut, PlaneShape, gather, scatter};
use keepwarm_types::Owner;

use crate::model::{Geometry, HeapKv, KvCache};

/// The shape of a model's blocks.
pub(super) const fn shape(geometry: &Geometry) -> PlaneShape {
    PlaneShape {
        planes: geometry.planes(),
        tokens_per_block: geometry.tokens_per_block,
        token_bytes: geometry.plane_bytes_per_token(),
    }
}

/// State in a GPU's blocks.
#[derive(Debug)]
pub(super) struct GpuKv {
    shape: PlaneShape,
    owner: Owner,
    /// Full blocks of earlier turns.
    shared: Vec<Block>,
    /// Working blocks behind them.
    own: Vec<BlockMut>,
    /// For packing a part-full last block.
    spare: BlockMut,
}

impl GpuKv {
    /// Begins behind `cached` tokens of `blocks`; `working` has room for the rest and one block more.
    /// None where the blocks do not have those tokens.
    pub(super) fn new(
        shape: PlaneShape,
        owner: Owner,
        blocks: &[Block],
        cached: usize,
        mut working: Vec<BlockMut>,
    ) -> Option<Self> {
        let whole = cached / shape.tokens_per_block;
        let spare = working.pop()?;
        for block in &mut working {
            block.bytes_mut();
        }
        let rest = cached % shape.tokens_per_block;
        if rest > 0 {
            let tail = blocks.get(whole)?;
            let bytes = tail.bytes(&owner).ok()?;
            let tokens = tail.length() / shape.packed_bytes(1);
            let first = working.first_mut()?;
            if tokens < rest {
                return None;
            }
            scatter(&shape, bytes, tokens, first.bytes_mut());
        }
        let shared: Vec<_> = blocks.get(..whole)?.to_vec();
        let full = |block: &Block| block.length() == shape.block_bytes() && block.bytes(&owner).is_ok();
        shared.iter().all(full).then_some(Self { shape, owner, shared, own: working, spare })
    }

    /// Whose state it is.
    pub(super) fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Number of the first working block.
    pub(super) fn first_own(&self) -> usize {
        self.shared.len()
    }

    /// Seals what `tokens` tokens fill: full blocks as they are, the last packed.
    pub(super) fn seal(self, tokens: usize) -> Result<Vec<Block>, String> {
        let filled = tokens - self.shared.len() * self.shape.tokens_per_block;
        let (full, rest) = (filled / self.shape.tokens_per_block, filled % self.shape.tokens_per_block);
        let mut spare = self.spare;
        let mut blocks = Vec::with_capacity(full + 1);
        for (at, block) in self.own.into_iter().enumerate() {
            let sealed = match at {
                at if at < full => block.seal(self.shape.block_bytes()),
                at if at == full && rest > 0 => {
                    let packed = self.shape.packed_bytes(rest);
                    gather(&self.shape, block.bytes(), rest, &mut spare.bytes_mut()[..packed]);
                    drop(block);
                    blocks.push(spare.seal(packed).map_err(|(_, error)| error.to_string())?);
                    break;
                }
                _ => break,
            };
            blocks.push(sealed.map_err(|(_, error)| error.to_string())?);
        }
        Ok(blocks)
    }
}

impl KvCache for GpuKv {
    fn plane(&self, block: usize, plane: usize) -> &[f16] {
        let bytes = match self.shared.get(block) {
            Some(shared) => shared.bytes(&self.owner).expect("owners were checked when the turn began"),
            None => self.own[block - self.shared.len()].bytes(),
        };
        let length = self.shape.tokens_per_block * self.shape.token_bytes;
        bytemuck::cast_slice(&bytes[plane * length..][..length])
    }

    fn plane_mut(&mut self, block: usize, plane: usize) -> &mut [f16] {
        let length = self.shape.tokens_per_block * self.shape.token_bytes;
        let bytes = self.own[block - self.shared.len()].bytes_mut();
        bytemuck::cast_slice_mut(&mut bytes[plane * length..][..length])
    }
}

/// A sequence's state, wherever it is.
#[derive(Debug)]
pub(super) enum State {
    /// On the heap: no session, or no room.
    Heap(HeapKv),
    /// In a GPU's blocks.
    Gpu(GpuKv),
}

impl State {
    pub(super) fn cache(&mut self) -> &mut dyn KvCache {
        match self {
            Self::Heap(kv) => kv,
            Self::Gpu(kv) => kv,
        }
    }
}
