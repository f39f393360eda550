//! Modules, functions, launches.
#![expect(unsafe_code, reason = "exports C symbols")]

use std::ffi::{CStr, c_char};
use std::sync::Arc;

use super::symbol;
use crate::call::give;
use crate::error::Code;
use crate::launch::{BLOCK_MAX, Launch, SHARED_MAX};
use crate::module::{Function, Module};
use crate::operation::Work;

symbol! { within fn cuModuleLoadData(module: *mut usize, image: usize) |call| {
    if module.is_null() || image == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let made = Arc::new(Module::load(image, call.context.handle)?);
    give(module, call.driver().modules.insert(call.driver().handle(), made)?)
} }

symbol! { within fn cuModuleUnload(module: usize) |call| {
    call.driver().modules.remove(module)?;
    call.driver().functions.retain(|function| function.module != module);
    Ok(())
} }

symbol! { within fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) |call| {
    if function.is_null() || name.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let handle = module;
    let module = call.driver().modules.get(handle)?;
    // SAFETY: not null, and by the driver API's contract a C string.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    let kernel = *module.kernels.get(&name).ok_or(Code::NOT_FOUND)?;
    let made = Arc::new(Function { context: module.context, module: handle, name, kernel });
    give(function, call.driver().functions.insert(call.driver().handle(), made)?)
} }

symbol! { within fn cuFuncGetAttribute(value: *mut i32, attribute: i32, function: usize) |call| {
    call.driver().functions.get(function)?;
    give(value, match attribute {
        0 => i32::try_from(BLOCK_MAX).unwrap_or(i32::MAX),
        1..=3 | 7 => 0,                                     // static shared, constant, local memory; caching
        4 => 32,                                            // registers: a CPU has no such figure
        5 | 6 => 90,                                        // PTX and binary version
        8 => i32::try_from(SHARED_MAX).unwrap_or(i32::MAX),
        9 => -1,                                            // shared memory carve-out: default
        _ => return Err(Code::INVALID_VALUE),
    })
} }

symbol! { within fn cuFuncSetAttribute(function: usize, attribute: i32, value: i32) |call| {
    call.driver().functions.get(function)?;
    match attribute {
        8 if u32::try_from(value).is_ok_and(|bytes| bytes <= SHARED_MAX) => Ok(()),
        9 if (-1..=100).contains(&value) => Ok(()),
        _ => Err(Code::INVALID_VALUE),
    }
} }

symbol! { within fn cuLaunchKernel(
    function: usize,
    grid_x: u32, grid_y: u32, grid_z: u32,
    block_x: u32, block_y: u32, block_z: u32,
    shared: u32, stream: usize, parameters: usize, extra: usize,
) |call| {
    let function = call.driver().functions.get(function)?;
    let stream = call.stream(stream)?;
    if stream.device != call.context.device || function.context != call.context.handle {
        return Err(Code::INVALID_HANDLE);
    }
    if extra != 0 {
        crate::report::say("cuLaunchKernel with 'extra' is not modelled: pass kernelParams");
        return Err(Code::NOT_SUPPORTED);
    }
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    call.issue(&stream, Work::Launch(Launch::new(&function, grid, block, shared, parameters)?));
    Ok(())
} }
