//! Allocation, page-locking, pools, memory between processes.
#![expect(unsafe_code, reason = "exports C symbols")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::symbol;
use crate::call::{Call, Within, give};
use crate::driver::Device;
use crate::error::{Answer, Code};
use crate::ipc::Handle;
use crate::memory::pool::Pool;
use crate::memory::space::{Allocation, Place};
use crate::operation::{Work, end_now};

fn device(call: &Within) -> &'static Device {
    &call.driver().devices[call.context.device]
}

symbol! { within fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |call| {
    let budget = &device(call).budget;
    give(free, usize::try_from(budget.free()).unwrap_or(usize::MAX))?;
    give(total, usize::try_from(budget.total()).unwrap_or(usize::MAX))
} }

symbol! { within fn cuMemAlloc_v2(address: *mut usize, bytes: usize) |call| {
    if bytes == 0 || address.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let charged = (bytes as u64).checked_next_multiple_of(512).ok_or(Code::OUT_OF_MEMORY)?;
    device(call).budget.take(charged)?;
    let made = call.driver().space.device(call.context.device, bytes, call.context.handle, None);
    let made = made.inspect_err(|_| device(call).budget.give(charged))?;
    crate::memory::space::fill(made.start, bytes, crate::memory::POISON_ALLOCATED);
    give(address, made.start)
} }

/// Claims what starts there, if it is of that kind.
fn claim(
    call: &Within,
    address: usize,
    kind: impl Fn(Place) -> bool,
    otherwise: Code,
) -> Answer<Arc<Allocation>> {
    let space = &call.driver().space;
    match space.find(address) {
        Some(found) if found.start == address && kind(found.place) => {
            space.claim(address).ok_or(Code::INVALID_VALUE)
        }
        _ => Err(otherwise),
    }
}

symbol! { within fn cuMemFree_v2(address: usize) |call| {
    if address == 0 {
        return Ok(());
    }
    let claimed = claim(call, address, |place| matches!(place, Place::Device(_)), Code::INVALID_VALUE)?;
    // The driver waits for the device here, and so may a program rely on it.
    let waited = call.driver().wait_for_all(&call.context);
    call.driver().refund(&claimed);
    end_now(call.driver(), &claimed);
    waited
} }

fn from_pool(call: &Within, address: *mut usize, bytes: usize, pool: usize, stream: usize) -> Answer<()> {
    let stream = call.stream(stream)?;
    let handle = pool;
    let pool = call.driver().pool(handle)?;
    if bytes == 0 || address.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let charged = (bytes as u64).checked_next_multiple_of(512).ok_or(Code::OUT_OF_MEMORY)?;
    let budget = &call.driver().devices[pool.device].budget;
    pool.take(charged, budget)?;
    let made = call.driver().space.device(pool.device, bytes, call.context.handle, Some(handle));
    let made = made.inspect_err(|_| pool.give(charged))?;
    give(address, made.start)?;
    call.issue(&stream, Work::Born(made));
    Ok(())
}

symbol! { within fn cuMemAllocAsync(address: *mut usize, bytes: usize, stream: usize) |call| {
    needs_pools(&call.call, call.context.device)?;
    from_pool(call, address, bytes, device(call).current_pool.load(Ordering::Acquire), stream)
} }

symbol! { within fn cuMemAllocFromPoolAsync(address: *mut usize, bytes: usize, pool: usize, stream: usize) |call| {
    from_pool(call, address, bytes, pool, stream)
} }

symbol! { within fn cuMemFreeAsync(address: usize, stream: usize) |call| {
    let stream = call.stream(stream)?;
    let claimed = claim(call, address, |place| matches!(place, Place::Device(_)), Code::INVALID_VALUE)?;
    call.driver().unexport(&claimed);
    call.driver().refund(&claimed);
    call.issue(&stream, Work::Free(claimed));
    Ok(())
} }

fn needs_pools(call: &Call, device: usize) -> Answer<()> {
    if call.driver.machine.devices[device].pools { Ok(()) } else { Err(Code::NOT_SUPPORTED) }
}

symbol! { within fn cuMemHostAlloc(address: *mut usize, bytes: usize, _flags: u32) |call| {
    if bytes == 0 || address.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    give(address, call.driver().space.pinned(bytes, call.context.handle)?.start)
} }

symbol! { within fn cuMemFreeHost(address: usize) |call| {
    let claimed = claim(call, address, |place| place == Place::Pinned, Code::INVALID_VALUE)?;
    let waited = call.driver().wait_for_all(&call.context);
    end_now(call.driver(), &claimed);
    waited
} }

symbol! { within fn cuMemHostRegister_v2(address: usize, bytes: usize, _flags: u32) |call| {
    if address == 0 || bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    call.driver().space.register(address, bytes, call.context.handle)
} }

symbol! { within fn cuMemHostUnregister(address: usize) |call| {
    let registered = |place| place == Place::Registered;
    let claimed = claim(call, address, registered, Code::HOST_MEMORY_NOT_REGISTERED)?;
    let waited = call.driver().wait_for_all(&call.context);
    end_now(call.driver(), &claimed);
    waited
} }

symbol! { within fn cuMemHostGetDevicePointer_v2(device: *mut usize, host: usize, _flags: u32) |call| {
    let found = call.driver().space.find(host).filter(|found| found.device().is_none());
    found.ok_or(Code::INVALID_VALUE)?;
    give(device, host)
} }

symbol! { within fn cuMemGetAddressRange_v2(base: *mut usize, bytes: *mut usize, address: usize) |call| {
    let found = call.driver().space.find(address).ok_or(Code::NOT_FOUND)?;
    if !base.is_null() {
        give(base, found.start)?;
    }
    if bytes.is_null() { Ok(()) } else { give(bytes, found.bytes) }
} }

symbol! { within fn cuPointerGetAttribute(value: usize, attribute: u32, address: usize) |call| {
    let found = call.driver().space.find(address).ok_or(Code::INVALID_VALUE)?;
    let on_device = found.device();
    match attribute {
        1 => give(value as *mut usize, found.context),
        2 => give(value as *mut u32, if on_device.is_some() { 2 } else { 1 }),
        3 | 4 => give(value as *mut usize, address),
        7 => give(value as *mut u64, found.id),
        9 => give(value as *mut i32, i32::try_from(on_device.unwrap_or(call.context.device)).unwrap_or(i32::MAX)),
        11 => give(value as *mut usize, found.start),
        12 => give(value as *mut usize, found.bytes),
        _ => Err(Code::NOT_SUPPORTED),
    }
} }

/// The head of `CUmemPoolProps`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct PoolProperties {
    allocation_type: u32,
    handle_types: u32,
    location_type: u32,
    location: i32,
}

symbol! { plain fn cuMemPoolCreate(pool: *mut usize, properties: *const PoolProperties) |call| {
    if properties.is_null() || pool.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: not null, and by the driver API's contract a CUmemPoolProps, which begins with these fields.
    let properties = unsafe { &*properties };
    if (properties.allocation_type, properties.location_type) != (1, 1) {
        return Err(Code::INVALID_VALUE);
    }
    let (index, _) = call.driver.device(properties.location)?;
    needs_pools(call, index)?;
    if properties.handle_types != 0 {
        return Err(Code::NOT_SUPPORTED);
    }
    let handle = call.driver.handle();
    give(pool, call.driver.pools.insert(handle, Arc::new(Pool::new(index)))?)
} }

symbol! { plain fn cuMemPoolDestroy(pool: usize) |call| {
    let gone = call.driver.pool(pool)?;
    let device = &call.driver.devices[gone.device];
    if device.default_pool == pool {
        return Err(Code::INVALID_VALUE);
    }
    let _ = device.current_pool.compare_exchange(pool, device.default_pool, Ordering::AcqRel, Ordering::Acquire);
    // What is in use stays charged to it until it is freed.
    gone.close();
    call.driver.bury(pool, &gone);
    Ok(())
} }

symbol! { plain fn cuMemPoolTrimTo(pool: usize, keep: usize) |call| {
    let pool = call.driver.pool(pool)?;
    pool.trim(keep as u64, &call.driver.devices[pool.device].budget);
    Ok(())
} }

symbol! { plain fn cuMemPoolGetAttribute(pool: usize, attribute: u32, value: usize) |call| {
    let pool = call.driver.pool(pool)?;
    let figures = pool.figures();
    match attribute {
        1..=3 => give(value as *mut i32, pool.reuse(attribute as usize - 1)),
        4 => give(value as *mut u64, pool.threshold()),
        5 => give(value as *mut u64, figures.reserved),
        6 => give(value as *mut u64, figures.reserved_high),
        7 => give(value as *mut u64, figures.used),
        8 => give(value as *mut u64, figures.used_high),
        _ => Err(Code::INVALID_VALUE),
    }
} }

symbol! { plain fn cuMemPoolSetAttribute(pool: usize, attribute: u32, value: *const u64) |call| {
    let pool = call.driver.pool(pool)?;
    if value.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    match attribute {
        // SAFETY: not null, and by the driver API's contract an int for these attributes.
        1..=3 => pool.set_reuse(attribute as usize - 1, unsafe { value.cast::<i32>().read_unaligned() }),
        // SAFETY: not null, and by the driver API's contract a 64-bit count.
        4 => pool.set_threshold(unsafe { value.read_unaligned() }),
        6 => pool.reset_high(false),
        8 => pool.reset_high(true),
        _ => return Err(Code::INVALID_VALUE),
    }
    Ok(())
} }

symbol! { about(device) fn cuDeviceGetDefaultMemPool(pool: *mut usize, device: i32) |call| {
    let (index, device) = call.driver.device(device)?;
    needs_pools(call, index)?;
    give(pool, device.default_pool)
} }

symbol! { about(device) fn cuDeviceGetMemPool(pool: *mut usize, device: i32) |call| {
    let (index, device) = call.driver.device(device)?;
    needs_pools(call, index)?;
    give(pool, device.current_pool.load(Ordering::Acquire))
} }

symbol! { about(device) fn cuDeviceSetMemPool(device: i32, pool: usize) |call| {
    let (index, device) = call.driver.device(device)?;
    if call.driver.pool(pool)?.device != index {
        return Err(Code::INVALID_DEVICE);
    }
    device.current_pool.store(pool, Ordering::Release);
    Ok(())
} }

symbol! { within fn cuIpcGetMemHandle(handle: *mut Handle, address: usize) |call| {
    let found = call.driver().space.find(address).filter(|found| matches!(found.place, Place::Device(_)));
    let found = found.ok_or(Code::INVALID_VALUE)?;
    if found.pool.is_some() {
        // As in the driver: memory of pools has handles of its own, which are not modelled.
        return Err(Code::INVALID_VALUE);
    }
    give(handle, call.driver().export(&found)?)
} }

symbol! { within fn cuIpcOpenMemHandle_v2(address: *mut usize, handle: Handle, _flags: u32) |call| {
    let opened = call.driver().open(&handle, call.context.device, call.context.handle)?;
    give(address, opened.start)
} }

symbol! { within fn cuIpcCloseMemHandle(address: usize) |call| {
    let imported = |place| matches!(place, Place::Imported(_));
    let claimed = claim(call, address, imported, Code::INVALID_VALUE)?;
    let waited = call.driver().wait_for_all(&call.context);
    end_now(call.driver(), &claimed);
    waited
} }
