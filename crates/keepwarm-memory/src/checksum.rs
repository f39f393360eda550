//! Block checksums: XXH3-128 over the list of XXH3-64 of the block's 4 KiB chunks.
//!
//! The two levels make it a stream on a CPU and chunk-parallel on a GPU. XXH3: Yann Collet,
//! <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>.

use keepwarm_types::{BlockChecksum, InstanceId};
use twox_hash::{XxHash3_64, XxHash3_128};

/// Bytes of a chunk.
pub const CHUNK_BYTES: usize = 4096;

/// Stored bytes that do not have their checksum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("block instance {}: expected checksum {expected}, found {found}", instance.0)]
pub struct Corrupt {
    /// Which block.
    pub instance: InstanceId,
    /// What its manifest says.
    pub expected: BlockChecksum,
    /// What its bytes have.
    pub found: BlockChecksum,
}

/// The checksum of a whole block.
#[must_use]
pub fn block_checksum(bytes: &[u8]) -> BlockChecksum {
    let mut outer = XxHash3_128::new();
    for chunk in bytes.chunks(CHUNK_BYTES) {
        outer.write(&XxHash3_64::oneshot(chunk).to_le_bytes());
    }
    BlockChecksum::from_u128(outer.finish_128())
}

/// The checksum of a block whose bytes arrive in pieces.
///
/// Pieces that begin on a chunk boundary are hashed in place; only a chunk that is torn between pieces is
/// fed through the streaming state.
pub struct BlockHasher {
    outer: XxHash3_128,
    chunk: XxHash3_64,
    in_chunk: usize,
}

impl std::fmt::Debug for BlockHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockHasher({} bytes into a chunk)", self.in_chunk)
    }
}

impl Default for BlockHasher {
    fn default() -> Self {
        Self { outer: XxHash3_128::new(), chunk: XxHash3_64::new(), in_chunk: 0 }
    }
}

impl BlockHasher {
    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        use std::hash::Hasher;
        if self.in_chunk > 0 {
            let take = bytes.len().min(CHUNK_BYTES - self.in_chunk);
            self.chunk.write(&bytes[..take]);
            self.in_chunk += take;
            bytes = &bytes[take..];
            if self.in_chunk < CHUNK_BYTES {
                return;
            }
            self.outer.write(&self.chunk.finish().to_le_bytes());
            self.chunk = XxHash3_64::new();
            self.in_chunk = 0;
        }
        let mut chunks = bytes.chunks_exact(CHUNK_BYTES);
        for chunk in &mut chunks {
            self.outer.write(&XxHash3_64::oneshot(chunk).to_le_bytes());
        }
        let rest = chunks.remainder();
        if !rest.is_empty() {
            self.chunk.write(rest);
            self.in_chunk = rest.len();
        }
    }

    /// The checksum of all bytes taken.
    #[must_use]
    pub fn finish(mut self) -> BlockChecksum {
        use std::hash::Hasher;
        if self.in_chunk > 0 {
            self.outer.write(&self.chunk.finish().to_le_bytes());
        }
        BlockChecksum::from_u128(self.outer.finish_128())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};

    use super::*;

    proptest! {
        #[test]
        fn pieces_hash_like_the_whole(bytes in prop::collection::vec(any::<u8>(), 0..20_000), cut in 1usize..6000) {
            let mut hasher = BlockHasher::default();
            for piece in bytes.chunks(cut) {
                hasher.update(piece);
            }
            assert_eq!(hasher.finish(), block_checksum(&bytes));
        }
    }

    #[test]
    fn every_flipped_bit_of_a_sample_changes_the_checksum() {
        let mut bytes: Vec<u8> = (0..10_000u32).map(|n| (n * 7) as u8).collect();
        let sum = block_checksum(&bytes);
        for at in (0..bytes.len()).step_by(97) {
            bytes[at] ^= 1;
            assert_ne!(block_checksum(&bytes), sum, "byte {at}");
            bytes[at] ^= 1;
        }
    }
}
