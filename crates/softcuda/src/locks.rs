//! Locks that a panic elsewhere does not take away: a driver goes on answering, and its state is small enough to
//! be whole between any two statements that could panic.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Like `wait`, but looks again after a while.
pub(crate) fn wait_a_while<'a, T>(
    condition: &Condvar,
    guard: MutexGuard<'a, T>,
    while_: Duration,
) -> MutexGuard<'a, T> {
    condition.wait_timeout(guard, while_).unwrap_or_else(PoisonError::into_inner).0
}
