//! What a run found, as text and as JSON.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::RESTART_MS_MAX;
use super::checker::Violation;
use super::history::{Counts, Op, Outcome, Record};

/// Most violations that are told: the first ones say what is wrong.
const TOLD_MAX: usize = 20;

/// A fault, and what it cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FaultReport {
    pub fault: String,
    /// All, where all were meant.
    pub nodes: Vec<String>,
    pub begin_ms: u64,
    /// From a kill to the start that followed it at once.
    pub restart_ms: Option<u64>,
    /// Until every promised copy was there again.
    pub whole_after_ms: u64,
    /// Longest time without an acknowledged write to a session.
    pub longest_unwritable_ms: u64,
    /// Longest time without an answered read of a session.
    pub longest_unreadable_ms: u64,
}

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub seed: u64,
    /// What repeats its schedule.
    pub command: String,
    pub seconds: f64,
    #[serde(flatten)]
    pub counts: Counts,
    pub faults: Vec<FaultReport>,
    /// How many promises were broken.
    pub broken: usize,
    /// The first of those.
    pub violations: Vec<Violation>,
    /// Logs of the nodes and history; only where a promise was broken.
    pub folder: Option<PathBuf>,
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Longest time between two neighbouring successes of one session that touches this window, or from a session's last one
/// to the window's end.
pub(super) fn longest(
    history: &[Record],
    window: (Duration, Duration),
    success: impl Fn(&Record) -> bool,
) -> Duration {
    let mut last = std::collections::HashMap::new();
    let mut longest = Duration::ZERO;
    for record in history.iter().filter(|record| success(record)) {
        let before = last.insert(record.session, record.end);
        let Some(before) = before else { continue };
        if before < window.1 && record.end > window.0 {
            longest = longest.max(record.end.saturating_sub(before));
        }
    }
    let open = last.into_values().map(|last| window.1.saturating_sub(last)).max();
    longest.max(open.unwrap_or_default())
}

/// A write that was acknowledged.
pub(super) const fn written(record: &Record) -> bool {
    matches!(record.outcome, Outcome::Written { .. })
}

/// A read that was answered, be it that the bytes are gone.
pub(super) const fn read(record: &Record) -> bool {
    matches!(record.op, Op::Read) && matches!(record.outcome, Outcome::Bytes { .. } | Outcome::Cold(_))
}

impl Report {
    /// Takes what the run and the checker found, in the order of time.
    pub(super) fn found(&mut self, violations: Vec<Violation>) {
        (self.broken, self.violations) = (violations.len(), violations);
        self.violations.sort_by_key(|violation| violation.at_ms);
        self.violations.truncate(TOLD_MAX);
    }

    #[must_use]
    pub const fn passed(&self) -> bool {
        self.broken == 0
    }

    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let counts = &self.counts;
        let _ = writeln!(
            text,
            "seed {}: {:.0} s, {} faults, {} writes acknowledged, {} refused, {} unknown; {} reads, {} unanswered",
            self.seed,
            self.seconds,
            self.faults.len(),
            counts.acknowledged,
            counts.refused,
            counts.unknown,
            counts.reads,
            counts.unanswered
        );
        let _ = writeln!(
            text,
            "{:<8} {:<9} {:>8} {:>10} {:>10} {:>13} {:>13}",
            "fault", "nodes", "at ms", "restart ms", "whole ms", "unwritable ms", "unreadable ms"
        );
        for fault in &self.faults {
            let _ = writeln!(
                text,
                "{:<8} {:<9} {:>8} {:>10} {:>10} {:>13} {:>13}",
                fault.fault,
                fault.nodes.join(","),
                fault.begin_ms,
                fault.restart_ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string()),
                fault.whole_after_ms,
                fault.longest_unwritable_ms,
                fault.longest_unreadable_ms
            );
        }
        let late = |fault: &&FaultReport| fault.restart_ms.is_some_and(|ms| ms > RESTART_MS_MAX);
        let late = self.faults.iter().filter(late).count();
        if late > 0 {
            let _ = writeln!(
                text,
                "{late} restarts took more than {RESTART_MS_MAX} ms: the machine is too busy for that fault"
            );
        }
        if self.passed() {
            text.push_str("no promise broken\n");
            return text;
        }
        for violation in &self.violations {
            let _ = writeln!(text, "BROKEN: {violation}");
        }
        if self.broken > self.violations.len() {
            let _ = writeln!(text, "and {} more", self.broken - self.violations.len());
        }
        let _ = writeln!(text, "again: {}", self.command);
        if let Some(folder) = &self.folder {
            let _ = writeln!(text, "logs and history: {}", folder.display());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::chaos::content::Run;

    fn ack(session: u128, end: u64) -> Record {
        let run = Run { write: 1, cells: 1 };
        Record {
            client: String::new(),
            node: String::new(),
            session: Uuid::from_u128(session),
            op: Op::Append { base: 0, run },
            begin: Duration::ZERO,
            end: Duration::from_millis(end),
            outcome: Outcome::Written { revision: 1, holders: Vec::new(), full: false },
        }
    }

    #[test]
    fn the_longest_wait_is_one_sessions_and_touches_the_fault() {
        let history = [ack(1, 100), ack(2, 150), ack(1, 400), ack(2, 200), ack(1, 5000)];
        let window = |from, to| (Duration::from_millis(from), Duration::from_millis(to));
        assert_eq!(millis(longest(&history, window(120, 180), written)), 300);
        assert_eq!(millis(longest(&history, window(390, 500), written)), 4600);
        assert_eq!(millis(longest(&history[..3], window(390, 450), written)), 300, "one that is still open");
        assert_eq!(millis(longest(&history, window(6000, 7000), written)), 6800);
        assert_eq!(
            millis(longest(&[], window(0, 10), written)),
            0,
            "nobody waits for a session that is not there"
        );
    }
}
