//! What a stream does one after the other: copies, fills, launches, host functions, births and ends of memory.
//! Each is checked against live memory when it runs, not when it is issued.
#![expect(unsafe_code, reason = "moves bytes between addresses and calls functions that the program gave")]

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::context::Context;
use crate::driver::Driver;
use crate::error::{Answer, Code};
use crate::event::Record;
use crate::launch::Launch;
use crate::locks::lock;
use crate::memory::space::{Allocation, fill};
use crate::memory::{POISON_ALLOCATED, POISON_FREED};
use crate::races::{Access, Stamp};
use crate::stream::{Marker, Stream};

thread_local! {
    static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread runs a host function, which may not call the driver.
pub(crate) fn in_host_function() -> bool {
    IN_HOST_FUNCTION.get()
}

/// One side of a copy.
#[derive(Debug)]
pub(crate) enum End {
    /// Device or page-locked memory: checked when the copy runs.
    Known(usize),
    /// Pageable host memory whose bytes were taken when the call was made.
    Staged(Vec<u8>),
    /// Pageable host memory that the call waits to be written.
    Pageable(usize),
}

/// A function that the program gave to a stream.
pub(crate) type HostFunction = unsafe extern "C" fn(*mut libc::c_void);

/// What an operation does.
#[derive(Debug)]
pub(crate) enum Work {
    Copy {
        from: End,
        to: End,
        bytes: usize,
    },
    /// Rows of `bytes` each, with the distance from one to the next on both sides.
    Rows {
        from: usize,
        to: usize,
        pitches: (usize, usize),
        bytes: usize,
        rows: usize,
    },
    Fill {
        at: usize,
        unit: Vec<u8>,
        bytes: usize,
    },
    Launch(Launch),
    Host(HostFunction, usize),
    Record(Arc<Record>),
    Born(Arc<Allocation>),
    Free(Arc<Allocation>),
    /// Only waits for what comes before.
    Nothing,
}

/// What faults do to an operation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Effects {
    pub(crate) delay: Option<Duration>,
    /// The code, and whether the context is sick of it.
    pub(crate) fail: Option<(Code, bool)>,
    /// The bit of the copied bytes that is turned.
    pub(crate) corrupt: Option<u64>,
}

/// A piece of work in a stream.
#[derive(Debug)]
pub(crate) struct Operation {
    pub(crate) work: Work,
    pub(crate) after: Vec<Marker>,
    pub(crate) effects: Effects,
    pub(crate) stamp: Arc<Stamp>,
}

impl Operation {
    /// Does it, on its stream's thread.
    pub(crate) fn run(&self, context: &Context, stream: &Stream) {
        let Some(driver) = Driver::get() else { return };
        let began = Instant::now();
        if let Some(delay) = self.effects.delay {
            stream.pause(delay);
        }
        let healthy = context.sick().is_ok();
        let result = match (healthy, self.effects.fail) {
            (false, _) => Ok(()),
            (true, Some((code, sticky))) => {
                if sticky {
                    context.set_sticky(code);
                } else {
                    context.set_pending(code);
                }
                Ok(())
            }
            (true, None) => self.perform(driver, context, stream),
        };
        if let Err(code) = result {
            crate::report::say(&format!(
                "{} #{} on stream {} failed: code {}",
                self.stamp.symbol, self.stamp.sequence, stream.number, code.0
            ));
            context.set_sticky(code);
        }
        // What others wait for, or what keeps the books, happens in a sick context too.
        match &self.work {
            Work::Record(record) => record.reached(),
            Work::Free(allocation) => {
                fill(allocation.start, allocation.bytes, POISON_FREED);
                driver.forget(allocation);
            }
            _ => {}
        }
        driver.trace.operation(&self.stamp, self.bytes(), began);
        driver.operations_done.fetch_add(1, Ordering::Relaxed);
    }

    fn bytes(&self) -> usize {
        match &self.work {
            Work::Copy { bytes, .. } | Work::Fill { bytes, .. } => *bytes,
            Work::Rows { bytes, rows, .. } => bytes * rows,
            Work::Born(allocation) | Work::Free(allocation) => allocation.bytes,
            Work::Launch(_) | Work::Host(..) | Work::Record(_) | Work::Nothing => 0,
        }
    }

    fn perform(&self, driver: &Driver, context: &Context, stream: &Stream) -> Answer<()> {
        match &self.work {
            Work::Copy { from, to, bytes } => {
                self.copy(driver, context, from, to, *bytes, self.effects.corrupt)
            }
            Work::Rows { from, to, pitches, bytes, rows } => {
                let bits = *bytes as u64 * 8;
                let corrupt = self.effects.corrupt.map(|bit| (bit / bits % *rows as u64, bit % bits));
                for row in 0..*rows {
                    let (from, to) = (from + row * pitches.0, to + row * pitches.1);
                    let corrupt =
                        corrupt.filter(|(corrupted, _)| *corrupted == row as u64).map(|(_, bit)| bit);
                    self.copy(driver, context, &End::Known(from), &End::Known(to), *bytes, corrupt)?;
                }
                Ok(())
            }
            Work::Fill { at, unit, bytes } => {
                let _held = self.touch(driver, context, *at, *bytes, Access::Write)?;
                for (index, byte) in unit.iter().enumerate() {
                    if unit.len() == 1 {
                        fill(*at, *bytes, *byte);
                        break;
                    }
                    for position in (index..*bytes).step_by(unit.len()) {
                        fill(*at + position, 1, *byte);
                    }
                }
                Ok(())
            }
            Work::Launch(launch) => launch.run(driver, context, stream, &self.stamp),
            Work::Host(function, data) => {
                IN_HOST_FUNCTION.set(true);
                // SAFETY: cuLaunchHostFunc's contract: the program keeps the function and its data for this call.
                unsafe { function(*data as *mut libc::c_void) };
                IN_HOST_FUNCTION.set(false);
                // Whoever the function tells of it on the host comes after everything before it in the stream.
                driver.races.host_knows(&self.stamp.clock);
                Ok(())
            }
            Work::Born(allocation) => {
                fill(allocation.start, allocation.bytes, POISON_ALLOCATED);
                driver.races.access(
                    &self.stamp,
                    allocation,
                    (allocation.start, allocation.bytes),
                    Access::Write,
                );
                Ok(())
            }
            Work::Free(allocation) => {
                driver.races.access(
                    &self.stamp,
                    allocation,
                    (allocation.start, allocation.bytes),
                    Access::Write,
                );
                Ok(())
            }
            Work::Record(_) | Work::Nothing => Ok(()),
        }
    }

    /// Checks a range that this operation touches, and holds it.
    fn touch(
        &self,
        driver: &Driver,
        context: &Context,
        at: usize,
        bytes: usize,
        access: Access,
    ) -> Answer<Option<Arc<Allocation>>> {
        if bytes == 0 {
            return Ok(None);
        }
        let allocation = driver.space.holds(at, bytes).ok_or(Code::ILLEGAL_ADDRESS)?;
        if matches!(self.work, Work::Launch(_))
            && allocation.device().is_some_and(|device| !context.reaches(device))
        {
            return Err(Code::ILLEGAL_ADDRESS);
        }
        driver.races.access(&self.stamp, &allocation, (at, bytes), access);
        Ok(Some(allocation))
    }

    fn copy(
        &self,
        driver: &Driver,
        context: &Context,
        from: &End,
        to: &End,
        bytes: usize,
        corrupt: Option<u64>,
    ) -> Answer<()> {
        let (source, _source) = match from {
            End::Known(at) => (*at as *const u8, self.touch(driver, context, *at, bytes, Access::Read)?),
            End::Staged(staged) => (staged.as_ptr(), None),
            End::Pageable(at) => (*at as *const u8, None),
        };
        let (target, _target) = match to {
            End::Known(at) | End::Pageable(at) if bytes == 0 => (*at as *mut u8, None),
            End::Known(at) => (*at as *mut u8, self.touch(driver, context, *at, bytes, Access::Write)?),
            End::Pageable(at) => (*at as *mut u8, None),
            End::Staged(_) => return Err(Code::INVALID_VALUE),
        };
        // SAFETY: both ends were just checked against live allocations, which are held here; pageable ends are the
        // caller's, who waits for this operation; staged bytes are as many as the copy's.
        unsafe { std::ptr::copy(source, target, bytes) };
        if let Some(bit) = corrupt.filter(|_| bytes > 0) {
            let bit = usize::try_from(bit).unwrap_or_default() % (bytes * 8);
            // SAFETY: inside the range that was just written.
            unsafe { *target.add(bit / 8) ^= 1 << (bit % 8) };
        }
        Ok(())
    }
}

/// The host's bytes at that address, as they are now.
pub(crate) fn stage(at: usize, bytes: usize) -> Vec<u8> {
    // SAFETY: the driver API's contract: the program gave this range to be read during the call.
    unsafe { std::slice::from_raw_parts(at as *const u8, bytes) }.to_vec()
}

/// Releases memory at once, for calls that have waited for everything that uses it.
pub(crate) fn end_now(driver: &Driver, allocation: &Arc<Allocation>) {
    if allocation.device().is_some() && !matches!(allocation.place, crate::memory::space::Place::Imported(_))
    {
        fill(allocation.start, allocation.bytes, POISON_FREED);
    }
    driver.unexport(allocation);
    driver.forget(allocation);
    let _ = lock(&allocation.export).take();
}
