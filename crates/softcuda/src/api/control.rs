//! What no other driver has: faults on order, statistics, and accesses of the host that the program declares.
#![expect(unsafe_code, reason = "exports C symbols")]

use std::ffi::{CStr, c_char};

use crate::driver::Driver;
use crate::error::Code;
use crate::races::Access;
use crate::report;
use crate::settings;
use crate::statistics;

/// Carries fault orders out; the grammar is in the README. 0, or 1 with a line on standard error.
///
/// # Safety
/// `orders` is null or a C string.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "exported under its C name")]
pub unsafe extern "C" fn softcudaFault(orders: *const c_char) -> u32 {
    if orders.is_null() {
        return Code::INVALID_VALUE.0;
    }
    let Some(driver) = Driver::get() else { return Code::NOT_INITIALIZED.0 };
    // SAFETY: not null, and by this function's contract a C string.
    let orders = unsafe { CStr::from_ptr(orders) }.to_string_lossy();
    match driver.order(&orders) {
        Ok(()) => 0,
        Err(message) => {
            report::say(&message);
            Code::INVALID_VALUE.0
        }
    }
}

/// Sets what an environment variable of that name would set, for the `cuInit` that is still to come. 0, or
/// `CUDA_ERROR_INVALID_VALUE` where there is no such setting.
///
/// # Safety
/// Both are null or C strings.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "exported under its C name")]
pub unsafe extern "C" fn softcudaSet(name: *const c_char, value: *const c_char) -> u32 {
    if name.is_null() || value.is_null() {
        return Code::INVALID_VALUE.0;
    }
    // SAFETY: not null, and by this function's contract C strings.
    let [name, value] = [name, value].map(|text| unsafe { CStr::from_ptr(text) }.to_string_lossy());
    if settings::set(&name, value.into_owned()) { 0 } else { Code::INVALID_VALUE.0 }
}

/// Writes the statistics as JSON with a NUL at the end, as far as they fit, and answers how many bytes they need.
///
/// # Safety
/// `buffer` is null or a place for `length` bytes.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "exported under its C name")]
pub unsafe extern "C" fn softcudaStatistics(buffer: *mut c_char, length: usize) -> usize {
    let Some(driver) = Driver::get() else { return 0 };
    let text = statistics::json(driver);
    let needed = text.len() + 1;
    if !buffer.is_null() && length > 0 {
        let fits = text.len().min(length - 1);
        // SAFETY: at most `length` bytes of the caller's buffer, which does not overlap a fresh string.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast::<u8>(), fits);
            buffer.add(fits).write(0);
        }
    }
    needed
}

/// Tells the race detector that the host reads (0) or writes page-locked memory here, which it cannot see otherwise.
/// 0, or `CUDA_ERROR_INVALID_VALUE` where the range is not page-locked.
///
/// # Safety
/// None needed: the range is only looked up.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "exported under its C name")]
pub unsafe extern "C" fn softcudaHostAccess(address: usize, bytes: usize, write: i32) -> u32 {
    let Some(driver) = Driver::get() else { return Code::NOT_INITIALIZED.0 };
    let Some(allocation) = driver.space.holds(address, bytes) else { return Code::INVALID_VALUE.0 };
    let stamp = driver.races.host_stamp(if write == 0 { "host read" } else { "host write" });
    driver.races.access(
        &stamp,
        &allocation,
        (address, bytes),
        if write == 0 { Access::Read } else { Access::Write },
    );
    0
}
