//! Streams, events, host functions.
#![expect(unsafe_code, reason = "exports C symbols")]

use std::sync::Arc;

use super::symbol;
use crate::call::{Within, give};
use crate::error::{Answer, Code};
use crate::event::{Event, Record, Recorded};
use crate::operation::{HostFunction, Work};

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;

symbol! { within fn cuStreamCreate(stream: *mut usize, flags: u32) |call| { create(call, stream, flags, 0) } }

symbol! { within fn cuStreamCreateWithPriority(stream: *mut usize, flags: u32, priority: i32) |call| {
    create(call, stream, flags, priority.clamp(-5, 0))
} }

fn create(call: &Within, stream: *mut usize, flags: u32, priority: i32) -> Answer<()> {
    if flags > NON_BLOCKING || stream.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let blocking = flags & NON_BLOCKING == 0;
    give(stream, call.driver().add_stream(&call.context, blocking, priority)?)
}

symbol! { within fn cuStreamDestroy_v2(stream: usize) |call| { call.driver().end_stream(&call.context, stream) } }

symbol! { within fn cuStreamSynchronize(stream: usize) |call| { call.wait_for(&call.stream(stream)?) } }

symbol! { within fn cuStreamQuery(stream: usize) |call| {
    let stream = call.stream(stream)?;
    if stream.all().is_done() { call.wait_for(&stream) } else { Err(Code::NOT_READY) }
} }

symbol! { within fn cuStreamGetPriority(stream: usize, priority: *mut i32) |call| {
    give(priority, call.stream(stream)?.priority)
} }

symbol! { within fn cuStreamGetFlags(stream: usize, flags: *mut u32) |call| {
    give(flags, u32::from(!call.stream(stream)?.blocking))
} }

symbol! { within fn cuStreamGetCtx(stream: usize, context: *mut usize) |call| {
    call.stream(stream)?;
    give(context, call.context.handle)
} }

symbol! { within fn cuStreamWaitEvent(stream: usize, event: usize, _flags: u32) |call| {
    let (stream, event) = (call.stream(stream)?, call.driver().events.get(event)?);
    if let Some(recorded) = event.last() {
        call.issue_after(&stream, Work::Nothing, vec![(recorded.marker, recorded.clock)]);
    }
    Ok(())
} }

/// Capture into graphs is not modelled: no stream ever captures.
mod capture {
    use super::{give, symbol};

    symbol! { within fn cuStreamIsCapturing(stream: usize, status: *mut i32) |call| {
        call.stream(stream)?;
        give(status, 0)
    } }
}

symbol! { within fn cuLaunchHostFunc(stream: usize, function: Option<HostFunction>, data: usize) |call| {
    let function = function.ok_or(Code::INVALID_VALUE)?;
    call.issue(&call.stream(stream)?, Work::Host(function, data));
    Ok(())
} }

symbol! { within fn cuEventCreate(event: *mut usize, flags: u32) |call| {
    // Blocking, without timing, between processes: the last needs the second, as in the driver.
    if flags > 7 || flags & 6 == 4 || event.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let handle = call.driver().handle();
    let made = Arc::new(Event::new(call.context.handle, flags));
    give(event, call.driver().events.insert(handle, made)?)
} }

symbol! { within fn cuEventDestroy_v2(event: usize) |call| { call.driver().events.remove(event).map(drop) } }

symbol! { within fn cuEventRecord(event: usize, stream: usize) |call| { record(call, event, stream) } }

symbol! { within fn cuEventRecordWithFlags(event: usize, stream: usize, _flags: u32) |call| {
    record(call, event, stream)
} }

fn record(call: &Within, event: usize, stream: usize) -> Answer<()> {
    let (event, stream) = (call.driver().events.get(event)?, call.stream(stream)?);
    if event.context != call.context.handle || stream.device != call.context.device {
        return Err(Code::INVALID_HANDLE);
    }
    let record = Arc::new(Record::default());
    let (marker, clock) = call.issue(&stream, Work::Record(Arc::clone(&record)));
    event.set(Recorded { marker, clock, record });
    Ok(())
}

symbol! { within fn cuEventQuery(event: usize) |call| {
    let event = call.driver().events.get(event)?;
    let Some(recorded) = event.last() else { return Ok(()) };
    if !recorded.marker.is_done() {
        return Err(Code::NOT_READY);
    }
    call.seen(&recorded);
    call.context.poll()
} }

symbol! { within fn cuEventSynchronize(event: usize) |call| {
    let event = call.driver().events.get(event)?;
    let Some(recorded) = event.last() else { return Ok(()) };
    recorded.marker.wait();
    call.seen(&recorded);
    call.context.poll()
} }

fn elapsed(call: &Within, milliseconds: *mut f32, start: usize, end: usize) -> Answer<()> {
    let (start, end) = (call.driver().events.get(start)?, call.driver().events.get(end)?);
    give(milliseconds, start.milliseconds(&end)?)
}

symbol! { within fn cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize) |call| {
    elapsed(call, milliseconds, start, end)
} }

symbol! { within fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: usize, end: usize) |call| {
    elapsed(call, milliseconds, start, end)
} }
