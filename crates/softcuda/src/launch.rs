//! Running a kernel on the CPU: what the compiled kernel is told, and what it may ask while it runs.
#![expect(unsafe_code, reason = "calls compiled kernels through their C interface")]

use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::context::Context;
use crate::driver::Driver;
use crate::error::{Answer, Code};
use crate::module::{Function, Kernel};
use crate::races::{Access, Race, Stamp};
use crate::report;
use crate::stream::Stream;

/// Threads that a block may have.
pub(crate) const BLOCK_MAX: u64 = 1024;
/// Shared memory that a block may ask for at launch.
pub(crate) const SHARED_MAX: u32 = 227 << 10;
/// Bytes of all parameters of a kernel, as CUDA 12.1 allows.
const PARAMETERS_MAX: usize = 32_764;

/// A kernel with its shape and its parameters' bytes.
#[derive(Debug)]
pub(crate) struct Launch {
    name: String,
    kernel: &'static Kernel,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    /// Each parameter's bytes, in words that are aligned for any type.
    parameters: Vec<Vec<u128>>,
}

/// The layout is that of `softcuda_launch` in `shim/softcuda.h`.
#[repr(C)]
struct Interface<'a> {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    run: *const Run<'a>,
    live: unsafe extern "C" fn(*const Run<'_>, usize, *mut usize, *mut usize) -> i32,
    accessed: unsafe extern "C" fn(*const Run<'_>, usize, usize, i32),
    failed: unsafe extern "C" fn(*const Run<'_>, *const c_char),
    /// Set when the kernel should end: its context was reset.
    stop: *const AtomicBool,
    raced: Option<Raced>,
}

/// Told of a race between threads of one block: the two, what they did, and where in shared memory.
type Raced = unsafe extern "C" fn(*const Run<'_>, *const c_char, *const c_char, *const c_char, usize, usize);

/// One run of a kernel.
struct Run<'a> {
    driver: &'a Driver,
    context: &'a Context,
    stamp: &'a Arc<Stamp>,
}

impl Launch {
    /// Takes the parameters' bytes, which the call's caller may change as soon as it returns.
    pub(crate) fn new(
        function: &Function,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        parameters: usize,
    ) -> Answer<Self> {
        let threads: u64 = block.iter().map(|side| u64::from(*side)).product();
        let limits =
            grid.contains(&0) || block.contains(&0) || grid[1] > 65_535 || grid[2] > 65_535 || block[2] > 64;
        if limits || threads > BLOCK_MAX || shared > SHARED_MAX {
            return Err(Code::INVALID_VALUE);
        }
        let kernel = function.kernel;
        let count = kernel.parameters as usize;
        if parameters == 0 && count > 0 {
            return Err(Code::INVALID_VALUE);
        }
        let mut taken = Vec::new();
        let mut total = 0;
        for index in 0..count {
            // SAFETY: the description has `parameters` sizes, and cuLaunchKernel's contract is that there are as
            // many pointers, each to a parameter of that size.
            let bytes = unsafe {
                let size = *kernel.sizes.add(index) as usize;
                let from = *(parameters as *const *const u8).add(index);
                if from.is_null() {
                    return Err(Code::INVALID_VALUE);
                }
                total += size;
                let mut words = vec![0_u128; size.div_ceil(16)];
                std::ptr::copy_nonoverlapping(from, words.as_mut_ptr().cast::<u8>(), size);
                words
            };
            taken.push(bytes);
        }
        if total > PARAMETERS_MAX {
            return Err(Code::INVALID_VALUE);
        }
        Ok(Self { name: function.name.clone(), kernel, grid, block, shared, parameters: taken })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs every block, on this thread.
    pub(crate) fn run(
        &self,
        driver: &Driver,
        context: &Context,
        stream: &Stream,
        stamp: &Arc<Stamp>,
    ) -> Answer<()> {
        let run = Run { driver, context, stamp };
        let interface = Interface {
            grid: self.grid,
            block: self.block,
            shared: self.shared,
            run: &raw const run,
            live,
            accessed,
            failed,
            stop: stream.given_up(),
            raced: driver.races.is_on().then_some(raced as Raced),
        };
        let mut parameters = self.parameters.clone();
        let pointers: Vec<*mut c_void> =
            parameters.iter_mut().map(|words| words.as_mut_ptr().cast::<c_void>()).collect();
        // SAFETY: the description's function takes parameters of its sizes and this interface, which outlives it.
        let code = unsafe { (self.kernel.run)(pointers.as_ptr(), (&raw const interface).cast()) };
        if code == 0 { Ok(()) } else { Err(Code(code)) }
    }
}

/// The live range around an address, if this kernel may touch it.
unsafe extern "C" fn live(run: *const Run<'_>, at: usize, from: *mut usize, to: *mut usize) -> i32 {
    // SAFETY: the pointer that `Launch::run` gave, during that run.
    let run = unsafe { &*run };
    let Some(allocation) = run.driver.space.find(at) else { return 0 };
    if allocation.device().is_some_and(|device| !run.context.reaches(device)) {
        return 0;
    }
    // SAFETY: the kernel's runtime passes two places of its own.
    unsafe {
        *from = allocation.start;
        *to = allocation.end();
    }
    1
}

/// The kernel read (0), wrote (1) or atomically changed (2) that range.
unsafe extern "C" fn accessed(run: *const Run<'_>, from: usize, to: usize, access: i32) {
    // SAFETY: as in `live`.
    let run = unsafe { &*run };
    let access = match access {
        0 => Access::Read,
        1 => Access::Write,
        _ => Access::Atomic,
    };
    // Ranges of page-locked memory can lie side by side.
    let mut at = from;
    while at < to {
        let Some(allocation) = run.driver.space.find(at) else { return };
        let end = to.min(allocation.end());
        run.driver.races.access(run.stamp, &allocation, (at, end - at), access);
        at = end;
    }
}

/// Two threads of a block touched the same bytes of shared memory, with no barrier between them.
unsafe extern "C" fn raced(
    run: *const Run<'_>,
    earlier: *const c_char,
    later: *const c_char,
    kind: *const c_char,
    offset: usize,
    bytes: usize,
) {
    // SAFETY: as in `live`, and C strings of the kernel's runtime, which outlive this call.
    let (run, texts) =
        unsafe { (&*run, [earlier, later, kind].map(|text| CStr::from_ptr(text).to_string_lossy())) };
    let [earlier, later, kind] = texts.map(std::borrow::Cow::into_owned);
    let allocation = format!("the shared memory of {}", run.stamp.name());
    run.driver.races.report(Race { earlier, later, kind, offset, bytes, allocation });
}

/// The kernel cannot go on; says why.
unsafe extern "C" fn failed(run: *const Run<'_>, why: *const c_char) {
    // SAFETY: as in `live`, and a C string of the kernel's runtime.
    let (run, why) = unsafe { (&*run, CStr::from_ptr(why)) };
    let name = run.stamp.detail.as_deref().unwrap_or_default();
    report::say(&format!("kernel {name} #{}: {}", run.stamp.sequence, why.to_string_lossy()));
}
