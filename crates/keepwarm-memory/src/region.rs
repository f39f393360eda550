//! One piece of anonymous memory, reserved at start and shared by the guards that carve it.
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

/// A private anonymous mapping.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapRaw,
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
        Ok(Self { map, locked })
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

    /// Reads a range.
    ///
    /// # Safety
    /// Nobody may write the range while the slice lives.
    pub(crate) unsafe fn slice(&self, offset: u64, len: usize) -> &[u8] {
        let offset = self.check(offset, len);
        // SAFETY: in bounds by `check`; the caller rules out writers; the mapping lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(offset), len) }
    }

    /// Writes a range.
    ///
    /// # Safety
    /// Nobody else may read or write the range while the slice lives.
    #[expect(
        clippy::mut_from_ref,
        reason = "disjoint ranges of one mapping; exclusivity is the caller's duty"
    )]
    pub(crate) unsafe fn slice_mut(&self, offset: u64, len: usize) -> &mut [u8] {
        let offset = self.check(offset, len);
        // SAFETY: in bounds by `check`; the caller rules out any other user; the mapping lives as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(offset), len) }
    }

    fn check(&self, offset: u64, len: usize) -> usize {
        let start = usize::try_from(offset).expect("keepwarm runs on 64-bit targets");
        let end = start.checked_add(len).expect("a range of memory does not overflow");
        assert!(
            end <= self.map.len(),
            "range {start}..{end} lies outside the region of {} bytes",
            self.map.len()
        );
        start
    }
}
