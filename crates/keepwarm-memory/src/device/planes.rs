//! Between an engine's planes (strided, room for a whole block) and the packed form that is stored.
//!
//! In both, planes follow each other; in the engine's working block each plane has room for
//! `tokens_per_block` tokens, in the packed form just for the valid ones. A full block is the same in both.

/// The shape of a plane-ordered block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaneShape {
    /// Planes in the block.
    pub planes: usize,
    /// Tokens that a full block holds.
    pub tokens_per_block: usize,
    /// Bytes of one token in one plane.
    pub token_bytes: usize,
}

impl PlaneShape {
    /// Bytes of a full block.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.planes * self.tokens_per_block * self.token_bytes
    }

    /// Bytes of a packed block of `tokens` tokens.
    #[must_use]
    pub const fn packed_bytes(&self, tokens: usize) -> usize {
        self.planes * tokens * self.token_bytes
    }
}

/// Packs the first `tokens` tokens of each plane of a working block.
///
/// # Panics
/// If a slice is shorter than the shape says.
pub fn gather(shape: &PlaneShape, working: &[u8], tokens: usize, packed: &mut [u8]) {
    assert!(tokens <= shape.tokens_per_block, "{tokens} tokens do not fit a block");
    let (stride, used) = (shape.tokens_per_block * shape.token_bytes, tokens * shape.token_bytes);
    for plane in 0..shape.planes {
        packed[plane * used..][..used].copy_from_slice(&working[plane * stride..][..used]);
    }
}

/// Spreads a packed block of `tokens` tokens over the planes of a working block.
///
/// # Panics
/// If a slice is shorter than the shape says.
pub fn scatter(shape: &PlaneShape, packed: &[u8], tokens: usize, working: &mut [u8]) {
    assert!(tokens <= shape.tokens_per_block, "{tokens} tokens do not fit a block");
    let (stride, used) = (shape.tokens_per_block * shape.token_bytes, tokens * shape.token_bytes);
    for plane in 0..shape.planes {
        working[plane * stride..][..used].copy_from_slice(&packed[plane * used..][..used]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::proptest;

    use super::*;

    proptest! {
        #[test]
        fn scatter_undoes_gather(planes in 1usize..8, per_block in 1usize..9, token_bytes in 1usize..17, share in 0usize..100) {
            let shape = PlaneShape { planes, tokens_per_block: per_block, token_bytes };
            let tokens = per_block * share / 99;
            let working: Vec<u8> = (0..shape.block_bytes()).map(|n| (n % 251) as u8).collect();
            let mut packed = vec![0; shape.packed_bytes(tokens)];
            gather(&shape, &working, tokens, &mut packed);
            let mut back = vec![0; shape.block_bytes()];
            scatter(&shape, &packed, tokens, &mut back);
            for plane in 0..planes {
                for at in 0..per_block * token_bytes {
                    let place = plane * per_block * token_bytes + at;
                    let expected = if at < tokens * token_bytes { working[place] } else { 0 };
                    assert_eq!(back[place], expected);
                }
            }
        }
    }
}
