//! Counters that order lives, writes and owners.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The one after this.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

counter! {
    /// Per birth, +1 for each committed write.
    Revision
}
counter! {
    /// Per shard, +1 at each change of its replica set; fences whoever is stale.
    Generation
}
counter! {
    /// Per session, +1 for each lease granted.
    Epoch
}
counter! {
    /// Per node, given at each start.
    Incarnation
}
counter! {
    /// Per session, +1 at each committed change of its holders.
    PlacementSeq
}

/// A session's life: new at each create, so that a reused id is never taken for the old one.
///
/// 50 random bits, printed as ten digits of Crockford's base 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Birth(u64);

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const BIRTH_DIGITS: u32 = 10;

impl Birth {
    /// From random bits, of which the low 50 are used.
    #[must_use]
    pub const fn from_random(bits: u64) -> Self {
        Self(bits & ((1 << (5 * BIRTH_DIGITS)) - 1))
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Birth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (0..BIRTH_DIGITS).rev().try_for_each(|digit| {
            let value = (self.0 >> (5 * digit)) & 31;
            write!(f, "{}", ALPHABET[value as usize] as char)
        })
    }
}

/// The text is not a birth.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a birth: ten digits of base 32")]
pub struct ParseBirthError(String);

impl FromStr for Birth {
    type Err = ParseBirthError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseBirthError(text.to_owned());
        if text.len() != BIRTH_DIGITS as usize {
            return Err(error());
        }
        text.bytes()
            .try_fold(0u64, |value, byte| {
                let digit = ALPHABET.iter().position(|letter| *letter == byte)?;
                Some((value << 5) | digit as u64)
            })
            .map(Self)
            .ok_or_else(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn births_print_and_parse_alike() {
        for bits in [0, 1, 0x1234_5678_9abc, u64::MAX] {
            let birth = Birth::from_random(bits);
            assert_eq!(birth.to_string().parse(), Ok(birth));
            assert_eq!(birth.to_string().len(), 10);
        }
        assert!("short".parse::<Birth>().is_err());
        assert!("iiiiiiiiii".parse::<Birth>().is_err());
    }
}
