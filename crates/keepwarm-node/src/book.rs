//! What each tenant has on this node, against what it may have.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keepwarm_config::TenantConfig;
use keepwarm_core::session::Protect;
use keepwarm_core::shard::Refusal;
use keepwarm_types::{Bytes, Millis, SessionKey, TenantName};

/// When a tenant whose quota is used up may try again: once something of its own has ended.
const RETRY_AFTER: Millis = Millis(5000);

#[derive(Debug, Clone, Copy)]
struct Limits {
    sessions: u64,
    forever: Bytes,
}

#[derive(Debug, Default)]
struct Counts {
    sessions: HashMap<TenantName, u64>,
    /// Bytes of each session that is protected for ever.
    held: HashMap<SessionKey, Bytes>,
    /// These together with those on their way in, by tenant.
    forever: HashMap<TenantName, u64>,
}

impl Counts {
    fn hold(&mut self, key: &SessionKey, now: Option<Bytes>) {
        let before = match now {
            Some(bytes) => self.held.insert(key.clone(), bytes),
            None => self.held.remove(key),
        };
        let (before, now) = (before.unwrap_or_default().0, now.unwrap_or_default().0);
        if before != now {
            let total = self.forever.entry(key.tenant.clone()).or_default();
            *total = (*total + now).saturating_sub(before);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Book {
    limits: HashMap<TenantName, Limits>,
    counts: Arc<Mutex<Counts>>,
}

fn locked(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes on their way into a session that is protected for ever; they count until the session itself does.
#[derive(Debug)]
pub(crate) struct Claim {
    counts: Arc<Mutex<Counts>>,
    tenant: TenantName,
    limit: Bytes,
    bytes: u64,
}

impl Claim {
    /// Counts so many bytes more, if the tenant may have them.
    pub(crate) fn grow(&mut self, bytes: u64) -> Result<(), Refusal> {
        let mut counts = locked(&self.counts);
        let total = counts.forever.entry(self.tenant.clone()).or_default();
        if total.saturating_add(bytes) > self.limit.0 {
            let what = "bytes that are protected for ever (forever_bytes_max)";
            return Err(Refusal::QuotaExceeded { what, retry_after: RETRY_AFTER });
        }
        *total += bytes;
        self.bytes += bytes;
        Ok(())
    }

    /// Bytes that it counts.
    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(total) = locked(&self.counts).forever.get_mut(&self.tenant) {
            *total = total.saturating_sub(self.bytes);
        }
    }
}

impl Book {
    pub(crate) fn new(tenants: &[TenantConfig]) -> Self {
        let limits = |tenant: &TenantConfig| {
            let limits = Limits { sessions: tenant.sessions_max, forever: tenant.forever_bytes_max };
            (tenant.name.clone(), limits)
        };
        Self { limits: tenants.iter().map(limits).collect(), counts: Arc::default() }
    }

    /// Counts one session more, if the tenant may have it.
    pub(crate) fn begin(&self, tenant: &TenantName) -> Result<(), Refusal> {
        let mut counts = locked(&self.counts);
        let count = counts.sessions.entry(tenant.clone()).or_default();
        if self.limits.get(tenant).is_some_and(|limits| *count >= limits.sessions) {
            return Err(Refusal::QuotaExceeded { what: "sessions", retry_after: RETRY_AFTER });
        }
        *count += 1;
        Ok(())
    }

    /// Counts one session less.
    pub(crate) fn end(&self, tenant: &TenantName) {
        if let Some(count) = locked(&self.counts).sessions.get_mut(tenant) {
            *count = count.saturating_sub(1);
        }
    }

    /// Counts what was recovered, whatever the limit.
    pub(crate) fn recovered(&self, tenant: &TenantName) {
        *locked(&self.counts).sessions.entry(tenant.clone()).or_default() += 1;
    }

    /// Whether the tenant may protect bytes for ever. Without tenants in the spec, the default one may.
    pub(crate) fn forever(&self, tenant: &TenantName) -> bool {
        self.limits.get(tenant).is_none_or(|limits| limits.forever > Bytes::ZERO)
    }

    /// Notes what a session has, where it is protected for ever; an ended one has nothing.
    pub(crate) fn hold(&self, key: &SessionKey, protect: Option<Protect>, bytes: Bytes) {
        if self.limits.contains_key(&key.tenant) {
            locked(&self.counts).hold(key, (protect == Some(Protect::Forever)).then_some(bytes));
        }
    }

    /// For a write to a session that is protected for ever: what counts its bytes while they arrive.
    pub(crate) fn claim(&self, key: &SessionKey) -> Option<Claim> {
        let limit = self.limits.get(&key.tenant)?.forever;
        locked(&self.counts).held.contains_key(key).then(|| Claim {
            counts: Arc::clone(&self.counts),
            tenant: key.tenant.clone(),
            limit,
            bytes: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn book(sessions_max: u64, forever: u64) -> (Book, SessionKey) {
        let name: TenantName = "acme".parse().unwrap();
        let config = TenantConfig {
            name: name.clone(),
            token_sha256: [0; 32],
            admin: false,
            share: 1.0,
            sessions_max,
            forever_bytes_max: Bytes(forever),
        };
        let id = keepwarm_types::SessionId::new(Uuid::new_v4()).unwrap();
        (Book::new(&[config]), SessionKey::new(name, id))
    }

    #[test]
    fn the_session_after_the_last_is_refused_until_one_ends() {
        let (book, key) = book(2, 0);
        let tenant = &key.tenant;
        assert!(book.begin(tenant).is_ok() && book.begin(tenant).is_ok());
        assert!(matches!(book.begin(tenant), Err(Refusal::QuotaExceeded { .. })));
        book.end(tenant);
        assert!(book.begin(tenant).is_ok());
        assert!(!book.forever(tenant));
    }

    #[test]
    fn bytes_kept_for_ever_have_a_limit_while_they_arrive_too() {
        let (book, key) = book(2, 100);
        assert!(book.claim(&key).is_none(), "an ordinary session is not counted");
        book.hold(&key, Some(Protect::Forever), Bytes(60));
        let mut claim = book.claim(&key).unwrap();
        claim.grow(30).unwrap();
        let mut second = book.claim(&key).unwrap();
        assert!(matches!(second.grow(11), Err(Refusal::QuotaExceeded { .. })));
        second.grow(10).unwrap();
        book.hold(&key, Some(Protect::Forever), Bytes(90));
        drop(claim);
        assert!(second.grow(1).is_err(), "what arrived counts on");
        drop(second);
        book.hold(&key, None, Bytes::ZERO);
        assert!(book.claim(&key).is_none());
        assert_eq!(locked(&book.counts).forever[&key.tenant], 0);
    }
}
