//! The shells' clock: wall time that never goes back within a process.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use keepwarm_types::Timestamp;
use tokio::time::Instant;

static START: OnceLock<(Instant, u64)> = OnceLock::new();

/// Now, in milliseconds since the Unix epoch: the wall clock at the first call, plus monotonic time since.
#[must_use]
pub fn now() -> Timestamp {
    let (start, wall) = START.get_or_init(|| {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        (Instant::now(), u64::try_from(wall).unwrap_or(u64::MAX))
    });
    let passed = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    Timestamp(wall.saturating_add(passed))
}
