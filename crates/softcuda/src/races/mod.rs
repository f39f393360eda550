//! The race detector: vector clocks of the host and of each stream, and per byte range who wrote and read last.
//!
//! An operation's clock is fixed when it is issued: what its stream did before, what the host knew, what it waits
//! for. Its accesses are checked when it runs, which is in an order that the clocks allow; so a missing wait is found
//! whether or not the timing happened to be kind. The host is one agent: what one of its threads has waited for,
//! all of them know, since locks and channels between them cannot be seen from here.

mod shadow;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::Serialize;

use crate::locks::lock;
use crate::memory::space::Allocation;
use crate::report;
use shadow::Shadow;

/// Races that are kept for the statistics; more are counted.
const REPORTS_MAX: usize = 256;
/// Place of the host in clocks.
pub(crate) const HOST: usize = 0;

/// What happens when a race is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    Off,
    Report,
    Abort,
}

/// How much of each agent's work is known to be over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Clock(Vec<u64>);

impl Clock {
    fn get(&self, agent: usize) -> u64 {
        self.0.get(agent).copied().unwrap_or_default()
    }

    fn advance(&mut self, agent: usize) -> u64 {
        if self.0.len() <= agent {
            self.0.resize(agent + 1, 0);
        }
        self.0[agent] += 1;
        self.0[agent]
    }

    fn join(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = (*mine).max(*theirs);
        }
    }
}

/// An operation as the detector sees it.
#[derive(Debug)]
pub(crate) struct Stamp {
    pub(crate) agent: usize,
    pub(crate) count: u64,
    pub(crate) clock: Clock,
    pub(crate) symbol: &'static str,
    /// What kernel, where it is one.
    pub(crate) detail: Option<String>,
    pub(crate) device: usize,
    pub(crate) stream: u32,
    pub(crate) sequence: u64,
}

impl Stamp {
    /// Whether this happened before what has that clock.
    fn before(&self, clock: &Clock) -> bool {
        self.count <= clock.get(self.agent)
    }

    /// As reports name it.
    pub(crate) fn name(&self) -> String {
        let detail = self.detail.as_deref().map(|name| format!(" {name}")).unwrap_or_default();
        if self.agent == HOST {
            return format!("{} (host)", self.symbol);
        }
        format!(
            "{}{detail} #{} on stream {} of device {}",
            self.symbol, self.sequence, self.stream, self.device
        )
    }
}

/// How an operation touches bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    /// Two of these do not conflict.
    Atomic,
}

/// Two operations that nothing orders.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Race {
    pub(crate) earlier: String,
    pub(crate) later: String,
    pub(crate) kind: String,
    /// Where in its allocation, and how much.
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
    pub(crate) allocation: String,
}

#[derive(Debug, Default)]
struct Clocks {
    host: Clock,
    agents: HashMap<usize, Clock>,
    free: Vec<usize>,
    next: usize,
    /// Where each agent's count has come to, so that a slot's next owner goes on from there.
    counts: Clock,
}

/// The detector of a process.
#[derive(Debug)]
pub(crate) struct Detector {
    policy: Policy,
    clocks: Mutex<Clocks>,
    shadows: Mutex<HashMap<u64, Shadow>>,
    found: Mutex<VecDeque<Race>>,
    count: AtomicU64,
    forgotten: AtomicU64,
}

impl Detector {
    pub(crate) fn new(policy: Policy) -> Self {
        let clocks = Clocks { next: HOST + 1, ..Clocks::default() };
        Self {
            policy,
            clocks: Mutex::new(clocks),
            shadows: Mutex::default(),
            found: Mutex::default(),
            count: AtomicU64::new(0),
            forgotten: AtomicU64::new(0),
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.policy != Policy::Off
    }

    /// A place in clocks for a new stream.
    pub(crate) fn agent(&self) -> usize {
        let mut clocks = lock(&self.clocks);
        if let Some(agent) = clocks.free.pop() {
            return agent;
        }
        clocks.next += 1;
        clocks.next - 1
    }

    /// The stream is gone; its place is another's.
    pub(crate) fn retire(&self, agent: usize) {
        let mut clocks = lock(&self.clocks);
        clocks.agents.remove(&agent);
        clocks.free.push(agent);
    }

    /// The clock of an operation that is being issued, after what its stream, the host and `after` know.
    pub(crate) fn issue(&self, agent: usize, after: &[Clock], implicit: &[usize]) -> (u64, Clock) {
        let mut clocks = lock(&self.clocks);
        let mut clock = clocks.agents.remove(&agent).unwrap_or_default();
        clock.join(&clocks.host);
        for other in implicit {
            if let Some(other) = clocks.agents.get(other) {
                clock.join(other);
            }
        }
        for other in after {
            clock.join(other);
        }
        let reached = clocks.counts.advance(agent);
        if clock.0.len() <= agent {
            clock.0.resize(agent + 1, 0);
        }
        clock.0[agent] = reached;
        clocks.agents.insert(agent, clock.clone());
        clocks.host.advance(HOST);
        (reached, clock)
    }

    /// What a stream has issued so far.
    pub(crate) fn reached(&self, agent: usize) -> Clock {
        lock(&self.clocks).agents.get(&agent).cloned().unwrap_or_default()
    }

    /// The host knows what that clock knows.
    pub(crate) fn host_knows(&self, clock: &Clock) {
        lock(&self.clocks).host.join(clock);
    }

    /// The stamp of something that the host itself does now.
    pub(crate) fn host_stamp(&self, symbol: &'static str) -> Arc<Stamp> {
        let mut clocks = lock(&self.clocks);
        let count = clocks.host.advance(HOST);
        let clock = clocks.host.clone();
        drop(clocks);
        Arc::new(Stamp {
            agent: HOST,
            count,
            clock,
            symbol,
            detail: None,
            device: 0,
            stream: 0,
            sequence: count,
        })
    }

    /// An operation touches a range of a live allocation.
    pub(crate) fn access(
        &self,
        stamp: &Arc<Stamp>,
        allocation: &Allocation,
        range: (usize, usize),
        access: Access,
    ) {
        if self.policy == Policy::Off || range.1 == 0 {
            return;
        }
        let offset = range.0 - allocation.start;
        let mut shadows = lock(&self.shadows);
        let shadow = shadows.entry(allocation.id).or_default();
        let conflict = shadow.access(stamp, offset, offset + range.1, access);
        if shadow.is_full() {
            *shadow = Shadow::default();
            self.forgotten.fetch_add(1, Ordering::Relaxed);
        }
        drop(shadows);
        if let Some((other, kind, start, end)) = conflict {
            self.report(Race {
                earlier: other.name(),
                later: stamp.name(),
                kind: kind.to_owned(),
                offset: start,
                bytes: end - start,
                allocation: format!(
                    "{:?} allocation {} of {} bytes",
                    allocation.place, allocation.id, allocation.bytes
                ),
            });
        }
    }

    /// The allocation is gone, and its history with it.
    pub(crate) fn forget(&self, allocation: &Allocation) {
        lock(&self.shadows).remove(&allocation.id);
    }

    /// Tells of a race, and keeps it.
    pub(crate) fn report(&self, race: Race) {
        self.count.fetch_add(1, Ordering::Relaxed);
        report::say(&format!(
            "race ({}): {} and {}: nothing orders them, at bytes {}..{} of {}",
            race.kind,
            race.earlier,
            race.later,
            race.offset,
            race.offset + race.bytes,
            race.allocation
        ));
        if self.policy == Policy::Abort {
            std::process::abort();
        }
        let mut found = lock(&self.found);
        if found.len() < REPORTS_MAX {
            found.push_back(race);
        }
    }

    /// Found so far, how many there were, and how often an allocation's history was dropped for its length.
    pub(crate) fn found(&self) -> (Vec<Race>, u64, u64) {
        let found = lock(&self.found).iter().cloned().collect();
        (found, self.count.load(Ordering::Relaxed), self.forgotten.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests;
