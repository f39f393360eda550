//! Which addresses are live, and the mappings behind them. The only module that maps memory.
#![expect(unsafe_code, reason = "maps memory and writes poison into it")]

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use super::area::Area;
use super::{ALIGNMENT, POISON_PINNED};
use crate::error::{Answer, Code};
use crate::locks::{lock, read, write};

/// Address space of page-locked memory, and of memory opened from other processes: far above any host's RAM share
/// that a test uses, and it costs nothing until it is mapped.
const SIDE_AREA: usize = 256 << 30;
/// Allocations that may live at once: their bookkeeping then stays under 1 GiB.
pub(crate) const ALLOCATIONS_MAX: usize = 1 << 20;
/// Start of each device's area that holds its table of exported allocations.
pub(crate) const HEADER: usize = 4096;
/// Page size of mappings.
const PAGE: usize = 4096;

/// Where an allocation lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// On a device.
    Device(usize),
    /// Page-locked by this library.
    Pinned,
    /// The program's own memory, page-locked by registration.
    Registered,
    /// Another process's device memory.
    Imported(usize),
}

/// Live memory.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) id: u64,
    pub(crate) start: usize,
    pub(crate) bytes: usize,
    pub(crate) place: Place,
    /// The handle of the context that made it, or 0.
    pub(crate) context: usize,
    /// The pool's handle, for stream-ordered allocations.
    pub(crate) pool: Option<usize>,
    /// Set by the call that frees it, so that a second one is refused.
    pub(crate) ending: AtomicBool,
    /// Its slot in the header of its device's area, where it is exported to other processes.
    pub(crate) export: Mutex<Option<usize>>,
}

impl Allocation {
    /// The device whose memory it is.
    pub(crate) fn device(&self) -> Option<usize> {
        match self.place {
            Place::Device(device) | Place::Imported(device) => Some(device),
            Place::Pinned | Place::Registered => None,
        }
    }

    /// Bytes that it takes of a budget.
    pub(crate) fn charged(&self) -> u64 {
        self.bytes.next_multiple_of(ALIGNMENT) as u64
    }

    pub(crate) fn end(&self) -> usize {
        self.start + self.bytes
    }
}

/// A device's memory as an object that another process can map.
#[derive(Debug)]
struct Backing {
    file: OwnedFd,
    area: Mutex<Area>,
}

/// All addresses of this process that the devices know.
#[derive(Debug)]
pub(crate) struct Space {
    devices: Vec<Backing>,
    pinned: Mutex<Area>,
    imported: Mutex<Area>,
    live: RwLock<BTreeMap<usize, Arc<Allocation>>>,
    serial: AtomicU64,
}

fn system() -> Code {
    Code::OPERATING_SYSTEM
}

/// Maps anonymous or shared memory at a fixed place inside the reservation.
fn map_at(start: usize, bytes: usize, file: Option<(RawFd, usize)>) -> Answer<()> {
    let sharing = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
    let (descriptor, offset) = file.unwrap_or((-1, 0));
    let offset = libc::off_t::try_from(offset).map_err(|_| Code::INVALID_VALUE)?;
    // SAFETY: the range lies within the reservation that `Space::new` made and is not in use: an `Area` hands out
    // each address once.
    let mapped = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            sharing | libc::MAP_FIXED | libc::MAP_NORESERVE,
            descriptor,
            offset,
        )
    };
    if mapped == libc::MAP_FAILED { Err(Code::MAP_FAILED) } else { Ok(()) }
}

/// Puts a range of the reservation back to no access.
fn unmap_at(start: usize, bytes: usize) {
    // SAFETY: as in `map_at`; the allocation that was there is not live any more.
    unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            bytes,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        );
    }
}

impl Space {
    /// Reserves addresses for devices with that much memory each.
    pub(crate) fn new(memories: &[u64]) -> Answer<Self> {
        // Twice the budget: first fit leaves gaps, and memory freed in stream order lives a little longer than
        // its share of the budget.
        let strides: Vec<usize> = memories
            .iter()
            .map(|memory| {
                (usize::try_from(*memory).unwrap_or(usize::MAX / 256) * 2 + (64 << 20))
                    .next_multiple_of(2 << 20)
            })
            .collect();
        let bytes = strides.iter().sum::<usize>() + 2 * SIDE_AREA;
        // SAFETY: a fresh mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(system());
        }
        let base = base as usize;
        let mut at = base;
        let mut devices = Vec::new();
        for stride in strides {
            // SAFETY: the name is a C string; the result is checked before it is owned.
            let descriptor = unsafe { libc::memfd_create(c"softcuda".as_ptr(), libc::MFD_CLOEXEC) };
            if descriptor < 0 {
                return Err(system());
            }
            // SAFETY: a descriptor that was just made and that nobody else owns.
            let file = unsafe { OwnedFd::from_raw_fd(descriptor) };
            let length = libc::off_t::try_from(stride).map_err(|_| system())?;
            // SAFETY: a plain system call on an own descriptor.
            if unsafe { libc::ftruncate(descriptor, length) } != 0 {
                return Err(system());
            }
            map_at(at, stride, Some((descriptor, 0)))?;
            let area = Area::new(at, stride);
            let mut backing = Backing { file, area: Mutex::new(area) };
            // The header is an allocation that never ends.
            let header = backing.area.get_mut().map_err(|_| system())?.take(HEADER, ALIGNMENT);
            debug_assert_eq!(header, Some(at));
            devices.push(backing);
            at += stride;
        }
        Ok(Self {
            devices,
            pinned: Mutex::new(Area::new(at, SIDE_AREA)),
            imported: Mutex::new(Area::new(at + SIDE_AREA, SIDE_AREA)),
            live: RwLock::new(BTreeMap::new()),
            serial: AtomicU64::new(1),
        })
    }

    fn insert(
        &self,
        start: usize,
        bytes: usize,
        place: Place,
        context: usize,
        pool: Option<usize>,
    ) -> Arc<Allocation> {
        let allocation = Arc::new(Allocation {
            id: self.serial.fetch_add(1, Ordering::Relaxed),
            start,
            bytes,
            place,
            context,
            pool,
            ending: AtomicBool::new(false),
            export: Mutex::new(None),
        });
        write(&self.live).insert(start, Arc::clone(&allocation));
        allocation
    }

    fn room(&self) -> Answer<()> {
        if read(&self.live).len() < ALLOCATIONS_MAX { Ok(()) } else { Err(Code::OUT_OF_MEMORY) }
    }

    /// Device memory, unpoisoned: who allocates does that when the allocation takes place.
    pub(crate) fn device(
        &self,
        device: usize,
        bytes: usize,
        context: usize,
        pool: Option<usize>,
    ) -> Answer<Arc<Allocation>> {
        self.room()?;
        let backing = self.devices.get(device).ok_or(Code::INVALID_DEVICE)?;
        let start = lock(&backing.area).take(bytes, ALIGNMENT).ok_or(Code::OUT_OF_MEMORY)?;
        Ok(self.insert(start, bytes, Place::Device(device), context, pool))
    }

    /// Page-locked memory, poisoned.
    pub(crate) fn pinned(&self, bytes: usize, context: usize) -> Answer<Arc<Allocation>> {
        self.room()?;
        let start = lock(&self.pinned).take(bytes, PAGE).ok_or(Code::OUT_OF_MEMORY)?;
        if let Err(code) = map_at(start, bytes.next_multiple_of(PAGE), None) {
            lock(&self.pinned).give(start);
            return Err(code);
        }
        fill(start, bytes, POISON_PINNED);
        Ok(self.insert(start, bytes, Place::Pinned, context, None))
    }

    /// The program's own memory from now on counts as page-locked.
    pub(crate) fn register(&self, start: usize, bytes: usize, context: usize) -> Answer<()> {
        self.room()?;
        let end = start.checked_add(bytes).ok_or(Code::INVALID_VALUE)?;
        let taken = {
            let live = read(&self.live);
            live.range(..end).next_back().is_some_and(|(_, other)| other.end() > start)
        };
        if taken {
            return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        self.insert(start, bytes, Place::Registered, context, None);
        Ok(())
    }

    /// Maps another process's device memory.
    pub(crate) fn import(
        &self,
        file: RawFd,
        offset: usize,
        bytes: usize,
        device: usize,
        context: usize,
    ) -> Answer<Arc<Allocation>> {
        self.room()?;
        // Mappings start at pages; allocations at smaller multiples.
        let lead = offset % PAGE;
        let start = lock(&self.imported).take(lead + bytes, PAGE).ok_or(Code::OUT_OF_MEMORY)?;
        if let Err(code) = map_at(start, (lead + bytes).next_multiple_of(PAGE), Some((file, offset - lead))) {
            lock(&self.imported).give(start);
            return Err(code);
        }
        Ok(self.insert(start + lead, bytes, Place::Imported(device), context, None))
    }

    /// The live allocation that an address lies in.
    pub(crate) fn find(&self, address: usize) -> Option<Arc<Allocation>> {
        let live = read(&self.live);
        let (_, allocation) = live.range(..=address).next_back()?;
        (address < allocation.end()).then(|| Arc::clone(allocation))
    }

    /// The live allocation that holds a whole range.
    pub(crate) fn holds(&self, address: usize, bytes: usize) -> Option<Arc<Allocation>> {
        let allocation = self.find(address)?;
        (address.checked_add(bytes)? <= allocation.end()).then_some(allocation)
    }

    /// The allocation that starts there, claimed by the caller for its release.
    pub(crate) fn claim(&self, start: usize) -> Option<Arc<Allocation>> {
        let allocation = read(&self.live).get(&start).map(Arc::clone)?;
        (!allocation.ending.swap(true, Ordering::AcqRel)).then_some(allocation)
    }

    /// Ends an allocation: its addresses are dead from here on and may be taken again.
    pub(crate) fn release(&self, allocation: &Allocation) {
        write(&self.live).remove(&allocation.start);
        match allocation.place {
            Place::Device(device) => {
                if let Some(backing) = self.devices.get(device) {
                    lock(&backing.area).give(allocation.start);
                }
            }
            Place::Pinned => {
                unmap_at(allocation.start, allocation.bytes.next_multiple_of(PAGE));
                lock(&self.pinned).give(allocation.start);
            }
            Place::Registered => {}
            Place::Imported(_) => {
                let start = allocation.start / PAGE * PAGE;
                unmap_at(start, (allocation.end() - start).next_multiple_of(PAGE));
                lock(&self.imported).give(start);
            }
        }
    }

    /// Everything that lives.
    pub(crate) fn all(&self) -> Vec<Arc<Allocation>> {
        read(&self.live).values().map(Arc::clone).collect()
    }

    /// A device's shared object, and where its addresses start.
    pub(crate) fn backing(&self, device: usize) -> Option<(RawFd, usize)> {
        let backing = self.devices.get(device)?;
        let base = lock(&backing.area).base();
        Some((backing.file.as_raw_fd(), base))
    }
}

/// Fills mapped memory with one byte.
pub(crate) fn fill(start: usize, bytes: usize, pattern: u8) {
    // SAFETY: callers pass the range of an allocation that they hold; the mapping stays for as long as it is held.
    unsafe { std::ptr::write_bytes(start as *mut u8, pattern, bytes) };
}
