//! What clients did and were answered: one record a call, in the order in which the calls ended.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::content::Run;

/// Most records of a run: some 250 bytes each, so half a gigabyte. A run that would need more cannot be judged.
const RECORDS_MAX: usize = 2_000_000;

/// What was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Cells behind the `base` revision's; an unclear call may be sent again, with the same number and write id.
    Append { base: u64, run: Run },
    /// Cells in place of the `base` revision's.
    Put { base: u64, run: Run },
    /// The part's bytes.
    Read,
    /// The session's revision and state.
    Look,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Acknowledged, as this revision, whose bytes these nodes have.
    Written { revision: u64, holders: Vec<String>, full: bool },
    /// The part's bytes at a revision, as the writes that they come from.
    Bytes { revision: u64, runs: Vec<Run> },
    /// The session at a revision; with the reason why its bytes are gone, where they are.
    Seen { revision: u64, cold: Option<String> },
    /// The part's bytes are gone, for this reason.
    Cold(String),
    /// There is no such session (any more).
    Missing(String),
    /// Definitely not carried out; `stale` where the answer says that the session is at another revision.
    No { stale: bool, why: String },
    /// Nobody knows, of a write; no answer, of a read.
    Unknown(String),
    /// An answer that no promise covers.
    Broken(String),
}

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub client: String,
    pub node: String,
    pub session: Uuid,
    pub op: Op,
    /// Since the run began.
    pub begin: Duration,
    pub end: Duration,
    pub outcome: Outcome,
}

fn runs(runs: &[Run]) -> Value {
    runs.iter().map(|run| json!([run.write, run.cells])).collect()
}

impl Record {
    /// As a line of `history.jsonl`.
    #[must_use]
    pub fn json(&self) -> Value {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let mut value = json!({
            "client": self.client, "node": self.node, "session": self.session,
            "begin_us": micros(self.begin), "end_us": micros(self.end),
        });
        match &self.op {
            Op::Append { base, run } => {
                (value["op"], value["base"], value["run"]) = ("append".into(), (*base).into(), runs(&[*run]));
            }
            Op::Put { base, run } => {
                (value["op"], value["base"], value["run"]) = ("put".into(), (*base).into(), runs(&[*run]));
            }
            Op::Read => value["op"] = "read".into(),
            Op::Look => value["op"] = "look".into(),
        }
        let (word, detail) = match &self.outcome {
            Outcome::Written { revision, holders, full } => {
                ("ok", json!({"revision": revision, "holders": holders, "full": full}))
            }
            Outcome::Bytes { revision, runs: found } => {
                ("ok", json!({"revision": revision, "runs": runs(found)}))
            }
            Outcome::Seen { revision, cold } => ("ok", json!({"revision": revision, "cold": cold})),
            Outcome::Cold(reason) => ("cold", reason.as_str().into()),
            Outcome::Missing(why) => ("missing", why.as_str().into()),
            Outcome::No { why, .. } => ("no", why.as_str().into()),
            Outcome::Unknown(why) => ("unknown", why.as_str().into()),
            Outcome::Broken(why) => ("broken", why.as_str().into()),
        };
        (value["outcome"], value["detail"]) = (word.into(), detail);
        value
    }
}

/// Counts of a history so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Writes that were acknowledged.
    pub acknowledged: u64,
    /// Writes that were definitely not carried out.
    pub refused: u64,
    /// Writes of which nobody said.
    pub unknown: u64,
    /// Reads that were answered.
    pub reads: u64,
    /// Reads that were not.
    pub unanswered: u64,
}

impl Counts {
    fn take(&mut self, record: &Record) {
        let write = matches!(record.op, Op::Append { .. } | Op::Put { .. });
        match (&record.outcome, write) {
            (Outcome::Written { .. }, _) => self.acknowledged += 1,
            (Outcome::No { .. } | Outcome::Missing(_), true) => self.refused += 1,
            (Outcome::Unknown(_) | Outcome::Broken(_), true) => self.unknown += 1,
            (Outcome::No { .. } | Outcome::Unknown(_) | Outcome::Broken(_), false) => self.unanswered += 1,
            (Outcome::Bytes { .. } | Outcome::Seen { .. } | Outcome::Cold(_) | Outcome::Missing(_), _) => {
                self.reads += 1;
            }
        }
    }
}

/// Processes that were killed, and when: none of them held anything in memory any more from `end` on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kill {
    pub nodes: Vec<String>,
    pub begin: Duration,
    pub end: Duration,
}

/// Records of all clients, and one clock for them.
#[derive(Debug)]
pub struct History {
    clock: Clock,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
enum Clock {
    /// The time since then.
    Real(Instant),
    /// What whoever moves the time has written: microseconds.
    Told(Arc<AtomicU64>),
}

#[derive(Debug, Default)]
struct Kept {
    records: Vec<Record>,
    kills: Vec<Kill>,
    counts: Counts,
    full: bool,
}

impl Default for History {
    fn default() -> Self {
        Self { clock: Clock::Real(Instant::now()), kept: Mutex::default() }
    }
}

impl History {
    #[must_use]
    pub fn now(&self) -> Duration {
        match &self.clock {
            Clock::Real(begun) => begun.elapsed(),
            Clock::Told(micros) => Duration::from_micros(micros.load(Ordering::SeqCst)),
        }
    }

    /// A history whose time somebody tells, in microseconds.
    #[must_use]
    pub fn told(micros: Arc<AtomicU64>) -> Self {
        Self { clock: Clock::Told(micros), kept: Mutex::default() }
    }

    pub fn add(&self, record: Record) {
        let mut kept = self.kept.lock().unwrap();
        if kept.records.len() >= RECORDS_MAX {
            kept.full = true;
            return;
        }
        kept.counts.take(&record);
        kept.records.push(record);
    }

    /// Notes a kill that was begun then and is done now.
    pub fn killed(&self, nodes: Vec<String>, begin: Duration) {
        let kill = Kill { nodes, begin, end: self.now() };
        self.kept.lock().unwrap().kills.push(kill);
    }

    /// # Errors
    /// Calls that were not recorded: nothing can be said of a history with holes.
    pub fn whole(&self) -> Result<(), String> {
        if self.kept.lock().unwrap().full {
            return Err(format!("more than {RECORDS_MAX} calls: make the run shorter, or several of them"));
        }
        Ok(())
    }

    #[must_use]
    pub fn counts(&self) -> Counts {
        self.kept.lock().unwrap().counts
    }

    /// Looks at all records and kills so far.
    pub fn with<T>(&self, look: impl FnOnce(&[Record], &[Kill]) -> T) -> T {
        let kept = self.kept.lock().unwrap();
        look(&kept.records, &kept.kills)
    }
}
