//! How long a tier takes to fill, from how fast it grew of late.

use std::time::{Duration, Instant};

use keepwarm_types::Bytes;

/// How far back growth counts: a minute holds dozens of the readings that come each second or so, and a tier
/// that began to fill is noticed within it.
const MEMORY: Duration = Duration::from_secs(60);
/// What stands for a tier that does not fill: some 30 years, in seconds.
pub(crate) const NEVER_S: f64 = 1e9;

/// A tier's growth, smoothed.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    last: Option<(Instant, Bytes)>,
    /// Bytes a second.
    rate: f64,
}

impl Growth {
    /// Takes a reading and says in how many seconds the tier is full at the present rate; [`NEVER_S`] at most.
    pub(crate) fn seconds_to_full(&mut self, at: Instant, used: Bytes, reserved: Bytes) -> f64 {
        if let Some((before, then)) = self.last {
            let seconds = at.saturating_duration_since(before).as_secs_f64();
            if seconds > 0.0 {
                let weight = 1.0 - (-seconds / MEMORY.as_secs_f64()).exp();
                self.rate += weight * ((used.0 as f64 - then.0 as f64) / seconds - self.rate);
            }
        }
        self.last = Some((at, used));
        let free = reserved.0.saturating_sub(used.0) as f64;
        if free == 0.0 {
            return 0.0;
        }
        if self.rate > 0.0 { (free / self.rate).min(NEVER_S) } else { NEVER_S }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_that_grows_says_when_it_is_full_and_one_that_does_not_never() {
        let (mut growth, begin) = (Growth::default(), Instant::now());
        let full = Bytes(100_000);
        assert_eq!(growth.seconds_to_full(begin, Bytes(0), full), NEVER_S);
        let mut left = NEVER_S;
        // 100 bytes a second for ten minutes: the smoothed rate is the rate.
        for second in 1..=600 {
            left = growth.seconds_to_full(begin + Duration::from_secs(second), Bytes(second * 100), full);
        }
        assert!((left - 400.0).abs() < 1.0, "{left}");
        assert_eq!(growth.seconds_to_full(begin + Duration::from_secs(601), full, full), 0.0);
        for second in 602..2000 {
            left = growth.seconds_to_full(begin + Duration::from_secs(second), Bytes(50_000), full);
        }
        assert_eq!(left, NEVER_S, "it shrank and stands still since");
    }
}
