//! Whose process has failed, from what several nodes report to the leader.
//!
//! Every node reports whom it has not heard for long. The leader's [`Detector`] believes two, or in a cluster of two the
//! other one; one alone who misses a node that others hear is himself the odd one. A process that was taken for failed
//! and is heard again may return while it has what nobody else has. It keeps nothing across leaders: who
//! has just been elected waits for one fresh round. It reads no clock and sends nothing: events in, findings out.

use std::collections::{BTreeMap, BTreeSet};

use keepwarm_types::{Incarnation, Millis, NodeName, ShardId, Timestamp};

use super::entry::Entry;
use super::state::{Member, NodeStatus, Registry};

/// Who has not been heard, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unheard {
    /// Which node.
    pub node: NodeName,
    /// Which process of it the reporter knows.
    pub incarnation: Incarnation,
    /// Since when.
    pub silent: Millis,
}

/// What a process can do, as it says itself, beside holding what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fitness {
    /// Whether it can run sessions: a session runs where its owner is.
    pub leads: bool,
    /// Whether it can take copies of more shards: its disk takes what it is given.
    pub learns: bool,
}

impl Fitness {
    /// Of a process that nothing is wrong with.
    pub const WELL: Self = Self { leads: true, learns: true };
}

/// What one node has to say of its peers and of itself. Whoever is not listed was heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthReport {
    /// Who reports.
    pub from: NodeName,
    /// Which process of it.
    pub from_incarnation: Incarnation,
    /// Peers unheard for longer than [`DetectorSettings::suspect_after`].
    pub unheard: Vec<Unheard>,
    /// Peers that take the reporter's changes much more slowly than its other peers do, and for long.
    pub slow: Vec<Member>,
    /// What the reporter can do.
    pub fitness: Fitness,
    /// Shards that it has given to another replica, where their sessions have room: at most [`CEDED_MAX`]. They are not given
    /// back for the sake of equal shares.
    pub ceded: Vec<ShardId>,
}

impl HealthReport {
    /// Of a process that hears everybody, and that nothing is wrong with.
    #[must_use]
    pub const fn well(from: NodeName, from_incarnation: Incarnation) -> Self {
        Self {
            from,
            from_incarnation,
            unheard: Vec::new(),
            slow: Vec::new(),
            fitness: Fitness::WELL,
            ceded: Vec::new(),
        }
    }
}

/// Shards that one node has ceded: 1 KiB of each report.
pub const CEDED_MAX: usize = 256;

/// What the leader's plan has to go around.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    /// Of each pair the first alone does not hear the second: it leads no shard that needs both, for it could commit
    /// nothing there.
    pub apart: BTreeSet<(NodeName, NodeName)>,
    /// Who can run no session leads no shard that another could lead.
    pub not_leading: BTreeSet<NodeName>,
    /// Who can take no more copies is no learner.
    pub not_learning: BTreeSet<NodeName>,
    /// Who is much slower than others, and to whom: as many as it takes to declare a failure. It is replaced in the sets
    /// that one of these leads, where another node can take its place.
    pub slow: BTreeMap<NodeName, BTreeSet<NodeName>>,
    /// Who has ceded a shard: it is not given back for the sake of equal shares.
    pub ceded: BTreeMap<ShardId, BTreeSet<NodeName>>,
    /// Who runs a version whose primaries do not propose who leaves: the plan does it for them.
    pub not_parting: BTreeSet<NodeName>,
}

/// When silence counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetectorSettings {
    /// A peer unheard for this long may have failed.
    pub suspect_after: Millis,
    /// A report counts for this long.
    pub fresh_for: Millis,
    /// A node that is down for this long and has last copies is given up, as an operator would; never, where none.
    pub give_up_after: Option<Millis>,
}

impl Default for DetectorSettings {
    /// 400 ms are eight missed heartbeats of 50 ms; 300 ms six missed reports; nothing is given up by itself.
    fn default() -> Self {
        Self { suspect_after: Millis(400), fresh_for: Millis(300), give_up_after: None }
    }
}

/// What the detector is told.
#[derive(Debug, Clone)]
pub enum DetectorEvent<'a> {
    /// A node reports.
    Report(HealthReport),
    /// Time has passed; the registry as applied now.
    Tick(&'a Registry),
    /// A [`Finding::Failed`], [`Finding::Returned`] or [`Finding::Overdue`] was certainly not applied: it may be found again.
    NotApplied {
        /// The accused.
        node: NodeName,
        /// Which process of it.
        incarnation: Incarnation,
    },
}

/// What the detector concludes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// A process has failed: propose this [`Entry::Down`].
    Failed(Entry),
    /// A process that was taken for failed is well, and has last copies: propose this [`Entry::Return`].
    Returned(Entry),
    /// `accuser` alone does not hear `accused`, whom others hear: it shall not lead shards that need both. Said once;
    /// [`Detector::conditions`] has it for as long as it stands.
    Isolated {
        /// The odd one.
        accuser: NodeName,
        /// Whom it does not hear.
        accused: NodeName,
    },
    /// A process is much slower than others, say several. Said once; [`Detector::conditions`] has it for as long as it stands.
    Slow {
        /// Which one.
        member: Member,
        /// Who says so.
        observers: Vec<NodeName>,
    },
    /// A node with last copies is down for longer than [`DetectorSettings::give_up_after`]: give it up.
    Overdue {
        /// Which node.
        node: NodeName,
        /// Which process of it.
        incarnation: Incarnation,
    },
}

type Process = (NodeName, Incarnation);

/// The leader's view of everybody's view.
#[derive(Debug)]
pub struct Detector {
    settings: DetectorSettings,
    since: Timestamp,
    settled: bool,
    reports: BTreeMap<NodeName, (Timestamp, HealthReport)>,
    proposed: BTreeSet<Process>,
    returned: BTreeSet<Process>,
    isolated: BTreeSet<(Process, Process)>,
    slow: BTreeMap<Member, Vec<NodeName>>,
    /// Since when this leader knows that they are down.
    down: BTreeMap<Process, Timestamp>,
}

impl Detector {
    /// Of a leader elected at `now`.
    #[must_use]
    pub const fn new(settings: DetectorSettings, now: Timestamp) -> Self {
        Self {
            settings,
            since: now,
            settled: false,
            reports: BTreeMap::new(),
            proposed: BTreeSet::new(),
            returned: BTreeSet::new(),
            isolated: BTreeSet::new(),
            slow: BTreeMap::new(),
            down: BTreeMap::new(),
        }
    }

    /// Whether everybody has been heard, or had the time to be: what is planned before that goes around nothing.
    #[must_use]
    pub const fn settled(&self) -> bool {
        self.settled
    }

    /// What [`plan_under`](super::plan_under) goes around, as of the last tick.
    #[must_use]
    pub fn conditions(&self) -> Conditions {
        let pair = |(accuser, accused): &(Process, Process)| (accuser.0.clone(), accused.0.clone());
        let who = |unfit: fn(&Fitness) -> bool| {
            let reports = self.reports.values().map(|(_, report)| report);
            reports.filter(|report| unfit(&report.fitness)).map(|report| report.from.clone()).collect()
        };
        let mut ceded: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (_, report) in self.reports.values() {
            for shard in &report.ceded {
                ceded.entry(*shard).or_default().insert(report.from.clone());
            }
        }
        Conditions {
            apart: self.isolated.iter().map(pair).collect(),
            not_leading: who(|fitness| !fitness.leads),
            not_learning: who(|fitness| !fitness.learns),
            slow: self
                .slow
                .iter()
                .map(|(member, to)| (member.node.clone(), to.iter().cloned().collect()))
                .collect(),
            ceded,
            not_parting: BTreeSet::new(),
        }
    }

    /// Takes an event; concludes on ticks alone.
    pub fn on(&mut self, now: Timestamp, event: DetectorEvent<'_>) -> Vec<Finding> {
        match event {
            DetectorEvent::Report(report) => {
                let older =
                    |known: &(Timestamp, HealthReport)| known.1.from_incarnation > report.from_incarnation;
                if !self.reports.get(&report.from).is_some_and(older) {
                    self.reports.insert(report.from.clone(), (now, report));
                }
                Vec::new()
            }
            DetectorEvent::NotApplied { node, incarnation } => {
                let process = (node, incarnation);
                self.down.remove(&process);
                self.proposed.remove(&process);
                self.returned.remove(&process);
                Vec::new()
            }
            DetectorEvent::Tick(registry) => self.conclude(now, registry),
        }
    }

    fn conclude(&mut self, now: Timestamp, registry: &Registry) -> Vec<Finding> {
        let live: BTreeMap<&NodeName, Incarnation> = registry
            .nodes()
            .iter()
            .filter(|node| node.status != NodeStatus::Down)
            .map(|node| (&node.registration.node, node.incarnation))
            .collect();
        self.forget(&live, registry);
        let mut findings = self.overdue(now, registry);
        findings.extend(self.dawdling(&live, registry));
        let (fresh, of_down): (Vec<_>, Vec<_>) = self
            .reports
            .values()
            .filter(|(at, _)| now.since(*at) <= self.settings.fresh_for)
            .map(|(_, report)| report)
            .partition(|report| live.get(&report.from) == Some(&report.from_incarnation));
        // One round: everybody has reported, is missed by somebody who has, or had the time to.
        let spoken_of = |node: &NodeName| {
            fresh.iter().any(|report| {
                report.from == *node || report.unheard.iter().any(|unheard| unheard.node == *node)
            })
        };
        self.settled |=
            live.keys().all(|node| spoken_of(node)) || now.since(self.since) >= self.settings.fresh_for;
        if !self.settled {
            return findings;
        }
        for report in of_down {
            let process = (report.from.clone(), report.from_incarnation);
            let known = registry.node(&process.0).is_some_and(|node| node.incarnation == process.1);
            // It speaks, and whoever else does hears it.
            let missed =
                |other: &&HealthReport| other.unheard.iter().any(|unheard| unheard.node == process.0);
            let well = !fresh.is_empty() && !fresh.iter().any(missed);
            if known && well && registry.holds(&process.0) && self.returned.insert(process.clone()) {
                let (node, incarnation) = process;
                findings.push(Finding::Returned(Entry::Return { node, incarnation }));
            }
        }
        let mut accused: BTreeMap<&NodeName, Vec<(&NodeName, Millis)>> = BTreeMap::new();
        for report in &fresh {
            for unheard in &report.unheard {
                let present = live.get(&unheard.node) == Some(&unheard.incarnation);
                if present
                    && unheard.node != report.from
                    && unheard.silent >= self.settings.suspect_after
                    && let Some((name, _)) = live.get_key_value(&unheard.node)
                {
                    accused.entry(name).or_default().push((&report.from, unheard.silent));
                }
            }
        }
        for (node, accusers) in accused {
            let incarnation = live[node];
            if accusers.len() >= registry.observers_needed() {
                if self.proposed.insert((node.clone(), incarnation)) {
                    let observers = accusers.iter().map(|(name, _)| (*name).clone()).collect();
                    findings.push(Finding::Failed(Entry::Down {
                        node: node.clone(),
                        incarnation,
                        observers,
                    }));
                }
                continue;
            }
            let [(accuser, silent)] = accusers[..] else { continue };
            // By then every other report would name the accused too, if it had failed.
            let sure = Millis(self.settings.suspect_after.0 + 2 * self.settings.fresh_for.0);
            let heard = fresh.iter().any(|report| report.from != *accuser && report.from != *node);
            let pair = ((accuser.clone(), live[accuser]), (node.clone(), incarnation));
            if heard && silent >= sure && self.isolated.insert(pair) {
                findings.push(Finding::Isolated { accuser: accuser.clone(), accused: node.clone() });
            }
        }
        findings
    }

    /// Who is slow by the word of enough others, as far as that is new.
    fn dawdling(&mut self, live: &BTreeMap<&NodeName, Incarnation>, registry: &Registry) -> Vec<Finding> {
        let mut named: BTreeMap<&Member, Vec<NodeName>> = BTreeMap::new();
        for (_, report) in self.reports.values() {
            let speaks = live.get(&report.from) == Some(&report.from_incarnation);
            for member in report.slow.iter().filter(|member| speaks && member.node != report.from) {
                if live.get(&member.node) == Some(&member.incarnation) {
                    named.entry(member).or_default().push(report.from.clone());
                }
            }
        }
        named.retain(|_, observers| observers.len() >= registry.observers_needed());
        let named: BTreeMap<_, _> = named.into_iter().map(|(member, by)| (member.clone(), by)).collect();
        let before = std::mem::replace(&mut self.slow, named.clone());
        let new = named.into_iter().filter(|(member, _)| !before.contains_key(member));
        new.map(|(member, observers)| Finding::Slow { member, observers }).collect()
    }

    /// Nodes with last copies that are down for too long, each once.
    fn overdue(&mut self, now: Timestamp, registry: &Registry) -> Vec<Finding> {
        let Some(give_up_after) = self.settings.give_up_after else { return Vec::new() };
        let mut down = BTreeMap::new();
        let mut findings = Vec::new();
        for node in registry.nodes().iter().filter(|node| node.status == NodeStatus::Down) {
            let (name, incarnation) = (&node.registration.node, node.incarnation);
            let process = (name.clone(), incarnation);
            let mut since = self.down.get(&process).copied().unwrap_or(now);
            if since != Timestamp::NEVER && now.since(since) >= give_up_after {
                since = Timestamp::NEVER;
                if registry.holds(name) {
                    findings.push(Finding::Overdue { node: name.clone(), incarnation });
                }
            }
            down.insert(process, since);
        }
        self.down = down;
        findings
    }

    /// Drops what was of processes that are no more, and of accusations that were taken back.
    fn forget(&mut self, live: &BTreeMap<&NodeName, Incarnation>, registry: &Registry) {
        let present = |(node, incarnation): &Process| live.get(node) == Some(incarnation);
        self.reports.retain(|name, (_, report)| {
            registry.node(name).is_some_and(|node| node.incarnation <= report.from_incarnation)
        });
        self.proposed.retain(present);
        self.returned.retain(|(node, incarnation)| {
            !live.contains_key(node)
                && registry.node(node).is_some_and(|known| known.incarnation == *incarnation)
        });
        let reports = &self.reports;
        self.isolated.retain(|(accuser, accused)| {
            let stands = |unheard: &Unheard| unheard.node == accused.0 && unheard.incarnation == accused.1;
            let still = reports.get(&accuser.0).is_some_and(|(_, report)| report.unheard.iter().any(stands));
            present(accuser) && present(accused) && still
        });
    }
}
