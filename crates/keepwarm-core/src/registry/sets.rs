//! The table of shards: who is in each set, in pages that clones of the registry share.

use std::sync::Arc;

use keepwarm_types::{Generation, ShardId, Timestamp};

/// Most replicas of a shard: `replication` of at most four, and one, and one that replaces another before it goes.
pub const REPLICAS_MAX: usize = 6;
/// A node's place in the table; nodes are never taken out of it.
pub(super) type Place = u16;
pub(super) const NOBODY: Place = Place::MAX;
/// Sets in a page, the unit of copying: 10 KB. A clone of 65,536 shards counts up 256 pages, and an entry that
/// changes one shard copies one.
const PAGE: usize = 256;

/// 40 bytes a shard: 65,536 shards are 2.6 MB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) generation: Generation,
    pub(super) lost_at: Timestamp,
    pub(super) changed: u64,
    pub(super) replicas: [Place; REPLICAS_MAX],
    pub(super) learner: Place,
}

const _: () = assert!(size_of::<Set>() <= 40);

impl Set {
    pub(super) const EMPTY: Self = Self {
        generation: Generation(0),
        lost_at: Timestamp::NEVER,
        changed: 0,
        replicas: [NOBODY; REPLICAS_MAX],
        learner: NOBODY,
    };

    pub(super) fn members(&self) -> impl DoubleEndedIterator<Item = Place> + Clone {
        let count = self.len();
        self.replicas.into_iter().take(count)
    }

    pub(super) fn primary(&self) -> Option<Place> {
        Some(self.replicas[0]).filter(|place| *place != NOBODY)
    }

    pub(super) fn learner(&self) -> Option<Place> {
        Some(self.learner).filter(|place| *place != NOBODY)
    }

    pub(super) fn len(&self) -> usize {
        self.replicas.iter().take_while(|place| **place != NOBODY).count()
    }

    pub(super) fn has(&self, node: Place) -> bool {
        self.replicas.contains(&node)
    }

    pub(super) fn put(&mut self, members: &[Place]) {
        self.replicas = [NOBODY; REPLICAS_MAX];
        self.replicas[..members.len()].copy_from_slice(members);
    }

    pub(super) fn without(&self, node: Place) -> Vec<Place> {
        self.members().filter(|place| *place != node).collect()
    }

    /// Takes a node out of a set that has others; the next one becomes primary. False where nothing changed.
    pub(super) fn take_out(&mut self, node: Place) -> bool {
        let learner = self.learner == node;
        let replica = self.has(node) && self.len() > 1;
        if learner {
            self.learner = NOBODY;
        }
        if replica {
            let members = self.without(node);
            self.put(&members);
        }
        if learner || replica {
            self.generation = self.generation.next();
        }
        learner || replica
    }
}

#[derive(Debug, Clone)]
struct Page {
    /// The registry's version at the last change of any set here.
    changed: u64,
    sets: Arc<[Set]>,
}

#[derive(Debug, Clone)]
pub(super) struct Sets {
    pages: Vec<Page>,
    count: usize,
}

impl Sets {
    pub(super) fn new(count: usize) -> Self {
        let pages = (0..count)
            .step_by(PAGE)
            .map(|start| Page { changed: 0, sets: vec![Set::EMPTY; PAGE.min(count - start)].into() })
            .collect();
        Self { pages, count }
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn get(&self, shard: ShardId) -> Option<&Set> {
        let at = shard.0 as usize;
        self.pages.get(at / PAGE)?.sets.get(at % PAGE)
    }

    pub(super) fn put(&mut self, shard: ShardId, set: Set) {
        let at = shard.0 as usize;
        if let Some(page) = self.pages.get_mut(at / PAGE)
            && let Some(place) = Arc::make_mut(&mut page.sets).get_mut(at % PAGE)
        {
            *place = set;
            page.changed = page.changed.max(set.changed);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (ShardId, &Set)> {
        (0..).map(ShardId).zip(self.pages.iter().flat_map(|page| page.sets.iter()))
    }

    /// Sets that have changed after `version`; pages without any are not looked into.
    pub(super) fn since(&self, version: u64) -> impl Iterator<Item = (ShardId, &Set)> {
        let pages = (0u32..).zip(&self.pages).filter(move |(_, page)| page.changed > version);
        pages
            .flat_map(|(number, page)| (number * PAGE as u32..).map(ShardId).zip(page.sets.iter()))
            .filter(move |(_, set)| set.changed > version)
    }

    /// Shards in whose set the node is, as replica or learner.
    pub(super) fn of(&self, node: Place) -> Vec<ShardId> {
        self.iter().filter(|(_, set)| set.has(node) || set.learner == node).map(|(shard, _)| shard).collect()
    }
}
