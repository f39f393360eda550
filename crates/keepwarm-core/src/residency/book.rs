//! One tenant's sessions in a tier, by last use and by the end of their protection.

use std::collections::BTreeSet;

use keepwarm_types::{Bytes, SessionKey, Timestamp};
use lru::LruCache;

use super::Resident;

/// Entries that one search for a victim passes over at most (leased, leaving or dirty ones).
const LOOKS_MAX: usize = 1024;

#[derive(Debug)]
pub(super) struct Book {
    inclusive: bool,
    /// Oldest use last.
    order: LruCache<SessionKey, (Resident, u64)>,
    /// Sessions by the time from which they may leave; only kept where protection matters.
    releases: BTreeSet<(Timestamp, SessionKey)>,
    bytes: Bytes,
    /// Bytes of sessions whose checkpoint is under way: they may leave when it ends.
    settling: Bytes,
    uses: u64,
}

impl Book {
    pub(super) fn new(inclusive: bool) -> Self {
        Self {
            inclusive,
            order: LruCache::unbounded(),
            releases: BTreeSet::new(),
            bytes: Bytes::ZERO,
            settling: Bytes::ZERO,
            uses: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    pub(super) const fn bytes(&self) -> Bytes {
        self.bytes
    }

    pub(super) const fn settling(&self) -> Bytes {
        self.settling
    }

    pub(super) fn get(&self, key: &SessionKey) -> Option<&Resident> {
        self.order.peek(key).map(|(resident, _)| resident)
    }

    pub(super) fn put(&mut self, key: SessionKey, resident: Resident, used: bool) {
        let old = self.order.peek(&key).cloned();
        if let Some((old, _)) = &old {
            self.bytes -= old.bytes;
            self.settling -= settling(old);
            self.releases.remove(&(release(old), key.clone()));
        }
        self.bytes += resident.bytes;
        self.settling += settling(&resident);
        if !self.inclusive {
            self.releases.insert((release(&resident), key.clone()));
        }
        match old {
            Some((_, stamp)) if !used => {
                if let Some(slot) = self.order.peek_mut(&key) {
                    *slot = (resident, stamp);
                }
            }
            _ => {
                self.uses += 1;
                self.order.put(key, (resident, self.uses));
            }
        }
    }

    pub(super) fn remove(&mut self, key: &SessionKey) {
        if let Some((resident, _)) = self.order.pop(key) {
            self.bytes -= resident.bytes;
            self.settling -= settling(&resident);
            self.releases.remove(&(release(&resident), key.clone()));
        }
    }

    /// The session that should leave first, with a stamp that orders it among other tenants'.
    //= GUARANTEES.md#G6
    pub(super) fn victim(
        &self,
        now: Timestamp,
        stays: &dyn Fn(&SessionKey) -> bool,
    ) -> Option<(SessionKey, Resident, u64)> {
        let may =
            |key: &SessionKey, resident: &Resident| !resident.leased && resident.bytes.0 > 0 && !stays(key);
        if !self.inclusive {
            return self
                .releases
                .iter()
                .take_while(|(at, _)| *at <= now)
                .take(LOOKS_MAX)
                .filter_map(|(at, key)| self.order.peek(key).map(|(resident, _)| (at, key, resident)))
                .find(|(_, key, resident)| may(key, resident))
                .map(|(at, key, resident)| (key.clone(), resident.clone(), at.0));
        }
        let oldest =
            || self.order.iter().rev().take(LOOKS_MAX).filter(|(key, (resident, _))| may(key, resident));
        let clean = oldest().find(|(_, (resident, _))| !resident.dirty);
        clean
            .or_else(|| oldest().next())
            .map(|(key, (resident, stamp))| (key.clone(), resident.clone(), *stamp))
    }

    /// The protected session that was not used for the longest time, with its stamp: it may move, not be dropped.
    pub(super) fn movable(
        &self,
        now: Timestamp,
        stays: &dyn Fn(&SessionKey) -> bool,
    ) -> Option<(SessionKey, Resident, u64)> {
        let oldest = self.order.iter().rev().take(LOOKS_MAX);
        oldest
            .filter(|(key, (resident, _))| {
                release(resident) > now && !resident.leased && resident.bytes.0 > 0 && !stays(key)
            })
            .map(|(key, (resident, stamp))| (key.clone(), resident.clone(), *stamp))
            .next()
    }

    /// When the next protection ends.
    pub(super) fn first_release(&self, now: Timestamp) -> Option<Timestamp> {
        self.releases.range((now, lowest())..).next().map(|(at, _)| *at).filter(|at| *at < Timestamp::NEVER)
    }

    pub(super) fn validate(&self) {
        let bytes: Bytes = self.order.iter().map(|(_, (resident, _))| resident.bytes).sum();
        assert_eq!(bytes, self.bytes, "a tenant's bytes do not add up");
        let bytes: Bytes = self.order.iter().map(|(_, (resident, _))| settling(resident)).sum();
        assert_eq!(bytes, self.settling, "a tenant's settling bytes do not add up");
        if !self.inclusive {
            assert_eq!(self.releases.len(), self.order.len(), "a session is missing from one of the orders");
        }
    }
}

/// From when a session may leave the only tier that has it.
fn release(resident: &Resident) -> Timestamp {
    resident.protected_until.min(resident.expires_at)
}

/// What leaves once its checkpoint has ended.
const fn settling(resident: &Resident) -> Bytes {
    if resident.dirty && resident.leased { resident.bytes } else { Bytes::ZERO }
}

fn lowest() -> SessionKey {
    let tenant = "0".parse().expect("a digit is a name");
    let id = uuid::Uuid::from_u128(0x4000_8000_0000_0000_0000);
    SessionKey::new(
        tenant,
        keepwarm_types::SessionId::new(id).expect("a UUID with the version bits of 4 is a session id"),
    )
}
