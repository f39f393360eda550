//! What each tenant has on this node, against what it may have.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use keepwarm_config::TenantConfig;
use keepwarm_core::shard::Refusal;
use keepwarm_types::{Millis, TenantName};

/// When a tenant whose quota is used up may try again: once something of its own has ended.
const RETRY_AFTER: Millis = Millis(5000);

#[derive(Debug)]
pub(crate) struct Book {
    limits: HashMap<TenantName, u64>,
    forever: HashMap<TenantName, bool>,
    sessions: Mutex<HashMap<TenantName, u64>>,
}

impl Book {
    pub(crate) fn new(tenants: &[TenantConfig]) -> Self {
        Self {
            limits: tenants.iter().map(|tenant| (tenant.name.clone(), tenant.sessions_max)).collect(),
            forever: tenants
                .iter()
                .map(|tenant| (tenant.name.clone(), tenant.forever_bytes_max.0 > 0))
                .collect(),
            sessions: Mutex::default(),
        }
    }

    /// Counts one session more, if the tenant may have it.
    pub(crate) fn begin(&self, tenant: &TenantName) -> Result<(), Refusal> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let count = sessions.entry(tenant.clone()).or_default();
        if self.limits.get(tenant).is_some_and(|limit| *count >= *limit) {
            return Err(Refusal::QuotaExceeded { what: "sessions", retry_after: RETRY_AFTER });
        }
        *count += 1;
        Ok(())
    }

    /// Counts one session less.
    pub(crate) fn end(&self, tenant: &TenantName) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sessions.get_mut(tenant) {
            *count = count.saturating_sub(1);
        }
    }

    /// Counts what was recovered, whatever the limit.
    pub(crate) fn recovered(&self, tenant: &TenantName) {
        *self.sessions.lock().unwrap_or_else(PoisonError::into_inner).entry(tenant.clone()).or_default() += 1;
    }

    /// Whether the tenant may protect bytes forever. Without tenants in the spec, the default one may.
    pub(crate) fn forever(&self, tenant: &TenantName) -> bool {
        self.forever.get(tenant).copied().unwrap_or(true)
    }
}

#[cfg(test)]
mod tests {
    use keepwarm_types::Bytes;

    use super::*;

    #[test]
    fn the_session_after_the_last_is_refused_until_one_ends() {
        let tenant: TenantName = "acme".parse().unwrap();
        let config = TenantConfig {
            name: tenant.clone(),
            token_sha256: [0; 32],
            admin: false,
            share: 1.0,
            sessions_max: 2,
            forever_bytes_max: Bytes::ZERO,
        };
        let book = Book::new(&[config]);
        assert!(book.begin(&tenant).is_ok() && book.begin(&tenant).is_ok());
        assert!(matches!(book.begin(&tenant), Err(Refusal::QuotaExceeded { .. })));
        book.end(&tenant);
        assert!(book.begin(&tenant).is_ok());
        assert!(!book.forever(&tenant));
    }
}
