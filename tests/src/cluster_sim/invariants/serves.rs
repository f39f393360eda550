//! After nothing goes wrong any more, everything is served again within a bounded time.
//= GUARANTEES.md#G11

use keepwarm_types::SessionKey;

use crate::cluster_sim::world::World;

/// Longer than a failed node is waited for, a set is changed twice, and all sessions are compared and copied.
pub const SERVES_WITHIN_MS: u64 = 12_000;

pub fn late(world: &World, key: &SessionKey, what: &str) -> String {
    format!(
        "{key} is not served {SERVES_WITHIN_MS} ms after the last fault: {what}; sets {:?}",
        world.registry.shards().map(|shard| world.registry.set(shard)).collect::<Vec<_>>()
    )
}
