//! Names of the simulated sessions, and what a unit of their state says of its origin.

use std::sync::Arc;

use keepwarm_core::session::{Form, Layout, Order, Part, Planes};
use keepwarm_types::{SessionId, SessionKey, ShardCount, ShardId, TenantName};
use uuid::Uuid;

use crate::sim::memory::Stamp;

/// Sessions that clients create, per tenant; forks take numbers above these.
pub const SESSIONS: u64 = 4;
/// Names of forks, per tenant and shard.
pub const FORKS: u64 = 2;
const TENANTS: [&str; 2] = ["acme", "zeta"];
const TENANT_SHIFT: u32 = 62;
const SESSION_SHIFT: u32 = 54;
pub const TOKENS_PER_BLOCK: u32 = 4;
pub const BYTES_PER_BLOCK: u64 = 8;

/// All sessions of a simulated cluster.
#[derive(Debug, Clone, Copy)]
pub struct Keys {
    pub shards: u32,
}

impl Keys {
    /// The session of a tenant with this number.
    #[must_use]
    pub fn key(self, tenant: u64, number: u64) -> SessionKey {
        let shard =
            if number < SESSIONS { number } else { (number - SESSIONS) / FORKS } % u64::from(self.shards);
        let bits = 0x4000_8000_0000_0000_0000 + (u128::from(shard) << 15) * u128::from(self.shards - 1);
        let id = SessionId::new(Uuid::from_u128(bits + u128::from(number))).unwrap();
        SessionKey::new(TENANTS[usize::from(tenant != 0)].parse().unwrap(), id)
    }

    #[must_use]
    pub fn shard(self, key: &SessionKey) -> ShardId {
        ShardCount::new(self.shards.into()).unwrap().shard_of(key.id)
    }

    /// The n-th name of a fork in the same shard and of the same tenant.
    #[must_use]
    pub fn fork(self, of: &SessionKey, nth: u64) -> SessionKey {
        self.key(tenant(of), SESSIONS + u64::from(self.shard(of).0) * FORKS + nth)
    }

    /// Every session that there can be.
    #[must_use]
    pub fn all(self) -> Vec<SessionKey> {
        let numbers = SESSIONS + FORKS * u64::from(self.shards);
        (0..2).flat_map(|tenant| (0..numbers).map(move |number| self.key(tenant, number))).collect()
    }
}

/// 0 or 1.
#[must_use]
pub fn tenant(key: &SessionKey) -> u64 {
    u64::from(key.tenant.as_str() == TENANTS[1])
}

#[must_use]
pub fn number(key: &SessionKey) -> u64 {
    (key.id.uuid().as_u128() & 0xff) as u64
}

/// A unit of state that names its origin.
#[must_use]
pub fn stamp(key: &SessionKey, serial: u64) -> Stamp {
    tenant(key) << TENANT_SHIFT | number(key) << SESSION_SHIFT | (serial & ((1 << SESSION_SHIFT) - 1))
}

/// The tenant that a stamp was written for.
#[must_use]
pub fn tenant_of(stamp: Stamp) -> TenantName {
    TENANTS[usize::from(stamp >> TENANT_SHIFT != 0)].parse().unwrap()
}

/// The number of the session that a stamp was written to.
#[must_use]
pub const fn number_of(stamp: Stamp) -> u64 {
    (stamp >> SESSION_SHIFT) & 0xff
}

/// One paged part, or a string of bytes.
#[must_use]
pub fn layout(number: u64) -> Arc<Layout> {
    let planes = Planes {
        tokens_per_block: TOKENS_PER_BLOCK,
        planes: 2,
        plane_bytes_per_token: 1,
        order: Order::Token,
    };
    let part = match number % 2 {
        0 => Part { name: "kv".parse().unwrap(), form: Form::Paged(planes), cold: None },
        _ => Part {
            name: "b".parse().unwrap(),
            form: Form::Bytes { block_bytes: BYTES_PER_BLOCK },
            cold: None,
        },
    };
    Arc::new(Layout::new("model", "print", vec![part]).unwrap())
}

/// Bytes of a unit.
#[must_use]
pub fn unit(form: &Form) -> u64 {
    form.planes().map_or(1, Planes::token_bytes)
}
