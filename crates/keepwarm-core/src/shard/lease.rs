//! Leases: one write lease per session, with an epoch; never a pin without an end.

use std::sync::Arc;

use keepwarm_types::{Epoch, LeaseId, Millis, SessionKey, Timestamp};

use super::command::Command;
use super::refusal::Refusal;
use super::state::{Handled, Shard, Timer};
use super::view::{Answer, LeaseGrant};
use crate::session::{Home, LEASE_TTL_MAX, LEASE_TTL_MIN, Lease};

/// Bits of an epoch below the incarnation: 2^40 grants a start.
const EPOCH_BITS: u32 = 40;

impl Shard {
    pub(super) fn activate(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        lease: LeaseId,
        ttl: Millis,
        home: Home,
        out: &mut Vec<Command>,
    ) -> Handled {
        let entry = self.live(key)?;
        if let Some(held) = entry.lease(now) {
            return Err(Refusal::Leased { expires_at: held.expires_at });
        }
        let manifest = Arc::clone(entry.manifest()?);
        self.grants += 1;
        let epoch = Epoch((self.settings.member.incarnation.0 << EPOCH_BITS) + self.grants);
        let (granted, clipped) = clip(ttl);
        let lease = Lease { id: lease, epoch, expires_at: now + granted };
        let work = self.entry(key)?.work();
        work.lease = Some(lease);
        work.epoch = Some(epoch);
        work.home = Some(home);
        self.set_timer(lease.expires_at, Timer::Lease(key.clone()));
        self.touch(now, key, out);
        Ok(Some(Answer::Lease(Box::new(LeaseGrant { lease, clipped, manifest, ttl: granted }))))
    }

    pub(super) fn renew(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        lease: LeaseId,
        ttl: Millis,
        out: &mut Vec<Command>,
    ) -> Handled {
        let manifest = Arc::clone(self.live(key)?.manifest()?);
        let (granted, clipped) = clip(ttl);
        let expires_at = now + granted;
        let held = self.held(now, key, lease)?;
        let before = std::mem::replace(&mut held.expires_at, expires_at);
        let lease = *held;
        self.timers.remove(&(before, Timer::Lease(key.clone())));
        self.set_timer(expires_at, Timer::Lease(key.clone()));
        self.touch(now, key, out);
        Ok(Some(Answer::Lease(Box::new(LeaseGrant { lease, clipped, manifest, ttl: granted }))))
    }

    pub(super) fn release(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        lease: LeaseId,
        out: &mut Vec<Command>,
    ) -> Handled {
        self.live(key)?;
        let expires_at = self.held(now, key, lease)?.expires_at;
        self.entry(key)?.work().lease = None;
        self.timers.remove(&(expires_at, Timer::Lease(key.clone())));
        self.touch(now, key, out);
        Ok(Some(Answer::Done))
    }

    fn held(&mut self, now: Timestamp, key: &SessionKey, id: LeaseId) -> Result<&mut Lease, Refusal> {
        let work = self.entry(key)?.work.as_mut();
        work.and_then(|work| work.lease.as_mut())
            .filter(|lease| lease.id == id && lease.expires_at > now)
            .ok_or(Refusal::LeaseExpired)
    }
}

fn clip(ttl: Millis) -> (Millis, bool) {
    let granted = ttl.clamp(LEASE_TTL_MIN, LEASE_TTL_MAX);
    (granted, granted != ttl)
}
