//! Shared memory of another process, mapped. Refuses what could end this process: a file that can shrink under the mapping
//! answers a later access with SIGBUS, and so do huge pages that ran out.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};

use keepwarm_types::Bytes;
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FileType, OFlags, SealFlags};

use super::{Mapping, RegionError, Unmapped};

/// `TMPFS_MAGIC` of `linux/magic.h`: what `memfd_create` makes, but for huge pages.
const TMPFS: i64 = 0x0102_1994;
/// Bytes of a block of `st_blocks`.
const STAT_BLOCK: u64 = 512;

/// The first bytes of a file of shared memory.
#[derive(Debug)]
pub(crate) struct SharedMapping {
    /// None once it was unmapped.
    map: Option<MmapRaw>,
    address: u64,
    bytes: u64,
}

impl SharedMapping {
    /// Checks and maps it.
    pub(crate) fn open(fd: &OwnedFd, bytes: Bytes) -> Result<Self, RegionError> {
        let system = |what| move |error: rustix::io::Errno| RegionError::System { what, cause: error.into() };
        let kind = rustix::fs::fstatfs(fd).map_err(system("fstatfs of the descriptor"))?;
        let stat = rustix::fs::fstat(fd).map_err(system("fstat of the descriptor"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || kind.f_type != TMPFS {
            return Err(RegionError::NotShared("no shared memory of plain pages"));
        }
        let flags = rustix::fs::fcntl_getfl(fd).map_err(system("fcntl(F_GETFL) of the descriptor"))?;
        let seals =
            rustix::fs::fcntl_get_seals(fd).map_err(system("fcntl(F_GET_SEALS) of the descriptor"))?;
        if flags & OFlags::ACCMODE != OFlags::RDWR
            || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)
        {
            return Err(RegionError::NotShared("not to be written"));
        }
        if !seals.contains(SealFlags::SHRINK) {
            return Err(RegionError::Unsealed);
        }
        // Behind the seal: from here on it only grows.
        let stat = rustix::fs::fstat(fd).map_err(system("fstat of the descriptor"))?;
        let (size, there) =
            (stat.st_size.unsigned_abs(), stat.st_blocks.unsigned_abs().saturating_mul(STAT_BLOCK));
        if size < bytes.0 {
            return Err(RegionError::Short { asked: bytes, found: Bytes(size) });
        }
        if there < size {
            return Err(RegionError::Sparse { there: Bytes(there), size: Bytes(size) });
        }
        let map = MmapOptions::new()
            .len(bytes.as_usize())
            .map_raw(fd.as_raw_fd())
            .map_err(|cause| RegionError::System { what: "mmap of the shared memory", cause })?;
        Ok(Self { address: map.as_ptr() as u64, bytes: bytes.0, map: Some(map) })
    }
}

impl Mapping for SharedMapping {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn context(&self) -> Option<usize> {
        None
    }

    fn unmap(&mut self) -> Unmapped {
        self.map = None;
        Unmapped::Done
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // Who did not unmap it may still touch it.
        self.map.take().into_iter().for_each(std::mem::forget);
    }
}
