//! Whether the node's disk takes what it is given: what the registry's plan wants to know before it gives more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use keepwarm_types::{Millis, Timestamp};

use crate::clock::now;

/// How long after a refusal this node takes no copies of more shards. Without shards nothing is written, so nothing shows
/// that there is room again: an operator's pace, not a machine's.
const REFUSED_REST: Millis = Millis(60_000);
/// A disk that answered nothing for this long, while it was asked, hangs.
const HANGS_AFTER: Millis = Millis(1_000);

/// Counts what shards ask of the catalog and what it answers.
#[derive(Debug, Default)]
pub(crate) struct DiskWatch {
    asked: AtomicU64,
    answered: AtomicU64,
    /// When records were last refused; zero where they never were.
    refused: AtomicU64,
    /// The answers at the last look at which there were more, or none was owed; and when that was.
    seen: Mutex<(u64, Timestamp)>,
}

impl DiskWatch {
    /// Records were given to the catalog.
    pub(crate) fn asked(&self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
    }

    /// It has them, or refused them.
    pub(crate) fn answered(&self, taken: bool) {
        self.answered.fetch_add(1, Ordering::Relaxed);
        if !taken {
            self.refused.store(now().0, Ordering::Relaxed);
        }
    }

    /// Whether it takes what it is given, as far as this shows. Looked at again and again: that is how time is measured.
    pub(crate) fn is_well(&self) -> bool {
        self.is_well_at(now())
    }

    fn is_well_at(&self, now: Timestamp) -> bool {
        let answered = self.answered.load(Ordering::Relaxed);
        let owed = self.asked.load(Ordering::Relaxed) > answered;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !owed || seen.0 != answered {
            *seen = (answered, now);
        }
        let refused = Timestamp(self.refused.load(Ordering::Relaxed));
        let rests = refused != Timestamp(0) && now.since(refused) < REFUSED_REST;
        !rests && now.since(seen.1) < HANGS_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_answers_nothing_hangs_and_one_that_is_not_asked_does_not() {
        let disk = DiskWatch::default();
        let at = |ms: u64| Timestamp(1_000_000 + ms);
        assert!(disk.is_well_at(at(0)));
        assert!(disk.is_well_at(at(50_000)), "nothing is asked of it");
        disk.asked();
        disk.asked();
        assert!(disk.is_well_at(at(50_900)));
        disk.answered(true);
        assert!(disk.is_well_at(at(51_500)), "it answers, slowly");
        assert!(!disk.is_well_at(at(52_500)), "it owes an answer for a second");
        disk.answered(true);
        assert!(disk.is_well_at(at(52_600)));
    }

    #[test]
    fn a_refusal_counts_for_a_while() {
        let disk = DiskWatch::default();
        disk.asked();
        disk.answered(false);
        let then = Timestamp(disk.refused.load(Ordering::Relaxed));
        assert!(!disk.is_well_at(then + Millis(59_999)));
        assert!(disk.is_well_at(then + REFUSED_REST));
    }
}
