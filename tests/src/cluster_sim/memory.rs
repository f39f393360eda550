//! A simulated node's pinned memory: block instances with what was written into them, counted by name and by pin.

use std::collections::BTreeMap;

use keepwarm_types::{InstanceId, SessionId, TenantName};

use crate::sim::memory::{POISON, Stamp};

/// One block instance.
#[derive(Debug, Clone)]
pub struct Slot {
    pub content: Vec<Stamp>,
    /// Whose it is.
    pub of: (TenantName, SessionId),
    /// References by manifests and stages.
    pub names: u32,
    /// References by readers, writers and transfers.
    pub pins: u32,
}

/// What one process holds.
#[derive(Debug)]
pub struct Memory {
    pub capacity: usize,
    slots: BTreeMap<InstanceId, Slot>,
    next: u64,
}

impl Memory {
    /// Instances are named apart from those of every other process.
    #[must_use]
    pub const fn new(capacity: usize, life: u64) -> Self {
        Self { capacity, slots: BTreeMap::new(), next: life << 24 }
    }

    #[must_use]
    pub fn has_room(&self, blocks: usize) -> bool {
        self.slots.len() + blocks <= self.capacity
    }

    /// Takes a block for a writer; none where there is no room.
    pub fn take(&mut self, content: Vec<Stamp>, of: (TenantName, SessionId)) -> Option<InstanceId> {
        if !self.has_room(1) {
            return None;
        }
        self.next += 1;
        let id = InstanceId(self.next);
        self.slots.insert(id, Slot { content, of, names: 0, pins: 1 });
        Some(id)
    }

    /// Bytes of another node: a new instance with one name, or one name more of the same.
    pub fn arrive(&mut self, id: InstanceId, content: Vec<Stamp>, of: (TenantName, SessionId)) {
        self.slots.entry(id).or_insert(Slot { content, of, names: 0, pins: 0 }).names += 1;
    }

    #[must_use]
    pub fn get(&self, id: InstanceId) -> Option<&Slot> {
        self.slots.get(&id)
    }

    pub fn get_mut(&mut self, id: InstanceId) -> Option<&mut Slot> {
        self.slots.get_mut(&id)
    }

    /// The content, or poison where it was given back.
    #[must_use]
    pub fn read(&self, id: InstanceId) -> Vec<Stamp> {
        self.slots.get(&id).map_or_else(|| vec![POISON], |slot| slot.content.clone())
    }

    /// False where there is no such instance.
    pub fn name(&mut self, id: InstanceId) -> bool {
        self.slots.get_mut(&id).map(|slot| slot.names += 1).is_some()
    }

    pub fn unname(&mut self, id: InstanceId) {
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.names = slot.names.saturating_sub(1);
            self.settle(id);
        }
    }

    /// False where there is no such instance.
    pub fn pin(&mut self, id: InstanceId) -> bool {
        self.slots.get_mut(&id).map(|slot| slot.pins += 1).is_some()
    }

    pub fn unpin(&mut self, id: InstanceId) {
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.pins = slot.pins.saturating_sub(1);
            self.settle(id);
        }
    }

    fn settle(&mut self, id: InstanceId) {
        if self.slots.get(&id).is_some_and(|slot| slot.names == 0 && slot.pins == 0) {
            self.slots.remove(&id);
        }
    }

    pub fn slots(&self) -> impl Iterator<Item = (&InstanceId, &Slot)> {
        self.slots.iter()
    }
}
