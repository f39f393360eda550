//! Counts of bytes and tokens, which must never be mistaken for each other.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! count {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// Zero of this unit.
            pub const ZERO: Self = Self(0);

            /// The plain number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The number as an index or length in memory.
            ///
            /// # Panics
            /// On targets whose `usize` cannot hold it; keepwarm supports 64-bit targets only.
            #[must_use]
            pub fn as_usize(self) -> usize {
                usize::try_from(self.0).expect("keepwarm runs on 64-bit targets")
            }

            /// `self - other`, or zero where `other` is larger.
            #[must_use]
            pub const fn saturating_sub(self, other: Self) -> Self {
                Self(self.0.saturating_sub(other.0))
            }

            /// `self + other`, or `None` where the sum overflows.
            #[must_use]
            pub const fn checked_add(self, other: Self) -> Option<Self> {
                match self.0.checked_add(other.0) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }
        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }
        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 - other.0)
            }
        }
        impl SubAssign for $name {
            fn sub_assign(&mut self, other: Self) {
                self.0 -= other.0;
            }
        }
        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
                Self(items.map(|item| item.0).sum())
            }
        }
        impl From<usize> for $name {
            fn from(value: usize) -> Self {
                Self(value as u64)
            }
        }
    };
}

count! {
    /// A number of bytes.
    Bytes
}
count! {
    /// A number of tokens.
    Tokens
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl fmt::Display for Bytes {
    /// The largest binary unit that divides the number well: `60GiB`, `1.5MiB`, `512B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, size) in UNITS {
            if self.0 >= size {
                let text = if self.0.is_multiple_of(size) {
                    format!("{}{unit}", self.0 / size)
                } else {
                    format!("{:.1}{unit}", self.0 as f64 / size as f64)
                };
                return f.pad(&text);
            }
        }
        f.pad("0B")
    }
}

/// Why a text is not a size in bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseBytesError {
    /// The text does not start with a number.
    #[error("'{0}' is not a size: write a whole number and a unit, as in 512MiB or 60GiB")]
    Form(String),
    /// The unit is none of B, KiB, MiB, GiB, TiB.
    #[error("unknown unit '{unit}' in '{text}': use B, KiB, MiB, GiB or TiB")]
    Unit {
        /// The unit as written.
        unit: String,
        /// The whole text.
        text: String,
    },
    /// The size does not fit 64 bits.
    #[error("'{0}' is larger than 2^64 bytes")]
    TooLarge(String),
}

impl FromStr for Bytes {
    type Err = ParseBytesError;

    /// Reads `60GiB`, `1 MiB`, `512B` or a plain number of bytes.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        if number.is_empty() {
            return Err(ParseBytesError::Form(text.to_owned()));
        }
        let number: u64 = number.parse().map_err(|_| ParseBytesError::TooLarge(text.to_owned()))?;
        let unit = unit.trim();
        let size = match unit {
            "" => 1,
            _ => UNITS
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(unit))
                .map(|(_, size)| *size)
                .ok_or_else(|| ParseBytesError::Unit { unit: unit.to_owned(), text: text.to_owned() })?,
        };
        number.checked_mul(size).map(Self).ok_or_else(|| ParseBytesError::TooLarge(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print_alike() {
        for text in ["0B", "512B", "4KiB", "1MiB", "60GiB", "2TiB"] {
            assert_eq!(text.parse::<Bytes>().unwrap().to_string(), text);
        }
        assert_eq!("1 mib".parse::<Bytes>(), Ok(Bytes(1 << 20)));
        assert_eq!(Bytes(3 << 19).to_string(), "1.5MiB");
    }

    #[test]
    fn bad_sizes_say_what_is_wrong() {
        assert!(matches!("GiB".parse::<Bytes>(), Err(ParseBytesError::Form(_))));
        assert!(matches!("5GB".parse::<Bytes>(), Err(ParseBytesError::Unit { .. })));
        assert!(matches!("99999999999TiB".parse::<Bytes>(), Err(ParseBytesError::TooLarge(_))));
    }
}
