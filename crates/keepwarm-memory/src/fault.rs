//! Faults that tests and the demo inject on purpose; nothing here happens by itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::guard::Block;

/// Never.
const OFF: u64 = u64::MAX;

/// What shall go wrong on a device, and when. Shared with the device it was given to.
#[derive(Debug)]
pub struct FaultPlan {
    sticky_after: AtomicU64,
    flip_after: AtomicU64,
    allocations_fail: AtomicBool,
    hung: Mutex<bool>,
    resumed: Condvar,
    /// What the tests of the tests take out.
    #[cfg(test)]
    pub(crate) planted: Planted,
}

/// Bugs that the tests of the tests plant in a device. Only there: no build but that of this crate's tests has them.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct Planted {
    /// A CUDA device takes batches as passed without asking.
    #[cfg(feature = "cuda")]
    pub(crate) waits_for_nothing: AtomicBool,
    /// The device goes on after an error.
    pub(crate) fences_nothing: AtomicBool,
    /// The device asks for nobody's tenant and birth.
    pub(crate) knows_no_owner: AtomicBool,
    /// A CUDA device gives the targets of a copy back to their arena when it is issued.
    #[cfg(feature = "cuda")]
    pub(crate) lets_go_early: AtomicBool,
}

#[cfg(test)]
impl Planted {
    pub(crate) fn has(bug: &AtomicBool) -> bool {
        bug.load(Ordering::SeqCst)
    }

    pub(crate) fn plant(bug: &AtomicBool) {
        bug.store(true, Ordering::SeqCst);
    }
}

impl Default for FaultPlan {
    fn default() -> Self {
        Self {
            sticky_after: AtomicU64::new(OFF),
            flip_after: AtomicU64::new(OFF),
            allocations_fail: AtomicBool::new(false),
            hung: Mutex::new(false),
            resumed: Condvar::new(),
            #[cfg(test)]
            planted: Planted::default(),
        }
    }
}

impl FaultPlan {
    /// After `jobs` more jobs the device has a sticky error: that job and all later ones fail.
    pub fn sticky_after(&self, jobs: u64) {
        self.sticky_after.store(jobs, Ordering::SeqCst);
    }

    /// After `copies` more block copies, one copy arrives with a flipped bit.
    pub fn flip_after(&self, copies: u64) {
        self.flip_after.store(copies, Ordering::SeqCst);
    }

    /// Allocations in the device's arena fail, or work again.
    pub fn fail_allocations(&self, fail: bool) {
        self.allocations_fail.store(fail, Ordering::SeqCst);
    }

    /// Streams stop taking jobs, or go on.
    pub fn hang(&self, hang: bool) {
        *self.hung.lock().unwrap_or_else(PoisonError::into_inner) = hang;
        self.resumed.notify_all();
    }

    pub(crate) fn allocation_fails(&self) -> bool {
        self.allocations_fail.load(Ordering::SeqCst)
    }

    pub(crate) fn wait_while_hung(&self) {
        let mut hung = self.hung.lock().unwrap_or_else(PoisonError::into_inner);
        while *hung {
            hung = self.resumed.wait(hung).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn sticky_now(&self) -> bool {
        due(&self.sticky_after)
    }

    pub(crate) fn flip_now(&self) -> bool {
        due(&self.flip_after)
    }
}

/// Counts down; true exactly when the count was zero.
fn due(count: &AtomicU64) -> bool {
    let step = |left: u64| if left == OFF { None } else { Some(left.checked_sub(1).unwrap_or(OFF)) };
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step) == Ok(0)
}

/// Flips one bit of a sealed block's bytes, as failing memory would: the next verification must refuse it.
///
/// # Panics
/// If the bit lies outside the block.
pub fn flip_bit(block: &Block, bit: u64) {
    block.flip_bit(bit);
}
