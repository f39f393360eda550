//! Which shard a new session is minted into and which GPU it runs on.

use keepwarm_types::{Bytes, GpuIndex, SessionId, ShardCount, ShardId};
use uuid::Uuid;

/// A warm GPU is left only for one that has at least this many fewer requests waiting: moving a session
/// costs a restore, which is worth a few turns of waiting.
pub const MOVE_QUEUE_GAP: u32 = 8;

/// A GPU as placement sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuLoad {
    /// Which.
    pub index: GpuIndex,
    /// Whether it serves.
    pub healthy: bool,
    /// Bytes that could be had without evicting anybody.
    pub free: Bytes,
    /// Bytes of its arena.
    pub capacity: Bytes,
    /// Leases running.
    pub leases: u32,
    /// Requests waiting for it.
    pub queue: u32,
}

impl GpuLoad {
    /// Less is better: who waits, who runs, then what is full.
    fn pressure(&self) -> (u32, u32, u64) {
        let full =
            (self.capacity.0 - self.free.0.min(self.capacity.0)).saturating_mul(100) / self.capacity.0.max(1);
        (self.queue, self.leases, full)
    }
}

/// The GPU to run a session on: the one that was asked for if it serves; else where the session is warm,
/// unless another is far less loaded; else the least loaded. None where no GPU serves or can ever hold it.
#[must_use]
pub fn choose(
    gpus: &[GpuLoad],
    wish: Option<GpuIndex>,
    warm: Option<GpuIndex>,
    bytes: Bytes,
) -> Option<GpuIndex> {
    let fit = |gpu: &&GpuLoad| gpu.healthy && gpu.capacity >= bytes;
    if let Some(wish) = wish {
        return gpus.iter().filter(fit).find(|gpu| gpu.index == wish).map(|gpu| gpu.index);
    }
    let best = gpus.iter().filter(fit).min_by_key(|gpu| (gpu.pressure(), gpu.index))?;
    let stay = warm.and_then(|warm| gpus.iter().filter(fit).find(|gpu| gpu.index == warm));
    match stay {
        Some(stay) if stay.queue < best.queue.saturating_add(MOVE_QUEUE_GAP) => Some(stay.index),
        _ => Some(best.index),
    }
}

/// A session id from a fresh UUID, placed in one of the shards that this node owns.
///
/// # Panics
/// If `owned` is empty: a node without shards takes no creates.
#[must_use]
pub fn mint(fresh: Uuid, owned: &[ShardId], count: ShardCount) -> SessionId {
    let random = (fresh.as_u128() >> 16) as usize;
    let id = SessionId::new(fresh).expect("the shell mints version 7");
    id.placed_in(owned[random % owned.len()], count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(index: u16, queue: u32, free: u64) -> GpuLoad {
        let (index, free, capacity) = (GpuIndex(index), Bytes(free), Bytes(100));
        GpuLoad { index, healthy: true, free, capacity, leases: 0, queue }
    }

    #[test]
    fn a_session_stays_where_it_is_warm() {
        let gpus = [gpu(0, 5, 10), gpu(1, 0, 90)];
        assert_eq!(choose(&gpus, None, Some(GpuIndex(0)), Bytes(50)), Some(GpuIndex(0)));
        let gpus = [gpu(0, 8, 10), gpu(1, 0, 90)];
        assert_eq!(
            choose(&gpus, None, Some(GpuIndex(0)), Bytes(50)),
            Some(GpuIndex(1)),
            "unless it is far too busy"
        );
    }

    #[test]
    fn a_cold_session_goes_where_room_is() {
        let gpus = [gpu(0, 0, 10), gpu(1, 0, 90)];
        assert_eq!(choose(&gpus, None, None, Bytes(50)), Some(GpuIndex(1)));
        assert_eq!(
            choose(&gpus, Some(GpuIndex(0)), None, Bytes(50)),
            Some(GpuIndex(0)),
            "unless another is asked for"
        );
        assert_eq!(choose(&gpus, Some(GpuIndex(7)), None, Bytes(50)), None);
        assert_eq!(choose(&gpus, None, None, Bytes(101)), None, "it can never fit");
    }

    #[test]
    fn a_fenced_gpu_gets_nothing() {
        let fenced = GpuLoad { healthy: false, ..gpu(0, 0, 100) };
        assert_eq!(choose(&[fenced, gpu(1, 50, 0)], None, Some(GpuIndex(0)), Bytes(1)), Some(GpuIndex(1)));
        assert_eq!(choose(&[fenced], None, None, Bytes(1)), None);
    }

    #[test]
    fn minted_ids_lie_in_owned_shards() {
        let count = ShardCount::new(16).unwrap();
        let owned = [ShardId(3), ShardId(9)];
        let mut seen = std::collections::HashSet::new();
        for _ in 0..200 {
            let shard = count.shard_of(mint(Uuid::now_v7(), &owned, count));
            assert!(owned.contains(&shard));
            seen.insert(shard);
        }
        assert_eq!(seen.len(), 2);
    }
}
