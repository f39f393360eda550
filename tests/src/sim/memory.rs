//! The pinned tier of a simulated node: block instances whose units are stamps that name their origin.

use std::collections::BTreeMap;

use keepwarm_types::{BlockChecksum, InstanceId};

/// One unit of state (a token, or a byte of a `bytes` part): who wrote it, where and when.
pub type Stamp = u64;

/// Stands where bytes were given back: no write ever makes it.
pub const POISON: Stamp = u64::MAX;

#[derive(Debug, Clone)]
struct Slot {
    content: Vec<Stamp>,
    /// References by manifests and stages.
    names: u32,
    /// References by readers and writers.
    pins: u32,
}

/// An arena that counts its references.
#[derive(Debug)]
pub struct Memory {
    capacity: usize,
    slots: BTreeMap<InstanceId, Slot>,
    next: u64,
    /// References that were given back more often than they were taken.
    pub underflows: usize,
}

impl Memory {
    #[must_use]
    pub fn new(capacity: usize, first: u64) -> Self {
        Self { capacity, slots: BTreeMap::new(), next: first, underflows: 0 }
    }

    /// Takes a block for a writer; none where the arena is full.
    pub fn take(&mut self, content: Vec<Stamp>) -> Option<InstanceId> {
        if self.slots.len() >= self.capacity {
            return None;
        }
        self.next += 1;
        let id = InstanceId(self.next);
        self.slots.insert(id, Slot { content, names: 0, pins: 1 });
        Some(id)
    }

    /// The content, or poison where it was given back.
    #[must_use]
    pub fn read(&self, id: InstanceId) -> Vec<Stamp> {
        self.slots.get(&id).map_or_else(|| vec![POISON], |slot| slot.content.clone())
    }

    pub fn name(&mut self, id: InstanceId) {
        match self.slots.get_mut(&id) {
            Some(slot) => slot.names += 1,
            None => self.underflows += 1,
        }
    }

    pub fn unname(&mut self, id: InstanceId) {
        let Some(slot) = self.slots.get_mut(&id).filter(|slot| slot.names > 0) else {
            self.underflows += 1;
            return;
        };
        slot.names -= 1;
        self.settle(id);
    }

    pub fn pin(&mut self, id: InstanceId) {
        match self.slots.get_mut(&id) {
            Some(slot) => slot.pins += 1,
            None => self.underflows += 1,
        }
    }

    pub fn unpin(&mut self, id: InstanceId) {
        let Some(slot) = self.slots.get_mut(&id).filter(|slot| slot.pins > 0) else {
            self.underflows += 1;
            return;
        };
        slot.pins -= 1;
        self.settle(id);
    }

    fn settle(&mut self, id: InstanceId) {
        if self.slots.get(&id).is_some_and(|slot| slot.names == 0 && slot.pins == 0) {
            self.slots.remove(&id);
        }
    }

    /// Damages the content of some named instance.
    pub fn flip(&mut self, choice: usize) {
        let named: Vec<_> = self.slots.iter().filter(|(_, slot)| slot.names > 0).map(|(id, _)| *id).collect();
        if let Some(slot) =
            (!named.is_empty()).then(|| named[choice % named.len()]).and_then(|id| self.slots.get_mut(&id))
            && let Some(stamp) = slot.content.first_mut()
        {
            *stamp ^= 1 << 40;
        }
    }

    #[must_use]
    pub fn used(&self) -> usize {
        self.slots.len()
    }

    #[must_use]
    pub fn pinned(&self) -> usize {
        self.slots.values().filter(|slot| slot.pins > 0).count()
    }

    /// References by manifests and stages, over all instances.
    #[must_use]
    pub fn names(&self) -> u64 {
        self.slots.values().map(|slot| u64::from(slot.names)).sum()
    }
}

/// A checksum as a real node keeps one beside each block.
#[must_use]
pub fn checksum(content: &[Stamp]) -> BlockChecksum {
    let fold = |hash: u128, stamp: &Stamp| {
        (hash ^ u128::from(*stamp)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    };
    BlockChecksum::from_u128(content.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, fold))
}
