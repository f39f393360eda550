//! What cold tiers keep of a part: its bytes as they are, or FP8 numbers, which are fewer and not the same.
//!
//! Colder than a GPU's memory is everything else: pinned memory, peers, whatever comes below. There a block has its
//! *stored* bytes; what clients and models see are its *raw* ones. Of a part without a cold form both are the same.

use keepwarm_types::Bytes;

use super::layout::{Form, Part};

/// Bytes of a plane's scale in a stored block.
pub const SCALE_BYTES: u64 = 4;
/// Largest raw block of a part with a cold form: readers and writers convert a whole one at once, in memory that no arena
/// counts. 16 tokens of an 8B model's state in halves are 2 MiB.
const NARROWED_BLOCK_MAX: u64 = 8 << 20;

/// What a part's numbers are, in little-endian bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Number {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Number {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The word that the API uses.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// Cold tiers keep a code of FP8 (E4M3) for each number, and a scale for each plane of a block.
///
/// A stored block is a little-endian binary32 for each plane, then each plane's codes: for `n` raw bytes of `p` planes,
/// `4 * p + n / from.bytes()` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fp8 {
    /// What the numbers are where they are warm.
    pub from: Number,
}

impl Part {
    /// Planes of a block and bytes of a number, where the cold form is another.
    fn narrowed(&self) -> Option<(u64, u64)> {
        let planes = self.form.planes()?;
        self.cold.map(|Fp8 { from }| (planes.planes.into(), from.bytes()))
    }

    /// Stored bytes of a block of so many raw ones.
    #[must_use]
    pub fn stored_bytes(&self, raw: u64) -> u64 {
        match self.narrowed() {
            Some((planes, number)) if raw > 0 => SCALE_BYTES * planes + raw / number,
            _ => raw,
        }
    }

    /// Raw bytes of a block of so many stored ones; none where no block of whole tokens has so many.
    #[must_use]
    pub fn raw_bytes(&self, stored: u64) -> Option<u64> {
        let Some((planes, number)) = self.narrowed() else { return Some(stored) };
        let raw = match stored {
            0 => 0,
            _ => stored.checked_sub(SCALE_BYTES * planes).filter(|codes| *codes > 0)?.checked_mul(number)?,
        };
        let token = self.form.planes()?.token_bytes();
        raw.is_multiple_of(token).then_some(raw)
    }

    /// Stored bytes of a full block.
    #[must_use]
    pub fn stored_block_bytes(&self) -> u64 {
        self.stored_bytes(self.form.block_bytes())
    }

    /// Raw bytes of blocks with these stored lengths; none where a length is not a block's.
    pub(crate) fn raw_sum(&self, stored: impl IntoIterator<Item = u32>) -> Option<Bytes> {
        let mut raw = stored.into_iter().map(|length| self.raw_bytes(length.into()));
        raw.try_fold(0u64, |sum, bytes| sum.checked_add(bytes?)).map(Bytes)
    }

    /// What is wrong with its cold form: the field below `cold`, and why.
    pub(super) fn check_cold(&self) -> Result<(), (&'static str, String)> {
        let Some(Fp8 { from }) = self.cold else { return Ok(()) };
        let Form::Paged(planes) = &self.form else {
            let reason = format!("a {} part is kept as it is: only paged parts may say it", self.form.word());
            return Err(("", reason));
        };
        if planes.order != super::layout::Order::Plane {
            let reason = "needs order = plane: a scale is one plane's of a block".to_owned();
            return Err(("", reason));
        }
        let (row, number) = (u64::from(planes.plane_bytes_per_token), from.bytes());
        if !row.is_multiple_of(number) {
            let reason =
                format!("plane_bytes_per_token is {row}, which is no whole number of {}", from.word());
            return Err((".from", reason));
        }
        let (raw, stored) = (self.form.block_bytes(), self.stored_block_bytes());
        if stored >= raw {
            let reason = format!("a block of {raw} bytes would take {stored}: use more tokens_per_block");
            return Err(("", reason));
        }
        if raw > NARROWED_BLOCK_MAX {
            let reason = format!(
                "a block of {raw} bytes is larger than {NARROWED_BLOCK_MAX}, the most that is converted: use fewer tokens_per_block"
            );
            return Err(("", reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::layout::{Layout, Order, Planes};
    use super::*;

    fn part(tokens_per_block: u32, row: u32, from: Number) -> Part {
        let planes = Planes { tokens_per_block, planes: 3, plane_bytes_per_token: row, order: Order::Plane };
        Part { name: "kv".parse().unwrap(), form: Form::Paged(planes), cold: Some(Fp8 { from }) }
    }

    #[test]
    fn stored_sizes_are_scales_and_codes_and_lead_back() {
        let halves = part(16, 8, Number::F16);
        assert_eq!((halves.form.block_bytes(), halves.stored_block_bytes()), (384, 12 + 192));
        assert_eq!(part(16, 8, Number::F32).stored_block_bytes(), 12 + 96);
        for tokens in 0..=16 {
            let raw = 24 * tokens;
            let stored = halves.stored_bytes(raw);
            assert_eq!(stored, if tokens == 0 { 0 } else { 12 + 12 * tokens });
            assert_eq!(halves.raw_bytes(stored), Some(raw));
        }
        // Less than the scales, and half a token.
        assert_eq!((halves.raw_bytes(11), halves.raw_bytes(12 + 6)), (None, None));
        assert_eq!(halves.raw_sum([204, 24]), Some(Bytes(384 + 24)));
        assert_eq!(halves.raw_sum([204, 25]), None);
        let exact = Part { cold: None, ..halves };
        assert_eq!((exact.stored_bytes(77), exact.raw_bytes(77)), (77, Some(77)));
    }

    #[test]
    fn only_whole_numbers_of_planes_may_be_narrowed_and_the_field_is_named() {
        let refused = |part: Part| Layout::new("m", "f", vec![part]).unwrap_err();
        let good = part(16, 8, Number::Bf16);
        assert!(Layout::new("m", "f", vec![good.clone()]).unwrap().is_lossy());
        let Form::Paged(planes) = good.form else { unreachable!() };
        let token = Form::Paged(Planes { order: Order::Token, ..planes });
        let window = Form::Window { planes, window_tokens: 9 };
        for form in [token, window, Form::Bytes { block_bytes: 64 }, Form::Snapshot { bytes: 64 }] {
            assert_eq!(refused(Part { form, ..good.clone() }).field, "layout.parts[0].cold");
        }
        assert_eq!(refused(part(16, 7, Number::F16)).field, "layout.parts[0].cold.from");
        assert_eq!(refused(part(16, 6, Number::F32)).field, "layout.parts[0].cold.from");
        // Scales would be more than the codes save.
        assert_eq!(refused(part(2, 2, Number::F16)).field, "layout.parts[0].cold");
        assert!(Layout::new("m", "f", vec![part(5, 2, Number::F16)]).is_ok());
    }

    #[test]
    fn a_layout_without_a_cold_form_has_the_hash_that_it_always_had() {
        let hash = |cold| {
            let part = Part { cold, ..part(16, 8, Number::F16) };
            Layout::new("m", "f", vec![part]).unwrap().hash()
        };
        // As computed before there were cold forms.
        assert_eq!(
            hash(None).to_string(),
            "75640cb79f2072ce0003ac971f888ac01d4117c385e919cc986726363ddfc157"
        );
        let all: HashSet<_> = Number::ALL.map(|from| hash(Some(Fp8 { from }))).into();
        assert!(all.len() == 3 && !all.contains(&hash(None)));
    }
}
