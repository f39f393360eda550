//! Digests: of a block's bytes and of a layout.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The checksum of a block: XXH3-128 over the list of XXH3-64 of its 4 KiB chunks, high half first.
///
/// Kept as two words so that a table of blocks has no 16-byte alignment holes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockChecksum(pub [u64; 2]);

impl BlockChecksum {
    /// From the 128-bit value.
    #[must_use]
    pub const fn from_u128(value: u128) -> Self {
        Self([(value >> 64) as u64, value as u64])
    }

    /// The 128-bit value.
    #[must_use]
    pub const fn as_u128(self) -> u128 {
        ((self.0[0] as u128) << 64) | self.0[1] as u128
    }
}

impl fmt::Display for BlockChecksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.0[0], self.0[1])
    }
}

/// BLAKE3 of a layout's canonical encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayoutHash(pub [u8; 32]);

impl LayoutHash {
    /// The hash of a layout's canonical encoding (the core's layout module defines that encoding).
    #[must_use]
    pub fn of(canonical: &[u8]) -> Self {
        Self(*blake3::hash(canonical).as_bytes())
    }
}

impl fmt::Display for LayoutHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

/// The text is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a digest of 64 hexadecimal digits")]
pub struct ParseDigestError(String);

impl FromStr for LayoutHash {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        blake3::Hash::from_hex(text)
            .map(|hash| Self(*hash.as_bytes()))
            .map_err(|_| ParseDigestError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_print_and_parse_alike() {
        let hash = LayoutHash::of(b"layout");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert!("xyz".parse::<LayoutHash>().is_err());
        let sum = BlockChecksum::from_u128(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(sum.as_u128(), 0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(sum.to_string(), "0123456789abcdef0011223344556677");
    }
}
