//! Stream-ordered memory pools: how much of a device's budget each keeps, and when it lets go.
//!
//! A pool's share of the budget is counted in call order: an allocation may use what an earlier call of
//! `cuMemFreeAsync` gives back, even where that has not run yet. Addresses are reused only after it has.

use std::sync::Mutex;

use crate::error::{Answer, Code};
use crate::locks::lock;

/// A device's memory budget.
#[derive(Debug)]
pub(crate) struct Budget {
    total: u64,
    reserved: Mutex<u64>,
}

impl Budget {
    pub(crate) fn new(total: u64) -> Self {
        Self { total, reserved: Mutex::new(0) }
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    pub(crate) fn free(&self) -> u64 {
        self.total.saturating_sub(*lock(&self.reserved))
    }

    pub(crate) fn take(&self, bytes: u64) -> Answer<()> {
        let mut reserved = lock(&self.reserved);
        match reserved.checked_add(bytes) {
            Some(sum) if sum <= self.total => *reserved = sum,
            _ => return Err(Code::OUT_OF_MEMORY),
        }
        Ok(())
    }

    pub(crate) fn give(&self, bytes: u64) {
        let mut reserved = lock(&self.reserved);
        *reserved = reserved.saturating_sub(bytes);
    }
}

/// What a pool's attributes show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    pub(crate) reserved: u64,
    pub(crate) reserved_high: u64,
    pub(crate) used: u64,
    pub(crate) used_high: u64,
}

/// A pool.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) device: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    figures: Figures,
    /// The program has destroyed it.
    closed: bool,
    threshold: u64,
    /// `REUSE_FOLLOW_EVENT_DEPENDENCIES`, `_ALLOW_OPPORTUNISTIC`, `_ALLOW_INTERNAL_DEPENDENCIES`: kept, without effect.
    reuse: [i32; 3],
}

impl Pool {
    pub(crate) fn new(device: usize) -> Self {
        let state = State { figures: Figures::default(), closed: false, threshold: 0, reuse: [1; 3] };
        Self { device, state: Mutex::new(state) }
    }

    /// Takes memory out of what the pool keeps, and the rest from the device.
    pub(crate) fn take(&self, bytes: u64, budget: &Budget) -> Answer<()> {
        let mut state = lock(&self.state);
        let figures = &mut state.figures;
        let more = bytes.saturating_sub(figures.reserved - figures.used);
        budget.take(more)?;
        figures.reserved += more;
        figures.used += bytes;
        figures.reserved_high = figures.reserved_high.max(figures.reserved);
        figures.used_high = figures.used_high.max(figures.used);
        Ok(())
    }

    /// Puts memory back; the pool keeps it until it is trimmed or a synchronisation finds it above the threshold.
    pub(crate) fn give(&self, bytes: u64) {
        let mut state = lock(&self.state);
        state.figures.used = state.figures.used.saturating_sub(bytes);
    }

    /// Lets go of what is not in use, down to `keep` bytes.
    pub(crate) fn trim(&self, keep: u64, budget: &Budget) {
        let mut state = lock(&self.state);
        let figures = &mut state.figures;
        let target = keep.max(figures.used).min(figures.reserved);
        budget.give(figures.reserved - target);
        figures.reserved = target;
    }

    /// What every synchronisation does.
    pub(crate) fn settle(&self, budget: &Budget) {
        let threshold = lock(&self.state).threshold;
        self.trim(threshold, budget);
    }

    /// No more from it; its memory goes back as it is freed.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        state.threshold = 0;
    }

    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }

    pub(crate) fn figures(&self) -> Figures {
        lock(&self.state).figures
    }

    pub(crate) fn threshold(&self) -> u64 {
        lock(&self.state).threshold
    }

    pub(crate) fn set_threshold(&self, bytes: u64) {
        lock(&self.state).threshold = bytes;
    }

    pub(crate) fn reuse(&self, index: usize) -> i32 {
        lock(&self.state).reuse.get(index).copied().unwrap_or_default()
    }

    pub(crate) fn set_reuse(&self, index: usize, value: i32) {
        if let Some(reuse) = lock(&self.state).reuse.get_mut(index) {
            *reuse = i32::from(value != 0);
        }
    }

    /// The program may set the high-water marks back to the present.
    pub(crate) fn reset_high(&self, used: bool) {
        let mut state = lock(&self.state);
        let figures = &mut state.figures;
        if used {
            figures.used_high = figures.used;
        } else {
            figures.reserved_high = figures.reserved;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_keeps_what_its_threshold_says() {
        let budget = Budget::new(1000);
        let pool = Pool::new(0);
        pool.take(600, &budget).unwrap();
        assert_eq!(pool.take(600, &budget), Err(Code::OUT_OF_MEMORY));
        pool.give(600);
        assert_eq!(budget.free(), 400, "kept until a synchronisation");
        pool.set_threshold(200);
        pool.settle(&budget);
        assert_eq!(budget.free(), 800);
        pool.take(700, &budget).unwrap();
        assert_eq!((budget.free(), pool.figures().used_high), (300, 700));
        pool.set_threshold(u64::MAX);
        pool.give(700);
        pool.settle(&budget);
        assert_eq!(budget.free(), 300);
        assert_eq!(budget.take(301), Err(Code::OUT_OF_MEMORY));
        pool.trim(0, &budget);
        assert_eq!(budget.free(), 1000);
    }
}
