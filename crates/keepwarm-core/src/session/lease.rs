//! A time-limited right to run and write a session.

use keepwarm_types::{Epoch, LeaseId, Millis, Timestamp};

/// How long a lease lasts when the client does not say.
pub const LEASE_TTL_DEFAULT: Millis = Millis(30_000);
/// The shortest lease that is granted; shorter wishes are clipped.
pub const LEASE_TTL_MIN: Millis = Millis(100);
/// The longest lease that is granted; longer wishes are clipped: a lease is never a pin without an end.
pub const LEASE_TTL_MAX: Millis = Millis(600_000);

/// The one write lease of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Names it in requests.
    pub id: LeaseId,
    /// Orders it among the session's leases.
    pub epoch: Epoch,
    /// When it ends unless renewed.
    pub expires_at: Timestamp,
}
