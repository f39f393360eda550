//! Times as RFC 3339 in UTC.

use jiff::Timestamp as Instant;
use keepwarm_types::Timestamp;

/// `2026-01-31T12:00:00.123Z`; the end of time is the last that can be written.
pub(crate) fn rfc3339(at: Timestamp) -> String {
    let millis = i64::try_from(at.0).unwrap_or(i64::MAX);
    Instant::from_millisecond(millis).unwrap_or(Instant::MAX).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc_with_milliseconds() {
        assert_eq!(rfc3339(Timestamp(1_700_000_000_123)), "2023-11-14T22:13:20.123Z");
        assert!(rfc3339(Timestamp::NEVER).starts_with("9999-"));
    }
}
