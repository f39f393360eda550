//! Which node takes a new session, which shard it is minted into, and which GPU it runs on.

use keepwarm_types::{Bytes, GpuIndex, NodeName, SessionId, ShardCount, ShardId};
use uuid::Uuid;

/// A warm GPU is left only for one that has at least this many fewer requests waiting: moving a session
/// costs a restore, which is worth a few turns of waiting.
pub const MOVE_QUEUE_GAP: u32 = 8;

/// A node whose pinned memory is fuller than this, in percent, gives new sessions away where another has room: its own
/// begin to move or to go cold.
const FULL_PERCENT: u128 = 90;

/// A node as the placement of a new session sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeLoad {
    /// Whether one of its GPUs serves.
    pub runs: bool,
    /// Requests waiting for the GPU of it that has the fewest.
    pub queue: u32,
    /// Bytes of its pinned memory in use.
    pub used: Bytes,
    /// All of it.
    pub capacity: Bytes,
    /// Of its GPUs that serve.
    pub hbm: Hbm,
    /// Of those that take the kernels that make and read cold forms.
    pub with_kernels: Hbm,
}

/// What a session can have of the GPUs of a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hbm {
    /// Bytes of the largest one.
    pub largest: Bytes,
    /// Most bytes that one of them has for a session now.
    pub room: Bytes,
}

impl Hbm {
    /// Of some GPUs.
    fn of<'g>(gpus: impl Iterator<Item = &'g GpuLoad>) -> Self {
        gpus.fold(Self::default(), |all, gpu| Self {
            largest: all.largest.max(gpu.capacity),
            room: all.room.max(gpu.room()),
        })
    }
}

impl NodeLoad {
    /// Of a node with these GPUs, and so much pinned memory in use and in all.
    #[must_use]
    pub fn of(gpus: &[GpuLoad], used: Bytes, capacity: Bytes) -> Self {
        let serving = || gpus.iter().filter(|gpu| gpu.healthy);
        let queue = serving().map(|gpu| gpu.queue).min();
        Self {
            runs: queue.is_some(),
            queue: queue.unwrap_or(0),
            used,
            capacity,
            hbm: Hbm::of(serving()),
            with_kernels: Hbm::of(serving().filter(|gpu| gpu.quantises)),
        }
    }

    /// What a session with these needs can have.
    #[must_use]
    pub const fn hbm_for(&self, needs: Needs) -> Hbm {
        if needs.kernels { self.with_kernels } else { self.hbm }
    }

    fn full(&self) -> bool {
        u128::from(self.used.0) * 100 >= u128::from(self.capacity.0) * FULL_PERCENT
    }

    /// Whether it is worth asking others how they are.
    #[must_use]
    pub fn pressed(&self) -> bool {
        !self.runs || self.full() || self.queue >= MOVE_QUEUE_GAP
    }

    /// Less is better: who can run it, who has room for it, who is idle.
    fn rank(&self) -> (bool, bool, u32) {
        (!self.runs, self.full(), self.queue)
    }
}

/// The node that takes a new session: another one only where that can run it and this one cannot, or has room and this
/// one has not, or has far fewer requests waiting. None where it stays here.
#[must_use]
pub fn choose_node<'a>(here: &NodeLoad, others: &'a [(NodeName, NodeLoad)]) -> Option<&'a NodeName> {
    let (name, best) = others.iter().min_by_key(|(name, load)| (load.rank(), name.clone()))?;
    let (mine, theirs) = (here.rank(), best.rank());
    let equal = (mine.0, mine.1) == (theirs.0, theirs.1);
    let better = if equal { theirs.2.saturating_add(MOVE_QUEUE_GAP) <= mine.2 } else { theirs < mine };
    better.then_some(name)
}

/// The replica that takes a shard over whose owner has no room for a session: where a GPU has room for it, or could ever have
/// while none of the owner's could. None where the owner may find room as well as another.
#[must_use]
pub fn choose_successor<'a>(
    here: &NodeLoad,
    others: &'a [(NodeName, NodeLoad)],
    needs: Needs,
) -> Option<&'a NodeName> {
    let has_room = |load: &NodeLoad| load.hbm_for(needs).room >= needs.bytes;
    let ever = |load: &NodeLoad| load.hbm_for(needs).largest >= needs.bytes;
    if ever(here) && has_room(here) {
        return None;
    }
    let fits = |(_, load): &&(NodeName, NodeLoad)| ever(load) && (has_room(load) || !ever(here));
    let best = others.iter().filter(fits).min_by_key(|(name, load)| (!has_room(load), load.queue, name));
    best.map(|(name, _)| name)
}

/// A GPU as placement sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuLoad {
    /// Which.
    pub index: GpuIndex,
    /// Whether it serves.
    pub healthy: bool,
    /// Bytes that could be had without evicting anybody.
    pub free: Bytes,
    /// Bytes of sessions that may leave.
    pub evictable: Bytes,
    /// Bytes of its arena.
    pub capacity: Bytes,
    /// Whether it takes the kernels that make and read cold forms.
    pub quantises: bool,
    /// Leases running.
    pub leases: u32,
    /// Requests waiting for it.
    pub queue: u32,
}

impl GpuLoad {
    /// Bytes that a session can have: what is free, and what may leave.
    #[must_use]
    pub fn room(&self) -> Bytes {
        (self.free + self.evictable).min(self.capacity)
    }

    /// Less is better: who waits, who runs, then what is full.
    fn pressure(&self) -> (u32, u32, u64) {
        let full =
            (self.capacity.0 - self.free.0.min(self.capacity.0)).saturating_mul(100) / self.capacity.0.max(1);
        (self.queue, self.leases, full)
    }
}

/// What a session needs of the GPU that it runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Room for its bytes.
    pub bytes: Bytes,
    /// Kernels for its cold form.
    pub kernels: bool,
}

/// The GPU to run a session on: the one that was asked for if it serves; else where the session is warm,
/// unless another is far less loaded; else the least loaded. None where no GPU serves or can ever hold it.
#[must_use]
pub fn choose(
    gpus: &[GpuLoad],
    wish: Option<GpuIndex>,
    warm: Option<GpuIndex>,
    needs: Needs,
) -> Option<GpuIndex> {
    let fit =
        |gpu: &&GpuLoad| gpu.healthy && gpu.capacity >= needs.bytes && (gpu.quantises || !needs.kernels);
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
        GpuLoad {
            index,
            healthy: true,
            free,
            evictable: Bytes(0),
            capacity,
            quantises: true,
            leases: 0,
            queue,
        }
    }

    const fn bytes(bytes: u64) -> Needs {
        Needs { bytes: Bytes(bytes), kernels: false }
    }

    #[test]
    fn a_new_session_goes_to_another_node_only_where_that_is_far_better() {
        let load = |runs, queue, used| NodeLoad {
            runs,
            queue,
            used: Bytes(used),
            capacity: Bytes(100),
            hbm: Hbm::default(),
            with_kernels: Hbm::default(),
        };
        let here = load(true, 7, 89);
        assert!(!here.pressed());
        for pressed in [load(false, 0, 0), load(true, 8, 0), load(true, 0, 90)] {
            assert!(pressed.pressed(), "{pressed:?}");
        }
        let name = |n: &str| -> NodeName { n.parse().unwrap() };
        let others = |a, b| vec![(name("a"), a), (name("b"), b)];
        let idle = others(load(true, 1, 50), load(true, 0, 50));
        assert_eq!(choose_node(&here, &idle), None, "a few turns of waiting are cheaper than another node");
        assert_eq!(choose_node(&load(true, 8, 0), &idle), Some(&name("b")));
        assert_eq!(choose_node(&load(true, 0, 95), &idle), Some(&name("b")), "where room is");
        assert_eq!(choose_node(&load(false, 0, 0), &idle), Some(&name("b")), "where it can run");
        let full = others(load(true, 0, 95), load(false, 0, 10));
        assert_eq!(choose_node(&load(true, 0, 95), &full), None, "nobody is better off");
        assert_eq!(choose_node(&load(false, 0, 95), &full), Some(&name("a")));
        assert_eq!(choose_node(&load(false, 0, 95), &[]), None);
        let none = NodeLoad { capacity: Bytes(0), ..load(true, 0, 0) };
        assert!(none.pressed(), "a node without memory takes nothing");
    }

    #[test]
    fn who_has_no_room_is_followed_by_who_has() {
        let load = |queue, capacity, free| {
            let gpu = GpuLoad { capacity: Bytes(capacity), ..gpu(0, queue, free) };
            NodeLoad::of(&[gpu], Bytes(0), Bytes(100))
        };
        let name = |n: &str| -> NodeName { n.parse().unwrap() };
        let chosen_for = |needs, here: NodeLoad, others: [NodeLoad; 2]| {
            let others = [(name("b"), others[0]), (name("c"), others[1])];
            choose_successor(&here, &others, needs).cloned()
        };
        let chosen = |here, others| chosen_for(bytes(50), here, others);
        assert_eq!(chosen(load(0, 100, 50), [load(0, 100, 100); 2]), None, "there is room here");
        let full = load(0, 100, 10);
        assert_eq!(chosen(full, [load(0, 100, 49), load(9, 100, 50)]), Some(name("c")));
        assert_eq!(chosen(full, [load(1, 100, 100), load(0, 50, 50)]), Some(name("c")), "the idle one");
        assert_eq!(chosen(full, [full, load(0, 40, 40)]), None, "it may as well wait here");
        let small = load(0, 40, 40);
        assert_eq!(chosen(small, [small, full]), Some(name("c")), "where it can run some day");
        assert_eq!(chosen(small, [full, load(5, 60, 60)]), Some(name("c")), "better now");
        let fenced = NodeLoad::of(&[GpuLoad { healthy: false, ..gpu(0, 0, 100) }], Bytes(0), Bytes(100));
        assert_eq!(chosen(small, [small, fenced]), None);
        // With a cold form, GPUs without kernels count for nothing, here and there.
        let needs = Needs { kernels: true, ..bytes(50) };
        let old = NodeLoad::of(&[GpuLoad { quantises: false, ..gpu(0, 0, 100) }], Bytes(0), Bytes(100));
        assert_eq!(chosen_for(needs, old, [old, load(7, 100, 60)]), Some(name("c")));
        assert_eq!(chosen_for(needs, full, [old, old]), None);
    }

    #[test]
    fn room_is_what_is_free_and_what_may_leave() {
        assert_eq!(gpu(0, 0, 10).room(), Bytes(10));
        assert_eq!(GpuLoad { evictable: Bytes(60), ..gpu(0, 0, 10) }.room(), Bytes(70));
        // Sessions that share blocks are counted twice.
        assert_eq!(GpuLoad { evictable: Bytes(95), ..gpu(0, 0, 10) }.room(), Bytes(100));
    }

    #[test]
    fn a_session_stays_where_it_is_warm() {
        let gpus = [gpu(0, 5, 10), gpu(1, 0, 90)];
        assert_eq!(choose(&gpus, None, Some(GpuIndex(0)), bytes(50)), Some(GpuIndex(0)));
        let gpus = [gpu(0, 8, 10), gpu(1, 0, 90)];
        assert_eq!(
            choose(&gpus, None, Some(GpuIndex(0)), bytes(50)),
            Some(GpuIndex(1)),
            "unless it is far too busy"
        );
    }

    #[test]
    fn a_cold_session_goes_where_room_is() {
        let gpus = [gpu(0, 0, 10), gpu(1, 0, 90)];
        assert_eq!(choose(&gpus, None, None, bytes(50)), Some(GpuIndex(1)));
        assert_eq!(
            choose(&gpus, Some(GpuIndex(0)), None, bytes(50)),
            Some(GpuIndex(0)),
            "unless another is asked for"
        );
        assert_eq!(choose(&gpus, Some(GpuIndex(7)), None, bytes(50)), None);
        assert_eq!(choose(&gpus, None, None, bytes(101)), None, "it can never fit");
    }

    #[test]
    fn a_session_with_a_cold_form_runs_where_its_kernels_are() {
        let gpus = [GpuLoad { quantises: false, ..gpu(0, 0, 100) }, gpu(1, 50, 0)];
        let needs = Needs { kernels: true, ..bytes(1) };
        assert_eq!(choose(&gpus, None, Some(GpuIndex(0)), needs), Some(GpuIndex(1)), "wherever it is warm");
        assert_eq!(choose(&gpus, Some(GpuIndex(0)), None, needs), None, "nor where somebody wants it");
        assert_eq!(choose(&gpus, None, None, bytes(1)), Some(GpuIndex(0)));
    }

    #[test]
    fn a_fenced_gpu_gets_nothing() {
        let fenced = GpuLoad { healthy: false, ..gpu(0, 0, 100) };
        assert_eq!(choose(&[fenced, gpu(1, 50, 0)], None, Some(GpuIndex(0)), bytes(1)), Some(GpuIndex(1)));
        assert_eq!(choose(&[fenced], None, None, bytes(1)), None);
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
