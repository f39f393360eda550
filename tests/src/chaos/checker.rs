//! What a history must be: nothing acknowledged is lost, no reader goes back, no bytes are mixed, a "no" stays one.
//!
//! Each write has bytes of its own and demands the revision that it follows, so a revision has one content, and the
//! content names every write in it. What a call says holds for each call that begins after it has ended.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use super::content::Run;
use super::history::{Kill, Op, Outcome, Record};

/// Copies that the cluster promises of each session.
pub const REPLICATION: usize = 2;
/// Why bytes may be gone: nothing else happens in these runs.
const COLD_REASONS: [&str; 2] = ["restarted", "holders_lost"];

/// Which promise was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Promise {
    /// An acknowledged revision was not there any more.
    Lost,
    /// A reader saw an earlier revision than one that was seen before it asked.
    WentBack,
    /// Bytes of several revisions, of another session, or that nobody wrote.
    Mixed,
    /// A write that was answered "not applied" was.
    AppliedNo,
    /// One revision had two contents, or one write two revisions.
    TwoContents,
    /// Bytes were gone though not all of their holders had been killed, or for a reason that was not there.
    Cold,
    /// An acknowledgement named fewer copies than promised, and called them full.
    Copies,
    /// A write that was repeated with its id did not get its first answer again.
    Repeated,
    /// An answer that the contract does not know here.
    Strange,
    /// Something that had to happen did not in time.
    StoodStill,
}

/// A broken promise, with its witness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    pub promise: Promise,
    pub session: Option<Uuid>,
    pub at_ms: u64,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {} ms: {}", self.promise, self.at_ms, self.what)?;
        self.session.map_or(Ok(()), |session| write!(f, " (session {session})"))
    }
}

/// What is known of a write, over all its sendings.
#[derive(Debug, Clone, Copy)]
struct Write {
    base: u64,
    run: Run,
    put: bool,
    begun: Duration,
    /// Whether some sending was not answered "no".
    possible: bool,
    /// Whether some sending was answered that the session is at another revision.
    stale: bool,
}

#[derive(Default)]
struct Session<'h> {
    writes: HashMap<u64, Write>,
    /// What each revision has, as far as an answer or a reader said.
    contents: BTreeMap<u64, Vec<Run>>,
    /// Which write made a revision.
    makers: BTreeMap<u64, u64>,
    records: Vec<&'h Record>,
    found: Vec<Violation>,
}

/// The promises that a history breaks, in the order of time. Bytes may be gone once each node that held them, as the last
/// acknowledgement had said, was killed.
#[must_use]
pub fn check(history: &[Record], kills: &[Kill]) -> Vec<Violation> {
    let mut sessions: BTreeMap<Uuid, Session<'_>> = BTreeMap::new();
    for record in history {
        sessions.entry(record.session).or_default().records.push(record);
    }
    let mut found: Vec<_> = sessions.into_values().flat_map(|session| session.check(kills)).collect();
    found.sort_by_key(|violation| violation.at_ms);
    found
}

impl Session<'_> {
    fn check(mut self, kills: &[Kill]) -> Vec<Violation> {
        self.learn_writes();
        for record in self.records.clone() {
            match &record.outcome {
                Outcome::Bytes { revision, runs } => self.bytes(record, *revision, runs),
                Outcome::Written { revision, holders, full } => {
                    self.acknowledged(record, *revision);
                    if *full && holders.len() < REPLICATION {
                        self.tell(Promise::Copies, record, format!("{holders:?} are called all copies"));
                    }
                }
                Outcome::Seen { cold: Some(reason), .. } | Outcome::Cold(reason) => {
                    self.cold(record, reason, kills);
                }
                Outcome::Missing(why) => self.tell(Promise::Lost, record, why),
                Outcome::Broken(why) => self.tell(Promise::Strange, record, why),
                Outcome::Seen { .. } | Outcome::No { .. } | Outcome::Unknown(_) => {}
            }
        }
        self.order();
        self.revisions_have_writes();
        self.repeated();
        self.found
    }

    fn tell(&mut self, promise: Promise, record: &Record, what: impl fmt::Display) {
        self.found.push(Violation {
            promise,
            session: Some(record.session),
            at_ms: u64::try_from(record.end.as_millis()).unwrap_or(u64::MAX),
            what: format!("{} through {}: {what}", record.client, record.node),
        });
    }

    fn learn_writes(&mut self) {
        for record in &self.records {
            let (base, run, put) = match record.op {
                Op::Append { base, run } => (base, run, false),
                Op::Put { base, run } => (base, run, true),
                Op::Read | Op::Look => continue,
            };
            let fresh = Write { base, run, put, begun: record.begin, possible: false, stale: false };
            let write = self.writes.entry(run.write).or_insert(fresh);
            write.begun = write.begun.min(record.begin);
            match record.outcome {
                Outcome::No { stale, .. } => write.stale |= stale,
                _ => write.possible = true,
            }
        }
    }

    /// An acknowledgement: the write made this revision, and no other did.
    fn acknowledged(&mut self, record: &Record, revision: u64) {
        let (Op::Append { base, run } | Op::Put { base, run }) = record.op else { return };
        if revision != base + 1 {
            self.tell(
                Promise::TwoContents,
                record,
                format!("write {} on revision {base} became {revision}", run.write),
            );
        }
        self.made(record, revision, run.write);
    }

    fn made(&mut self, record: &Record, revision: u64, write: u64) {
        match self.makers.insert(revision, write) {
            Some(other) if other != write => self.tell(
                Promise::TwoContents,
                record,
                format!("revision {revision} is of write {write}, and of write {other} too"),
            ),
            _ => {}
        }
    }

    /// Bytes of a revision: they are one write's upon another's, from the last replacement on.
    fn bytes(&mut self, record: &Record, revision: u64, runs: &[Run]) {
        let (mut at, mut rest) = (revision, runs);
        loop {
            match self.contents.get(&at) {
                Some(known) if known == rest => return,
                Some(known) => {
                    let what = format!("revision {at} is {rest:?}, and was {known:?} to another reader");
                    return self.tell(Promise::TwoContents, record, what);
                }
                None => {}
            }
            self.contents.insert(at, rest.to_vec());
            let Some((last, before)) = rest.split_last() else {
                return self.tell(Promise::Mixed, record, format!("revision {at} has no bytes"));
            };
            let Some(write) = self.writes.get(&last.write).copied() else {
                return self.tell(Promise::Mixed, record, format!("nobody made write {}", last.write));
            };
            if !write.possible {
                let what = format!("write {} was answered \"no\" and is in revision {at}", last.write);
                return self.tell(Promise::AppliedNo, record, what);
            }
            if write.run != *last || write.base + 1 != at || write.begun > record.end {
                let what = format!("{last:?} stands last in revision {at}, but was {write:?}");
                return self.tell(Promise::Mixed, record, what);
            }
            self.made(record, at, last.write);
            if write.put {
                if !before.is_empty() {
                    let what = format!("write {} replaced all, yet {before:?} is before it", last.write);
                    self.tell(Promise::Mixed, record, what);
                }
                return;
            }
            (at, rest) = (write.base, before);
        }
    }

    /// The bytes are gone. They were where the last write said that was acknowledged before this call began.
    fn cold(&mut self, record: &Record, reason: &str, kills: &[Kill]) {
        if !COLD_REASONS.contains(&reason) {
            return self.tell(Promise::Cold, record, format!("its bytes are gone for '{reason}'"));
        }
        // A sending that was repeated tells what the first one did, whose bytes may have gone since.
        let acknowledged = self.records.iter().copied().filter(|write| write.end < record.begin);
        let acknowledged = acknowledged.filter_map(|write| {
            let (Op::Append { run, .. } | Op::Put { run, .. }) = write.op else { return None };
            let Outcome::Written { revision, holders, .. } = &write.outcome else { return None };
            Some((*revision, self.writes[&run.write].begun, holders))
        });
        let Some((revision, begun, holders)) = acknowledged.max_by_key(|(revision, ..)| *revision) else {
            return;
        };
        let killed = |holder: &&String| {
            kills
                .iter()
                .any(|kill| kill.end > begun && kill.begin < record.end && kill.nodes.contains(holder))
        };
        let alive: Vec<_> = holders.iter().filter(|holder| !killed(holder)).collect();
        if !alive.is_empty() {
            let what =
                format!("the bytes are gone, and {alive:?} that had revision {revision} were not killed");
            self.tell(Promise::Cold, record, what);
        }
    }

    /// Each revision up to one that somebody saw is a write's that was sent before and not answered "no".
    fn revisions_have_writes(&mut self) {
        let mut begun: BTreeMap<u64, Duration> = BTreeMap::new();
        for write in self.writes.values().filter(|write| write.possible) {
            let first = begun.entry(write.base + 1).or_insert(write.begun);
            *first = (*first).min(write.begun);
        }
        let mut known = 0;
        for record in self.records.clone() {
            let (Outcome::Bytes { revision: seen, .. } | Outcome::Seen { revision: seen, .. }) =
                record.outcome
            else {
                continue;
            };
            for revision in known + 1..=seen {
                if begun.get(&revision).is_some_and(|begun| *begun <= record.end) {
                    continue;
                }
                let refused = self.writes.values().any(|write| write.base + 1 == revision);
                if refused {
                    let what = format!("revision {revision} is there, whose every write was answered \"no\"");
                    self.tell(Promise::AppliedNo, record, what);
                } else {
                    self.tell(Promise::Strange, record, format!("nobody wrote revision {revision}"));
                }
            }
            known = known.max(seen);
        }
    }

    /// A write that was applied cannot be told that the session is at another revision: its id gives its first answer.
    fn repeated(&mut self) {
        for record in self.records.clone() {
            let (Op::Append { base, run } | Op::Put { base, run }) = record.op else { continue };
            let applied = self.makers.get(&(base + 1)) == Some(&run.write);
            if applied && matches!(record.outcome, Outcome::No { stale: true, .. }) {
                let what = format!(
                    "write {} made revision {}, and was answered {:?}",
                    run.write,
                    base + 1,
                    record.outcome
                );
                self.tell(Promise::Repeated, record, what);
            }
        }
    }

    /// In real time: what a call said is the least that a call says that began after it.
    fn order(&mut self) {
        let told = |record: &Record| match record.outcome {
            Outcome::Written { revision, .. } => Some((revision, true)),
            Outcome::Bytes { revision, .. } | Outcome::Seen { revision, .. } => Some((revision, false)),
            _ => None,
        };
        let mut ends: Vec<_> =
            self.records.iter().filter_map(|record| Some((record.end, told(record)?))).collect();
        ends.sort_unstable();
        let mut begins = self.records.clone();
        begins.sort_by_key(|record| record.begin);
        let (mut ended, mut acknowledged, mut seen) = (ends.into_iter().peekable(), 0, 0);
        for record in begins {
            while let Some((_, (revision, write))) = ended.next_if(|(end, _)| *end < record.begin) {
                seen = seen.max(revision);
                if write {
                    acknowledged = acknowledged.max(revision);
                }
            }
            // A repeated write is answered with the revision that it made at first.
            let Some((revision, false)) = told(record) else { continue };
            if revision < acknowledged {
                let what = format!("revision {acknowledged} was acknowledged before, {revision} is there");
                self.tell(Promise::Lost, record, what);
            } else if revision < seen {
                let what = format!("revision {seen} was seen before, {revision} is there");
                self.tell(Promise::WentBack, record, what);
            }
        }
    }
}

#[cfg(test)]
#[path = "checker/tests.rs"]
mod tests;
