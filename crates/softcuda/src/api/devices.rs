//! Initialisation, versions, error texts, and what can be seen of devices.
#![expect(unsafe_code, reason = "exports C symbols")]

use std::ffi::c_char;
use std::ptr;

use super::symbol;
use crate::call::{first, give};
use crate::driver::Driver;
use crate::error::{Answer, Code};
use crate::launch::{BLOCK_MAX, SHARED_MAX};

/// As in the CUDA driver API.
///
/// # Safety
/// None needed.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "exported under its C name")]
pub unsafe extern "C" fn cuInit(flags: u32) -> u32 {
    if flags != 0 {
        return Code::INVALID_VALUE.0;
    }
    first("cuInit")
}

/// As in the CUDA driver API; works before `cuInit`.
///
/// # Safety
/// `version` is null or a place for an int.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "exported under its C name")]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut i32) -> u32 {
    let told = match Driver::get() {
        Some(driver) => Ok(driver.machine.driver_version),
        None => crate::describe::Machine::from_settings().map(|machine| machine.driver_version),
    };
    let answer = told.map_err(|_| Code::INVALID_VALUE).and_then(|told| give(version, told));
    answer.map_or_else(|code| code.0, |()| 0)
}

fn text(code: u32, place: *mut *const c_char, name: bool) -> u32 {
    let found = Code::describe(code).map(|(called, text)| if name { called } else { text });
    let pointer = found.map_or(ptr::null(), std::ffi::CStr::as_ptr);
    match give(place, pointer) {
        Ok(()) if found.is_some() => 0,
        _ => Code::INVALID_VALUE.0,
    }
}

/// As in the CUDA driver API; works before `cuInit`.
///
/// # Safety
/// `place` is null or a place for a pointer.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "exported under its C name")]
pub unsafe extern "C" fn cuGetErrorString(code: u32, place: *mut *const c_char) -> u32 {
    text(code, place, false)
}

/// As in the CUDA driver API; works before `cuInit`.
///
/// # Safety
/// `place` is null or a place for a pointer.
#[unsafe(no_mangle)]
#[allow(unreachable_pub, reason = "exported under its C name")]
pub unsafe extern "C" fn cuGetErrorName(code: u32, place: *mut *const c_char) -> u32 {
    text(code, place, true)
}

symbol! { plain fn cuDeviceGetCount(count: *mut i32) |call| {
    give(count, i32::try_from(call.driver.devices.len()).unwrap_or(i32::MAX))
} }

symbol! { about(ordinal) fn cuDeviceGet(device: *mut i32, ordinal: i32) |call| {
    call.driver.device(ordinal)?;
    give(device, ordinal)
} }

symbol! { about(device) fn cuDeviceGetName(name: *mut c_char, length: i32, device: i32) |call| {
    let (index, _) = call.driver.device(device)?;
    let length = usize::try_from(length).map_err(|_| Code::INVALID_VALUE)?;
    if name.is_null() || length == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let text = call.driver.machine.devices[index].name.as_bytes();
    let fits = text.len().min(length - 1);
    for (at, byte) in text[..fits].iter().chain(&[0]).enumerate() {
        // SAFETY: at most `length` bytes of the program's buffer.
        unsafe { name.add(at).cast::<u8>().write(*byte) };
    }
    Ok(())
} }

symbol! { about(device) fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: i32) |call| {
    let (index, _) = call.driver.device(device)?;
    give(uuid, call.driver.machine.devices[index].uuid)
} }

symbol! { about(device) fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: i32) |call| {
    let (index, _) = call.driver.device(device)?;
    let described = &call.driver.machine.devices[index];
    give(uuid, described.mig_uuid.unwrap_or(described.uuid))
} }

symbol! { about(device) fn cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) |call| {
    let (_, device) = call.driver.device(device)?;
    give(bytes, usize::try_from(device.budget.total()).unwrap_or(usize::MAX))
} }

symbol! { about(device) fn cuDeviceGetPCIBusId(text: *mut c_char, length: i32, device: i32) |call| {
    let (index, _) = call.driver.device(device)?;
    let id = format!("0000:{:02x}:00.0\0", call.driver.machine.devices[index].gpu + 1);
    if text.is_null() || usize::try_from(length).unwrap_or_default() < id.len() {
        return Err(Code::INVALID_VALUE);
    }
    for (at, byte) in id.bytes().enumerate() {
        // SAFETY: the buffer's length was just compared.
        unsafe { text.add(at).cast::<u8>().write(byte) };
    }
    Ok(())
} }

symbol! { about(device) fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, device: i32) |call| {
    let (index, _) = call.driver.device(device)?;
    give(value, self::attribute(call.driver, index, attribute)?)
} }

symbol! { about(device) fn cuDeviceCanAccessPeer(can: *mut i32, device: i32, peer: i32) |call| {
    let ((device, _), (peer, _)) = (call.driver.device(device)?, call.driver.device(peer)?);
    give(can, i32::from(reachable(call.driver, device, peer)))
} }

/// Whether one device's kernels could reach another's memory.
pub(super) fn reachable(driver: &Driver, device: usize, peer: usize) -> bool {
    let devices = &driver.machine.devices;
    device != peer && devices[device].peers.contains(&devices[peer].gpu) && devices[peer].mig_uuid.is_none()
}

fn attribute(driver: &Driver, index: usize, attribute: i32) -> Answer<i32> {
    let device = &driver.machine.devices[index];
    Ok(match attribute {
        1..=3 => i32::try_from(BLOCK_MAX).unwrap_or(i32::MAX),
        4 => 64,                                         // block depth
        5 => i32::MAX,                                   // grid width
        6 | 7 => 65_535,                                 // grid height and depth
        8 => 48 << 10,                                   // shared memory of a block
        9 => 64 << 10,                                   // constant memory
        10 => 32,                                        // warp
        11 => i32::MAX,                                  // pitch
        12 | 82 => 65_536,                               // registers of a block, of a multiprocessor
        13 => 1_980_000,                                 // clock, kHz
        14 => 512,                                       // texture alignment
        15 | 19 | 31 | 32 | 41 | 78 | 79 | 80 | 99 => 1, // overlap, host mapping, concurrency, ECC, one address space
        16 => device.multiprocessors,
        17 | 18 | 35 | 83 | 84 | 88 | 89 | 95 | 96 | 100 | 102 | 103 | 116 => 0, // no integrated, managed, pageable, VMM
        20 => 0,                                                                 // compute mode: default
        33 => i32::try_from(device.gpu).unwrap_or_default() + 1,                 // PCI bus
        34 | 50 => 0,                                                            // PCI device and domain
        36 => 2_619_000,                                                         // memory clock, kHz
        37 => 5120,                                                              // memory bus, bits
        38 => 50 << 20,                                                          // second-level cache
        39 => 2048, // threads of a multiprocessor
        40 => 2,    // copy engines
        75 => device.sm.0,
        76 => device.sm.1,
        81 | 97 => i32::try_from(SHARED_MAX).unwrap_or_default(),
        106 => 32, // blocks of a multiprocessor
        115 => i32::from(device.pools),
        other if (1..=150).contains(&other) => 0,
        _ => return Err(Code::INVALID_VALUE),
    })
}
