//! Primary contexts, the current context, peers.
#![expect(unsafe_code, reason = "exports C symbols")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::devices::reachable;
use super::symbol;
use crate::call::{current, give, pop_current, push_current, set_current};
use crate::context::Context;
use crate::driver::Driver;
use crate::error::{Answer, Code};
use crate::locks::lock;

symbol! { about(device) fn cuDevicePrimaryCtxRetain(context: *mut usize, device: i32) |call| {
    let (index, device) = call.driver.device(device)?;
    match device.lost.load(Ordering::Acquire) {
        0 => {}
        code => return Err(Code(code)),
    }
    let mut primary = lock(&device.primary);
    let handle = if let Some(context) = &primary.context {
        context.handle
    } else {
        let handle = call.driver.handle();
        let made = Context::new(index, handle, Arc::clone(&device.gate), Arc::clone(&device.lost));
        let made = Arc::new(made);
        call.driver.contexts.insert(handle, Arc::clone(&made))?;
        primary.context = Some(made);
        handle
    };
    primary.retained += 1;
    give(context, handle)
} }

symbol! { about(device) fn cuDevicePrimaryCtxRelease_v2(device: i32) |call| {
    let (_, device) = call.driver.device(device)?;
    let mut primary = lock(&device.primary);
    if primary.retained == 0 {
        return Err(Code::INVALID_CONTEXT);
    }
    primary.retained -= 1;
    if primary.retained == 0
        && let Some(context) = primary.context.take()
    {
        call.driver.empty(&context);
        context.destroyed.store(true, Ordering::Release);
        call.driver.contexts.remove(context.handle)?;
    }
    Ok(())
} }

symbol! { about(device) fn cuDevicePrimaryCtxReset_v2(device: i32) |call| {
    let (_, device) = call.driver.device(device)?;
    let context = lock(&device.primary).context.clone();
    if let Some(context) = context {
        call.driver.empty(&context);
    }
    Ok(())
} }

symbol! { about(device) fn cuDevicePrimaryCtxGetState(device: i32, flags: *mut u32, active: *mut i32) |call| {
    let (_, device) = call.driver.device(device)?;
    let primary = lock(&device.primary);
    give(flags, primary.flags)?;
    give(active, i32::from(primary.context.is_some()))
} }

symbol! { about(device) fn cuDevicePrimaryCtxSetFlags_v2(device: i32, flags: u32) |call| {
    let (_, device) = call.driver.device(device)?;
    lock(&device.primary).flags = flags;
    Ok(())
} }

symbol! { plain fn cuCtxGetCurrent(context: *mut usize) |_call| { give(context, current()) } }

fn known(driver: &Driver, handle: usize) -> Answer<()> {
    driver.contexts.get(handle).map(drop).map_err(|_| Code::INVALID_CONTEXT)
}

symbol! { plain fn cuCtxSetCurrent(context: usize) |call| {
    if context != 0 {
        known(call.driver, context)?;
    }
    set_current(context);
    Ok(())
} }

symbol! { plain fn cuCtxPushCurrent_v2(context: usize) |call| {
    known(call.driver, context)?;
    push_current(context)
} }

symbol! { plain fn cuCtxPopCurrent_v2(context: *mut usize) |_call| {
    let popped = pop_current()?;
    if context.is_null() { Ok(()) } else { give(context, popped) }
} }

symbol! { within fn cuCtxGetDevice(device: *mut i32) |call| {
    give(device, i32::try_from(call.context.device).unwrap_or(i32::MAX))
} }

symbol! { within fn cuCtxSynchronize() |call| { call.driver().wait_for_all(&call.context) } }

symbol! { within fn cuCtxGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) |_call| {
    if !least.is_null() {
        give(least, 0)?;
    }
    if greatest.is_null() { Ok(()) } else { give(greatest, -5) }
} }

fn peer(driver: &Driver, handle: usize) -> Answer<usize> {
    Ok(driver.contexts.get(handle).map_err(|_| Code::INVALID_CONTEXT)?.device)
}

symbol! { within fn cuCtxEnablePeerAccess(context: usize, flags: u32) |call| {
    let other = peer(call.driver(), context)?;
    if flags != 0 {
        return Err(Code::INVALID_VALUE);
    }
    if !reachable(call.driver(), call.context.device, other) {
        return Err(Code::PEER_ACCESS_UNSUPPORTED);
    }
    if lock(&call.context.peers).insert(other) { Ok(()) } else { Err(Code::PEER_ACCESS_ALREADY_ENABLED) }
} }

symbol! { within fn cuCtxDisablePeerAccess(context: usize) |call| {
    let other = peer(call.driver(), context)?;
    if lock(&call.context.peers).remove(&other) { Ok(()) } else { Err(Code::PEER_ACCESS_NOT_ENABLED) }
} }
