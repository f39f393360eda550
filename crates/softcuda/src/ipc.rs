//! Memory between processes: a handle names the exporter's shared object through `/proc`, so that nothing is left
//! behind by a process that is killed. A table in the first page of each device's object says what is still live.
#![expect(unsafe_code, reason = "maps and reads another process's table")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::driver::Driver;
use crate::error::{Answer, Code};
use crate::locks::lock;
use crate::memory::space::{Allocation, HEADER};
use crate::report;

/// Allocations of a device that may be exported at once: one word of the header each.
const EXPORTS_MAX: usize = HEADER / 8;
const MAGIC: u32 = 0x5C1B_C001;

/// `CUipcMemHandle`: 64 bytes that another process can be sent.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handle {
    magic: u32,
    process: u32,
    descriptor: i32,
    slot: u32,
    serial: u64,
    offset: u64,
    bytes: u64,
    /// The device's UUID, so that a device of the same GPU opens it.
    uuid: [u8; 16],
    /// When the process was started: a number that is used again does not bring a handle back.
    started: u64,
}

/// A process's start time in ticks since the machine's.
fn started(process: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may hold anything; the 22nd field is the 20th after it.
    text.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

impl Driver {
    fn table(&self, device: usize) -> Option<&[AtomicU64]> {
        let (_, base) = self.space.backing(device)?;
        // SAFETY: the first page of a device's area is its header for as long as the process lives, and is only
        // touched as atomic words.
        Some(unsafe { std::slice::from_raw_parts(base as *const AtomicU64, EXPORTS_MAX) })
    }

    /// A handle for an allocation of this process.
    pub(crate) fn export(&self, allocation: &Allocation) -> Answer<Handle> {
        let device = allocation.device().ok_or(Code::INVALID_VALUE)?;
        let (descriptor, base) = self.space.backing(device).ok_or(Code::INVALID_DEVICE)?;
        let table = self.table(device).ok_or(Code::INVALID_DEVICE)?;
        let mut export = lock(&allocation.export);
        let slot = match *export {
            Some(slot) => slot,
            None => {
                let claimed = |word: &AtomicU64| {
                    word.compare_exchange(0, allocation.id, Ordering::AcqRel, Ordering::Acquire).is_ok()
                };
                let slot = table.iter().position(claimed).ok_or_else(|| {
                    report::say(&format!("{EXPORTS_MAX} allocations of a device are exported already"));
                    Code::OUT_OF_MEMORY
                })?;
                *export = Some(slot);
                slot
            }
        };
        let process = std::process::id();
        Ok(Handle {
            magic: MAGIC,
            process,
            descriptor,
            slot: u32::try_from(slot).unwrap_or(u32::MAX),
            serial: allocation.id,
            offset: (allocation.start - base) as u64,
            bytes: allocation.bytes as u64,
            uuid: self.machine.devices[device].uuid,
            started: started(process).ok_or(Code::OPERATING_SYSTEM)?,
        })
    }

    /// Handles of an allocation open no more.
    pub(crate) fn unexport(&self, allocation: &Allocation) {
        if let Some(slot) = lock(&allocation.export).take()
            && let Some(word) = allocation.device().and_then(|device| self.table(device)?.get(slot))
        {
            word.store(0, Ordering::Release);
        }
    }

    /// Maps what a handle of another process names.
    pub(crate) fn open(&self, handle: &Handle, device: usize, context: usize) -> Answer<Arc<Allocation>> {
        let refuse = |why: &str| {
            report::say(&format!("cuIpcOpenMemHandle_v2: {why}"));
            Code::INVALID_VALUE
        };
        if handle.magic != MAGIC || handle.slot as usize >= EXPORTS_MAX {
            return Err(refuse("these 64 bytes are no memory handle of softcuda"));
        }
        if handle.process == std::process::id() {
            // As in the driver: a process does not open its own handles.
            return Err(Code::INVALID_CONTEXT);
        }
        if handle.uuid != self.machine.devices[device].uuid {
            return Err(refuse("the memory is on another device than the current context"));
        }
        if started(handle.process) != Some(handle.started) {
            return Err(refuse(&format!("process {}, which made this handle, is gone", handle.process)));
        }
        let path = format!("/proc/{}/fd/{}", handle.process, handle.descriptor);
        let file = File::options().read(true).write(true).open(&path).map_err(|error| {
            report::say(&format!("cuIpcOpenMemHandle_v2: {path}: {error}"));
            Code::MAP_FAILED
        })?;
        let mut word = [0; 8];
        file.read_exact_at(&mut word, u64::from(handle.slot) * 8).map_err(|_| Code::MAP_FAILED)?;
        if u64::from_ne_bytes(word) != handle.serial {
            return Err(refuse("the memory was freed by the process that exported it"));
        }
        let (Ok(offset), Ok(bytes)) = (usize::try_from(handle.offset), usize::try_from(handle.bytes)) else {
            return Err(Code::INVALID_VALUE);
        };
        let length = file.metadata().map_err(|_| Code::MAP_FAILED)?.len();
        if handle.offset.checked_add(handle.bytes).is_none_or(|end| end > length) {
            return Err(refuse("its range lies outside of the exporter's memory"));
        }
        self.space.import(file.as_raw_fd(), offset, bytes, device, context)
    }
}

const _: () = assert!(size_of::<Handle>() == 64, "CUipcMemHandle has 64 bytes");
