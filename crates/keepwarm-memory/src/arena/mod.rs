//! An arena: one reservation, carved into extents that serve one block size at a time.
//!
//! Owns the region and the table of extents. Allocation and release are a short critical section over the
//! table: no memory is requested from the system after start, and an extent whose last block comes back
//! changes size freely, so fragmentation does not grow with time.

mod table;

use std::fmt;
use std::sync::{Arc, PoisonError};

use keepwarm_types::{Bytes, Owner, TenantName};

use crate::fault::FaultPlan;
use crate::guard::BlockMut;
use crate::region::{LockReport, Region, ReserveError};
use crate::sync::{Mutex, MutexGuard};
pub(crate) use table::Slot;
use table::{Past, Table};

/// Size of an extent, where the settings do not say otherwise: the largest block fits one.
pub const EXTENT_BYTES: u64 = 64 << 20;
/// Blocks begin at multiples of this, so that vector loads and DMA are aligned.
pub const BLOCK_ALIGN: u64 = 64;
/// The smallest extent that makes sense.
const EXTENT_BYTES_MIN: u64 = 4096;

/// How to reserve an arena.
#[derive(Debug, Clone)]
pub struct ArenaSettings {
    /// Named in errors and figures: `hbm:0`, `pinned`.
    pub name: String,
    /// How much to reserve; rounded down to whole extents.
    pub bytes: Bytes,
    /// Size of an extent: [`EXTENT_BYTES`], or less for a small arena.
    pub extent: Bytes,
    /// Whether to lock the pages in RAM.
    pub lock: bool,
}

impl ArenaSettings {
    /// Settings for `bytes`, with extents of at most [`EXTENT_BYTES`] and at least 16 of them where that
    /// leaves extents of 2 MiB or more: a small arena needs more than one extent to serve two block sizes.
    #[must_use]
    pub fn new(name: impl Into<String>, bytes: Bytes) -> Self {
        let share = (bytes.0 / 16).next_power_of_two() / 2;
        let extent = share.clamp(2 << 20, EXTENT_BYTES).min(bytes.0.max(EXTENT_BYTES_MIN));
        Self { name: name.into(), bytes, extent: Bytes(extent), lock: false }
    }

    /// The same, with extents that hold at least `block` each.
    #[must_use]
    pub fn fitting(mut self, block: Bytes) -> Self {
        let wanted = block.0.next_multiple_of(BLOCK_ALIGN);
        self.extent = Bytes(self.extent.0.max(wanted).min(self.bytes.0));
        self
    }

    /// The same, with pages locked in RAM where the system allows.
    #[must_use]
    pub fn locked(mut self) -> Self {
        self.lock = true;
        self
    }
}

/// No block of that size can be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutOfMemory {
    /// No extent can serve it now.
    #[error("arena {arena} has no room for {count} blocks of {block}")]
    Full {
        /// Which arena.
        arena: String,
        /// Size of a block.
        block: Bytes,
        /// How many were asked for.
        count: usize,
    },
    /// It can never be served.
    #[error("arena {arena} has extents of {extent}: a block of {block} never fits")]
    TooLarge {
        /// Which arena.
        arena: String,
        /// Size of a block.
        block: Bytes,
        /// Size of an extent.
        extent: Bytes,
    },
    /// The device failed it.
    #[error("arena {0}: the device refused the allocation")]
    Device(String),
}

/// Figures of an arena.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ArenaFigures {
    /// Reserved at start.
    pub reserved: Bytes,
    /// In blocks that somebody holds, rounding included.
    pub used: Bytes,
    /// Bytes that a block of any size can have: free extents.
    pub free_extents: Bytes,
    /// Largest block that can be had now.
    pub largest_free: Bytes,
    /// Share of the free bytes that lie in extents bound to one size, 0 to 1.
    pub fragmentation: f64,
    /// Blocks that somebody holds.
    pub blocks: u64,
}

pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) region: Region,
    table: Mutex<Table>,
    faults: Option<Arc<FaultPlan>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        // The table's critical sections do not panic but on its own assertions; going on with what it says
        // is safe because each section keeps it whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `alone`: nothing is left in the slot but what this tenant wrote, and zeroes.
    pub(crate) fn release(&self, slot: Slot, last: TenantName, alone: bool) {
        self.table().release(slot, if alone { Past::Tenant(last) } else { Past::Mixed });
    }
}

/// Memory reserved once; cheap to clone.
#[derive(Debug, Clone)]
pub struct Arena {
    shared: Arc<Shared>,
}

impl Arena {
    /// Reserves an arena and touches or locks all its pages.
    ///
    /// # Errors
    /// [`ReserveError`] where the size is less than one extent or the system has not as much.
    pub fn reserve(settings: &ArenaSettings) -> Result<Self, ReserveError> {
        Self::with_faults(settings, None)
    }

    pub(crate) fn with_faults(
        settings: &ArenaSettings,
        faults: Option<Arc<FaultPlan>>,
    ) -> Result<Self, ReserveError> {
        Self::over(settings, faults, |bytes| Region::reserve(bytes, settings.lock))
    }

    /// An arena over a region of the given size, which `reserve` makes.
    pub(crate) fn over<E: From<ReserveError>>(
        settings: &ArenaSettings,
        faults: Option<Arc<FaultPlan>>,
        reserve: impl FnOnce(u64) -> Result<Region, E>,
    ) -> Result<Self, E> {
        let extent = settings.extent.0 / BLOCK_ALIGN * BLOCK_ALIGN;
        if extent < EXTENT_BYTES_MIN || settings.bytes.0 < extent {
            return Err(ReserveError::Size(settings.bytes, Bytes(extent.max(EXTENT_BYTES_MIN))).into());
        }
        let extents = settings.bytes.0 / extent;
        let region = reserve(extents * extent)?;
        let table = Mutex::new(Table::new(extents, extent));
        Ok(Self { shared: Arc::new(Shared { name: settings.name.clone(), region, table, faults }) })
    }

    /// Whether the host can touch its memory; what a device has of its own it cannot.
    #[must_use]
    pub fn is_on_host(&self) -> bool {
        self.shared.region.context().is_none()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether its pages are locked.
    pub fn locked(&self) -> &LockReport {
        self.shared.region.locked()
    }

    /// `count` blocks of `bytes` each for `owner`, or none.
    ///
    /// A block that another tenant had before is zeroed before its bytes can be reached.
    ///
    /// # Errors
    /// [`OutOfMemory`]; nothing is taken then.
    pub fn allocate(&self, owner: &Owner, bytes: Bytes, count: usize) -> Result<Vec<BlockMut>, OutOfMemory> {
        let shared = &self.shared;
        if shared.faults.as_ref().is_some_and(|faults| faults.allocation_fails()) {
            return Err(OutOfMemory::Device(shared.name.clone()));
        }
        let mut table = shared.table();
        if bytes.0 == 0 || bytes.0 > table.extent_bytes() {
            let extent = Bytes(table.extent_bytes());
            return Err(OutOfMemory::TooLarge { arena: shared.name.clone(), block: bytes, extent });
        }
        let Some(slots) = table.take(bytes.0.next_multiple_of(BLOCK_ALIGN), count) else {
            return Err(OutOfMemory::Full { arena: shared.name.clone(), block: bytes, count });
        };
        drop(table);
        let guard = |(slot, offset, past): (Slot, u64, Past)| {
            let scrub = match past {
                Past::Zero => false,
                Past::Tenant(tenant) => tenant != owner.tenant,
                Past::Mixed => true,
            };
            BlockMut::new(Arc::clone(shared), slot, offset, bytes.as_usize(), owner.clone(), scrub)
        };
        Ok(slots.into_iter().map(guard).collect())
    }

    /// Figures of now.
    #[must_use]
    pub fn figures(&self) -> ArenaFigures {
        self.shared.table().figures()
    }

    /// Checks the table against itself.
    ///
    /// # Panics
    /// If the book-keeping is broken.
    pub fn validate(&self) {
        self.shared.table().validate();
    }
}

#[cfg(test)]
mod tests;
