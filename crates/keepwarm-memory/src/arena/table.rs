//! The arena's book-keeping: which extent serves which size, and which of its slots are free.

use std::collections::{BTreeMap, BTreeSet};

use keepwarm_types::{Bytes, TenantName};

use super::ArenaFigures;

/// A block's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    extent: u32,
    index: u32,
}

/// What a slot's bytes were before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Past {
    /// Never written since the reservation.
    Zero,
    /// Written by this tenant alone.
    Tenant(TenantName),
    /// Written by who knows whom, at another block size.
    Mixed,
}

#[derive(Debug)]
struct Extent {
    /// Bytes per slot; zero while the extent is free.
    size: u64,
    free: Vec<u32>,
    past: Vec<Past>,
    used: u32,
    written: bool,
}

#[derive(Debug)]
pub(super) struct Table {
    extent_bytes: u64,
    extents: Vec<Extent>,
    free: BTreeSet<u32>,
    /// Per size, the extents with a free slot; the lowest is used first, so that the others drain.
    open: BTreeMap<u64, BTreeSet<u32>>,
    used: u64,
    blocks: u64,
}

impl Table {
    pub(super) fn new(extents: u64, extent_bytes: u64) -> Self {
        let count = u32::try_from(extents).expect("an arena has fewer than 2^32 extents");
        let empty = || Extent { size: 0, free: Vec::new(), past: Vec::new(), used: 0, written: false };
        Self {
            extent_bytes,
            extents: (0..count).map(|_| empty()).collect(),
            free: (0..count).collect(),
            open: BTreeMap::new(),
            used: 0,
            blocks: 0,
        }
    }

    pub(super) const fn extent_bytes(&self) -> u64 {
        self.extent_bytes
    }

    fn slots(&self, size: u64) -> u32 {
        u32::try_from(self.extent_bytes / size).expect("an extent has fewer than 2^32 slots")
    }

    /// Slots that `size` could still have.
    fn available(&self, size: u64) -> u64 {
        let open: u64 = self
            .open
            .get(&size)
            .into_iter()
            .flatten()
            .map(|e| self.extents[*e as usize].free.len() as u64)
            .sum();
        open + self.free.len() as u64 * u64::from(self.slots(size))
    }

    /// Takes `count` slots of `size`, or none.
    pub(super) fn take(&mut self, size: u64, count: usize) -> Option<Vec<(Slot, u64, Past)>> {
        if self.available(size) < count as u64 {
            return None;
        }
        let taken = (0..count).map(|_| self.take_one(size)).collect();
        self.used += size * count as u64;
        self.blocks += count as u64;
        Some(taken)
    }

    fn take_one(&mut self, size: u64) -> (Slot, u64, Past) {
        let open = self.open.entry(size).or_default();
        let id = open.first().copied().unwrap_or_else(|| {
            let id = self.free.pop_first().expect("availability was checked before");
            open.insert(id);
            let slots = u32::try_from(self.extent_bytes / size).expect("an extent has fewer than 2^32 slots");
            let extent = &mut self.extents[id as usize];
            let past = if extent.written { Past::Mixed } else { Past::Zero };
            extent.size = size;
            extent.free = (0..slots).rev().collect();
            extent.past = vec![past; slots as usize];
            id
        });
        let extent = &mut self.extents[id as usize];
        let index = extent.free.pop().expect("an open extent has a free slot");
        extent.used += 1;
        extent.written = true;
        if extent.free.is_empty() {
            open.remove(&id);
        }
        let past = std::mem::replace(&mut extent.past[index as usize], Past::Mixed);
        (Slot { extent: id, index }, u64::from(id) * self.extent_bytes + u64::from(index) * size, past)
    }

    pub(super) fn release(&mut self, slot: Slot, past: Past) {
        let extent = &mut self.extents[slot.extent as usize];
        let size = extent.size;
        extent.free.push(slot.index);
        extent.past[slot.index as usize] = past;
        extent.used -= 1;
        self.used -= size;
        self.blocks -= 1;
        let open = self.open.entry(size).or_default();
        open.insert(slot.extent);
        if extent.used == 0 {
            open.remove(&slot.extent);
            extent.size = 0;
            extent.free = Vec::new();
            extent.past = Vec::new();
            self.free.insert(slot.extent);
        }
        if open.is_empty() {
            self.open.remove(&size);
        }
    }

    pub(super) fn figures(&self) -> ArenaFigures {
        let reserved = self.extent_bytes * self.extents.len() as u64;
        let free = reserved - self.used;
        let free_extents = self.extent_bytes * self.free.len() as u64;
        let largest = if self.free.is_empty() {
            self.open.keys().next_back().copied().unwrap_or(0)
        } else {
            self.extent_bytes
        };
        ArenaFigures {
            reserved: Bytes(reserved),
            used: Bytes(self.used),
            free_extents: Bytes(free_extents),
            largest_free: Bytes(largest),
            fragmentation: if free == 0 { 0.0 } else { (free - free_extents) as f64 / free as f64 },
            blocks: self.blocks,
        }
    }

    pub(super) fn validate(&self) {
        let mut used = 0;
        for (id, extent) in self.extents.iter().enumerate() {
            let id = u32::try_from(id).expect("an arena has fewer than 2^32 extents");
            if extent.size == 0 {
                assert!(self.free.contains(&id), "extent {id} has no size but is not free");
                continue;
            }
            assert!(!self.free.contains(&id), "extent {id} serves {} bytes but is free", extent.size);
            let slots = self.slots(extent.size);
            assert_eq!(extent.free.len() as u32 + extent.used, slots, "extent {id} lost or gained slots");
            assert!(extent.used > 0, "extent {id} is empty and yet bound to a size");
            let open = self.open.get(&extent.size).is_some_and(|open| open.contains(&id));
            assert_eq!(open, !extent.free.is_empty(), "extent {id} is listed wrongly");
            used += u64::from(extent.used) * extent.size;
        }
        assert_eq!(used, self.used, "used bytes do not add up");
    }
}
