//! What every call has in common: counted, traced, refused in host functions and by faults, and never a panic
//! across the C boundary.
#![expect(unsafe_code, reason = "writes results through the program's pointers")]

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use crate::context::Context;
use crate::driver::Driver;
use crate::error::{Answer, Code};
use crate::event::Recorded;
use crate::fault::Verdict;
use crate::locks::lock;
use crate::operation::{Effects, Work, in_host_function};
use crate::races::Clock;
use crate::report;
use crate::stream::{Marker, Stream};

/// Contexts that a thread may have pushed.
const STACK_MAX: usize = 64;

thread_local! {
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// A call in progress.
pub(crate) struct Call {
    pub(crate) driver: &'static Driver,
    pub(crate) symbol: &'static str,
    effects: Cell<Effects>,
}

/// A call in progress, in a context.
pub(crate) struct Within {
    pub(crate) call: Call,
    pub(crate) context: Arc<Context>,
}

/// The current context's handle, or 0.
pub(crate) fn current() -> usize {
    CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or_default())
}

/// Replaces the top of the stack.
pub(crate) fn set_current(handle: usize) {
    CURRENT.with_borrow_mut(|stack| {
        stack.pop();
        if handle != 0 {
            stack.push(handle);
        }
    });
}

/// Pushes a context.
pub(crate) fn push_current(handle: usize) -> Answer<()> {
    CURRENT.with_borrow_mut(|stack| {
        if stack.len() >= STACK_MAX {
            return Err(Code::OUT_OF_MEMORY);
        }
        stack.push(handle);
        Ok(())
    })
}

/// Pops the current context.
pub(crate) fn pop_current() -> Answer<usize> {
    CURRENT.with_borrow_mut(Vec::pop).ok_or(Code::INVALID_CONTEXT)
}

fn guarded(symbol: &'static str, work: impl FnOnce() -> (Option<usize>, Answer<()>)) -> u32 {
    let began = Instant::now();
    let (device, answer) = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        report::say(&format!("{symbol} panicked: this is a defect of softcuda"));
        (None, Err(Code::UNKNOWN))
    });
    let code = answer.map_or_else(|code| code.0, |()| 0);
    if let Some(driver) = Driver::get() {
        driver.trace.call(symbol, device, began, code);
    }
    code
}

fn judge(driver: &Driver, symbol: &'static str, device: Option<usize>) -> Verdict {
    *lock(&driver.calls).entry(symbol).or_default() += 1;
    lock(&driver.faults).judge(symbol, device)
}

/// `cuInit`: makes the driver.
pub(crate) fn first(symbol: &'static str) -> u32 {
    guarded(symbol, || {
        if in_host_function() {
            return (None, Err(Code::NOT_PERMITTED));
        }
        let answer = Driver::init().and_then(|driver| match judge(driver, symbol, None).refuse {
            Some((code, _)) => Err(code),
            None => Ok(()),
        });
        (None, answer)
    })
}

/// A call that needs no context and is about no device.
pub(crate) fn plain(symbol: &'static str, work: impl FnOnce(&Call) -> Answer<()>) -> u32 {
    without_context(symbol, None, work)
}

/// A call that needs no context and is about a device.
pub(crate) fn about(symbol: &'static str, device: i32, work: impl FnOnce(&Call) -> Answer<()>) -> u32 {
    without_context(symbol, usize::try_from(device).ok(), work)
}

fn without_context(
    symbol: &'static str,
    device: Option<usize>,
    work: impl FnOnce(&Call) -> Answer<()>,
) -> u32 {
    guarded(symbol, || {
        let answer = || {
            if in_host_function() {
                return Err(Code::NOT_PERMITTED);
            }
            let driver = Driver::get().ok_or(Code::NOT_INITIALIZED)?;
            let verdict = judge(driver, symbol, device);
            if let Some((code, _)) = verdict.refuse {
                return Err(code);
            }
            let call = Call { driver, symbol, effects: Cell::new(verdict.effects) };
            work(&call)?;
            // There is no context to tell it later.
            call.left_over().map_or(Ok(()), |(code, _)| Err(code))
        };
        (device, answer())
    })
}

/// A call in the current context, which answers that context's trouble first.
pub(crate) fn within(symbol: &'static str, work: impl FnOnce(&Within) -> Answer<()>) -> u32 {
    guarded(symbol, || {
        if in_host_function() {
            return (None, Err(Code::NOT_PERMITTED));
        }
        let Some(driver) = Driver::get() else { return (None, Err(Code::NOT_INITIALIZED)) };
        let Ok(context) = driver.contexts.get(current()) else { return (None, Err(Code::INVALID_CONTEXT)) };
        let device = context.device;
        let answer = || {
            let verdict = judge(driver, symbol, Some(device));
            context.poll()?;
            if let Some((code, sticky)) = verdict.refuse {
                if sticky {
                    context.set_sticky(code);
                }
                return Err(code);
            }
            let call = Call { driver, symbol, effects: Cell::new(verdict.effects) };
            let within = Within { call, context };
            let answer = work(&within);
            match within.call.left_over() {
                Some((code, true)) => within.context.set_sticky(code),
                Some((code, false)) => within.context.set_pending(code),
                None => {}
            }
            answer
        };
        (Some(device), answer())
    })
}

impl Call {
    /// What faults ordered of this call and no operation took along: a delay is the call's own, and the failure is
    /// for the caller to place.
    fn left_over(&self) -> Option<(Code, bool)> {
        let effects = self.effects.take();
        if let Some(delay) = effects.delay {
            std::thread::sleep(delay);
        }
        effects.fail
    }
}

impl Within {
    pub(crate) fn driver(&self) -> &'static Driver {
        self.call.driver
    }

    pub(crate) fn stream(&self, handle: usize) -> Answer<Arc<Stream>> {
        self.driver().stream(&self.context, handle)
    }

    /// Issues an operation of this call.
    pub(crate) fn issue(&self, stream: &Arc<Stream>, work: Work) -> (Marker, Clock) {
        self.issue_after(stream, work, Vec::new())
    }

    /// Issues an operation that waits for something besides.
    pub(crate) fn issue_after(
        &self,
        stream: &Arc<Stream>,
        work: Work,
        after: Vec<(Marker, Clock)>,
    ) -> (Marker, Clock) {
        self.driver().issue(&self.context, stream, self.call.symbol, work, self.call.effects.take(), after)
    }

    /// Waits for one stream.
    pub(crate) fn wait_for(&self, stream: &Arc<Stream>) -> Answer<()> {
        self.driver().wait_for(&self.context, std::slice::from_ref(stream))
    }

    /// The host has seen that an event was reached.
    pub(crate) fn seen(&self, recorded: &Recorded) {
        self.driver().races.host_knows(&recorded.clock);
        self.driver().settle(self.context.device);
    }
}

/// Writes a result.
pub(crate) fn give<T>(place: *mut T, value: T) -> Answer<()> {
    if place.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: not null, and by the driver API's contract a place for that type; packed structures are allowed.
    unsafe { place.write_unaligned(value) };
    Ok(())
}
