//! Arithmetic of the demo's figures.

use std::hint::black_box;
use std::time::Instant;

use serde::Serialize;

use crate::commands::bench::percentile;

/// Rounds of a memcpy that are timed, after one that is not.
const MEMCPY_ROUNDS: usize = 7;

/// The middle value; none of nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    (!values.is_empty()).then(|| percentile(&values, 0.5))
}

/// Bytes over milliseconds, as 10^9 bytes a second.
pub(crate) fn gb_per_s(bytes: u64, millis: f64) -> f64 {
    bytes as f64 / (millis / 1000.0) / 1e9
}

/// How fast plain memory can be copied in pieces of `bytes`, by one thread, in GB/s (median).
pub(crate) fn memcpy_gb_per_s(bytes: usize) -> f64 {
    // Written once, so that the first timed round meets no page that is still to be mapped.
    let source = vec![0x5a_u8; bytes];
    let mut target = vec![0xa5_u8; bytes];
    let round = |_| {
        let begun = Instant::now();
        target.copy_from_slice(black_box(&source));
        black_box(&mut target);
        gb_per_s(bytes as u64, begun.elapsed().as_secs_f64() * 1000.0)
    };
    median((0..=MEMCPY_ROUNDS).map(round).skip(1)).unwrap_or(f64::NAN)
}

/// When moving state beats computing it again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct BreakEven {
    pub(crate) subject: String,
    pub(crate) kv_bytes_per_token: u64,
    pub(crate) prefill_tokens_per_s: f64,
    /// The bandwidth at which both take the same time; anything faster wins.
    pub(crate) gb_per_s: f64,
    /// Where the two numbers come from.
    pub(crate) basis: String,
}

impl BreakEven {
    /// A token's state takes `kv / bandwidth` to move and `1 / prefill` to compute: equal at `kv x prefill`.
    pub(crate) fn new(
        subject: impl Into<String>,
        kv: u64,
        prefill_tokens_per_s: f64,
        basis: impl Into<String>,
    ) -> Self {
        Self {
            subject: subject.into(),
            kv_bytes_per_token: kv,
            prefill_tokens_per_s,
            gb_per_s: kv as f64 * prefill_tokens_per_s / 1e9,
            basis: basis.into(),
        }
    }

    /// An 8B model on a data-centre GPU. Llama 3.1 8B: 32 layers, 8 KV heads of 128 values (its published
    /// config.json), keys and values, two bytes each. Its prefill rate on one H100 is an assumption.
    pub(crate) fn eight_billion() -> Self {
        const LAYERS: u64 = 32;
        const KV_HEADS: u64 = 8;
        const HEAD_DIM: u64 = 128;
        const KEYS_AND_VALUES: u64 = 2;
        const F16_BYTES: u64 = 2;
        const PREFILL_ASSUMED: f64 = 10_000.0;
        let kv = LAYERS * KV_HEADS * HEAD_DIM * KEYS_AND_VALUES * F16_BYTES;
        let basis =
            "Llama 3.1 8B: 32 layers x 8 KV heads x 128 x K and V x 2 bytes; prefill on one H100: assumed";
        Self::new("an 8B model on a data-centre GPU", kv, PREFILL_ASSUMED, basis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_middle_values() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([]), None);
    }

    #[test]
    fn break_even_is_bytes_a_token_times_tokens_a_second() {
        let engine = BreakEven::new("engine", 23_040, 400.0, "measured");
        assert!((engine.gb_per_s - 0.009_216).abs() < 1e-12);
        let large = BreakEven::eight_billion();
        assert_eq!(large.kv_bytes_per_token, 131_072);
        assert!((large.gb_per_s - 1.310_72).abs() < 1e-9);
    }

    #[test]
    fn rates_are_in_ten_to_the_nine_bytes() {
        assert!((gb_per_s(30_000_000, 3.0) - 10.0).abs() < 1e-9);
        assert!(memcpy_gb_per_s(1 << 20) > 0.01);
    }
}
