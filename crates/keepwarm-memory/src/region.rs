//! One piece of memory, reserved at start and shared by the guards that carve it: a private mapping, memory that a
//! driver page-locked, or a device's own, which the host can name and not touch.
//!
//! The unsafe part: guards hold disjoint byte ranges of one mapping. That ranges are disjoint is the
//! arena's book-keeping; that a range is either mutable by one or readable by many is the guards' types.
#![allow(unsafe_code)]

use keepwarm_types::Bytes;
use memmap2::{MmapOptions, MmapRaw};

/// Why memory could not be reserved.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// The size makes no arena.
    #[error("cannot reserve {0}: an arena needs at least {1}")]
    Size(Bytes, Bytes),
    /// The system refused.
    #[error(
        "cannot reserve {size}: {cause}; ask for less, or check `ulimit -v` and the container's memory limit"
    )]
    System {
        /// How much was asked.
        size: Bytes,
        /// What the system said.
        cause: std::io::Error,
    },
}

/// Whether pages are locked in RAM; if not, why and what to do.
pub type LockReport = Result<(), String>;

/// Memory that somebody else gave, and that is given back when this drops.
pub(crate) trait Foreign: Send + Sync + std::fmt::Debug {
    /// Where it begins: an address of the host, or one of the device's that only its driver can use.
    fn address(&self) -> u64;

    /// Its length in bytes.
    fn bytes(&self) -> u64;

    /// The device context that it lies in; none where the host can touch it.
    fn context(&self) -> Option<usize>;
}

#[derive(Debug)]
enum Backing {
    Map(MmapRaw),
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only drivers lend memory"))]
    Foreign(Box<dyn Foreign>),
}

/// Memory that guards carve.
#[derive(Debug)]
pub(crate) struct Region {
    backing: Backing,
    locked: LockReport,
}

impl Region {
    /// Reserves `bytes`, asks for huge pages, touches every page, and locks them if `lock`.
    pub(crate) fn reserve(bytes: u64, lock: bool) -> Result<Self, ReserveError> {
        let fail = |cause| ReserveError::System { size: Bytes(bytes), cause };
        let len = usize::try_from(bytes).map_err(|_| fail(std::io::ErrorKind::OutOfMemory.into()))?;
        let map = MmapOptions::new().len(len).map_anon().map_err(fail)?;
        // Advice only: without huge pages everything works, a little slower.
        let _ = map.advise(memmap2::Advice::HugePage);
        let map = MmapRaw::from(map);
        let locked = if lock { Self::lock(&map) } else { Err("locking was not asked for".to_owned()) };
        if locked.is_err() {
            Self::touch(&map);
        }
        Ok(Self { backing: Backing::Map(map), locked })
    }

    /// Memory of a driver's. A device's must read as zeroes where nothing was written yet.
    #[cfg(feature = "cuda")]
    pub(crate) fn foreign(memory: Box<dyn Foreign>) -> Self {
        Self { backing: Backing::Foreign(memory), locked: Ok(()) }
    }

    fn lock(map: &MmapRaw) -> LockReport {
        map.lock().map_err(|cause| {
            format!(
                "mlock of {} failed: {cause}; raise RLIMIT_MEMLOCK (`ulimit -l unlimited`, or LimitMEMLOCK=infinity in \
                 the service's unit); the pages stay swappable",
                Bytes(map.len() as u64)
            )
        })
    }

    /// Writes one byte a page, so that no later use of the arena can fail for want of memory.
    fn touch(map: &MmapRaw) {
        for offset in (0..map.len()).step_by(4096) {
            // SAFETY: the offset is inside the mapping, and nobody else has the region yet.
            unsafe { map.as_mut_ptr().add(offset).write_volatile(0) };
        }
    }

    /// Whether the pages are locked.
    pub(crate) const fn locked(&self) -> &LockReport {
        &self.locked
    }

    /// Where it begins.
    pub(crate) fn address(&self) -> u64 {
        match &self.backing {
            Backing::Map(map) => map.as_ptr() as u64,
            Backing::Foreign(memory) => memory.address(),
        }
    }

    fn bytes(&self) -> u64 {
        match &self.backing {
            Backing::Map(map) => map.len() as u64,
            Backing::Foreign(memory) => memory.bytes(),
        }
    }

    /// The device context that it lies in; none for memory of the host.
    pub(crate) fn context(&self) -> Option<usize> {
        match &self.backing {
            Backing::Map(_) => None,
            Backing::Foreign(memory) => memory.context(),
        }
    }

    /// Reads a range.
    ///
    /// # Panics
    /// If the range is outside, or the memory is a device's.
    ///
    /// # Safety
    /// Nobody may write the range while the slice lives.
    pub(crate) unsafe fn slice(&self, offset: u64, len: usize) -> &[u8] {
        let start = self.check(offset, len);
        // SAFETY: in bounds and the host's by `check`; the caller rules out writers; the memory lives as long as `self`.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// Writes a range.
    ///
    /// # Panics
    /// If the range is outside, or the memory is a device's.
    ///
    /// # Safety
    /// Nobody else may read or write the range while the slice lives.
    #[expect(
        clippy::mut_from_ref,
        reason = "disjoint ranges of one mapping; exclusivity is the caller's duty"
    )]
    pub(crate) unsafe fn slice_mut(&self, offset: u64, len: usize) -> &mut [u8] {
        let start = self.check(offset, len);
        // SAFETY: in bounds and the host's by `check`; the caller rules out any other user; the memory lives as long
        // as `self`.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    /// The address of a range that lies inside and that the host can touch.
    fn check(&self, offset: u64, len: usize) -> *mut u8 {
        assert!(
            self.context().is_none(),
            "the host reached for a device's memory: copy it to the host first"
        );
        let end = offset.checked_add(len as u64).expect("a range of memory does not overflow");
        let bytes = self.bytes();
        assert!(end <= bytes, "range {offset}..{end} lies outside the region of {bytes} bytes");
        (self.address() + offset) as *mut u8
    }
}
