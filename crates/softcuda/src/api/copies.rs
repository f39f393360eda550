//! Copies and fills.
//!
//! From pageable host memory the bytes are taken before the call returns and move later; to pageable memory the call
//! returns when they have arrived; page-locked memory is read and written when the copy runs.
#![expect(unsafe_code, reason = "exports C symbols")]

use super::symbol;
use crate::call::Within;
use crate::error::{Answer, Code};
use crate::operation::{End, Work, stage};

/// Bytes that one pageable copy may stage: the host holds them twice meanwhile.
const STAGED_MAX: usize = 16 << 30;
/// `CU_MEMORYTYPE_HOST`, `_DEVICE`, `_UNIFIED`.
const HOST: u32 = 1;
const DEVICE: u32 = 2;
const UNIFIED: u32 = 4;

fn pinned(call: &Within, at: usize, bytes: usize) -> bool {
    call.driver().space.holds(at, bytes).is_some_and(|allocation| allocation.device().is_none())
}

fn to_device(call: &Within, to: usize, from: usize, bytes: usize, stream: usize, wait: bool) -> Answer<()> {
    let stream = call.stream(stream)?;
    if bytes == 0 {
        return Ok(());
    }
    if from == 0 || to == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let known = pinned(call, from, bytes);
    if !known && bytes > STAGED_MAX {
        return Err(Code::OUT_OF_MEMORY);
    }
    let from = if known { End::Known(from) } else { End::Staged(stage(from, bytes)) };
    call.issue(&stream, Work::Copy { from, to: End::Known(to), bytes });
    if wait && known { call.wait_for(&stream) } else { Ok(()) }
}

fn to_host(call: &Within, to: usize, from: usize, bytes: usize, stream: usize, wait: bool) -> Answer<()> {
    let stream = call.stream(stream)?;
    if bytes == 0 {
        return Ok(());
    }
    if from == 0 || to == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let known = pinned(call, to, bytes);
    let to = if known { End::Known(to) } else { End::Pageable(to) };
    call.issue(&stream, Work::Copy { from: End::Known(from), to, bytes });
    if wait || !known { call.wait_for(&stream) } else { Ok(()) }
}

fn between(call: &Within, to: usize, from: usize, bytes: usize, stream: usize) -> Answer<()> {
    let stream = call.stream(stream)?;
    if bytes > 0 {
        call.issue(&stream, Work::Copy { from: End::Known(from), to: End::Known(to), bytes });
    }
    Ok(())
}

symbol! { within fn cuMemcpyHtoD_v2(to: usize, from: usize, bytes: usize) |call| {
    to_device(call, to, from, bytes, 0, true)
} }

symbol! { within fn cuMemcpyHtoDAsync_v2(to: usize, from: usize, bytes: usize, stream: usize) |call| {
    to_device(call, to, from, bytes, stream, false)
} }

symbol! { within fn cuMemcpyDtoH_v2(to: usize, from: usize, bytes: usize) |call| {
    to_host(call, to, from, bytes, 0, true)
} }

symbol! { within fn cuMemcpyDtoHAsync_v2(to: usize, from: usize, bytes: usize, stream: usize) |call| {
    to_host(call, to, from, bytes, stream, false)
} }

symbol! { within fn cuMemcpyDtoD_v2(to: usize, from: usize, bytes: usize) |call| { between(call, to, from, bytes, 0) } }

symbol! { within fn cuMemcpyDtoDAsync_v2(to: usize, from: usize, bytes: usize, stream: usize) |call| {
    between(call, to, from, bytes, stream)
} }

symbol! { within fn cuMemcpyPeerAsync(
    to: usize, to_context: usize, from: usize, from_context: usize, bytes: usize, stream: usize,
) |call| {
    for context in [to_context, from_context] {
        call.driver().contexts.get(context).map_err(|_| Code::INVALID_CONTEXT)?;
    }
    between(call, to, from, bytes, stream)
} }

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Copy2D {
    from_x: usize,
    from_y: usize,
    from_type: u32,
    from_host: usize,
    from_device: usize,
    from_array: usize,
    from_pitch: usize,
    to_x: usize,
    to_y: usize,
    to_type: u32,
    to_host: usize,
    to_device: usize,
    to_array: usize,
    to_pitch: usize,
    width: usize,
    height: usize,
}

symbol! { within fn cuMemcpy2DAsync_v2(copy: *const Copy2D, stream: usize) |call| {
    if copy.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: not null, and by the driver API's contract a CUDA_MEMCPY2D.
    let copy = unsafe { &*copy };
    rows(call, copy, stream)
} }

fn rows(call: &Within, copy: &Copy2D, stream: usize) -> Answer<()> {
    let stream = call.stream(stream)?;
    if copy.width == 0 || copy.height == 0 {
        return Ok(());
    }
    let side = |kind: u32, host: usize, device: usize, x: usize, y: usize, pitch: usize| {
        let base = match kind {
            HOST => host,
            DEVICE | UNIFIED => device,
            _ => return Err(Code::NOT_SUPPORTED),
        };
        let pitch = if pitch == 0 { copy.width } else { pitch };
        let start = y.checked_mul(pitch).and_then(|rows| base.checked_add(rows)?.checked_add(x));
        let span = (copy.height - 1).checked_mul(pitch).and_then(|rows| rows.checked_add(copy.width));
        match (start, span) {
            (Some(start), Some(span)) if base != 0 && pitch >= copy.width => Ok((start, pitch, span)),
            _ => Err(Code::INVALID_VALUE),
        }
    };
    let from =
        side(copy.from_type, copy.from_host, copy.from_device, copy.from_x, copy.from_y, copy.from_pitch)?;
    let to = side(copy.to_type, copy.to_host, copy.to_device, copy.to_x, copy.to_y, copy.to_pitch)?;
    for (kind, (start, _, span)) in [(copy.from_type, from), (copy.to_type, to)] {
        if kind == HOST && !pinned(call, start, span) {
            crate::report::say("cuMemcpy2DAsync_v2 with pageable host memory is not modelled: page-lock it");
            return Err(Code::NOT_SUPPORTED);
        }
    }
    let (bytes, rows) = (copy.width, copy.height);
    call.issue(&stream, Work::Rows { from: from.0, to: to.0, pitches: (from.1, to.1), bytes, rows });
    Ok(())
}

fn set(call: &Within, at: usize, unit: &[u8], count: usize, stream: usize) -> Answer<()> {
    let stream = call.stream(stream)?;
    let bytes = count.checked_mul(unit.len()).ok_or(Code::INVALID_VALUE)?;
    if bytes == 0 {
        return Ok(());
    }
    if at == 0 || !at.is_multiple_of(unit.len()) {
        return Err(Code::INVALID_VALUE);
    }
    call.issue(&stream, Work::Fill { at, unit: unit.to_vec(), bytes });
    Ok(())
}

symbol! { within fn cuMemsetD8_v2(at: usize, value: u8, count: usize) |call| { set(call, at, &[value], count, 0) } }

symbol! { within fn cuMemsetD8Async(at: usize, value: u8, count: usize, stream: usize) |call| {
    set(call, at, &[value], count, stream)
} }

symbol! { within fn cuMemsetD32_v2(at: usize, value: u32, count: usize) |call| {
    set(call, at, &value.to_ne_bytes(), count, 0)
} }

symbol! { within fn cuMemsetD32Async(at: usize, value: u32, count: usize, stream: usize) |call| {
    set(call, at, &value.to_ne_bytes(), count, stream)
} }
