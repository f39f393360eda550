//! What the leader does: listen to reports, declare failures, and carry out the plan.
//!
//! The loop runs on every voter and acts only while that leads. One plan at a time: the next is made when all entries
//! of the one before have been answered, and only if something has changed since.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use keepwarm_core::registry::{
    Conditions, Detector, DetectorEvent, Entry, Finding, HealthReport, Registry, Response, plan_under,
};
use keepwarm_types::{Incarnation, NodeName};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::propose::Tried;
use crate::shared::{Shared, wall};
use crate::wire::{Answer, Request};

/// Entries of one plan: a few milliseconds of the log.
const PLAN_MAX: usize = 64;
/// An entry of the leader's own is agreed upon within this, or tried again.
const ENTRY_DEADLINE: Duration = Duration::from_secs(2);
/// A report that takes longer to the leader is overtaken by the next.
const REPORT_DEADLINE: Duration = Duration::from_millis(200);
/// Reports on their way at once: one to a leader that does not answer must not hold up the next, to another.
const SENDING_MAX: usize = 4;
/// From this version on a primary proposes who leaves its sets.
const PARTING_SINCE: u16 = 2;
/// The group is compared with the spec this often.
const GROUP_CHECK: Duration = Duration::from_secs(1);

/// What a task of the leader came to.
enum Outcome {
    /// A plan's entries were all answered; or some were not, and it must be made again.
    Planned {
        answered: bool,
    },
    /// A failure, or the end of one, was declared, or certainly was not.
    Declared {
        node: NodeName,
        incarnation: Incarnation,
        applied: bool,
    },
    Tended,
    Reported,
}

/// The loop's state while this node leads.
struct Leading {
    detector: Detector,
    /// What the last plan was made for: a version, and what it went around.
    planned_for: Option<(u64, Conditions)>,
    planning: bool,
}

impl Shared {
    pub(crate) async fn lead(self: Arc<Self>, mut reports: mpsc::Receiver<HealthReport>) {
        let mut ticks = interval(self.settings.timers.tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tasks: JoinSet<Outcome> = JoinSet::new();
        let mut leading: Option<Leading> = None;
        let mut sending = 0;
        let mut turn = 0;
        let mut waiting: Option<HealthReport> = None;
        let mut group_at = Instant::now();
        loop {
            tokio::select! {
                report = reports.recv() => match report {
                    Some(report) if self.leads() => {
                        if let Some(leading) = &mut leading {
                            leading.detector.on(self.now(), DetectorEvent::Report(report));
                        }
                    }
                    // To somebody else; only the newest of this node's own counts.
                    Some(report) if report.from == self.settings.node => waiting = Some(report),
                    Some(_) => {}
                    None => return,
                },
                Some(outcome) = tasks.join_next() => match (outcome, &mut leading) {
                    (Ok(Outcome::Reported), _) => sending -= 1,
                    (Ok(Outcome::Planned { answered }), Some(leading)) => {
                        leading.planning = false;
                        leading.planned_for = leading.planned_for.take().filter(|_| answered);
                    }
                    (Ok(Outcome::Declared { node, incarnation, applied: false }), Some(leading)) => {
                        leading.detector.on(self.now(), DetectorEvent::NotApplied { node, incarnation });
                    }
                    _ => {}
                },
                _ = ticks.tick() => {
                    if !self.leads() {
                        leading = None;
                    } else {
                        let leading = leading.get_or_insert_with(|| Leading {
                            detector: Detector::new(self.settings.timers.detector, self.now()),
                            planned_for: None,
                            planning: false,
                        });
                        self.tick(leading, &mut tasks);
                        if group_at.elapsed() >= GROUP_CHECK {
                            group_at = Instant::now();
                            let shared = Arc::clone(&self);
                            tasks.spawn(async move { shared.tend_group().await; Outcome::Tended });
                        }
                    }
                }
            }
            if sending < SENDING_MAX
                && let Some(report) = waiting.take()
            {
                sending += 1;
                turn += 1;
                let shared = Arc::clone(&self);
                tasks.spawn(async move {
                    shared.send_report(report, turn).await;
                    Outcome::Reported
                });
            }
        }
    }

    fn tick(self: &Arc<Self>, leading: &mut Leading, tasks: &mut JoinSet<Outcome>) {
        let registry = self.registry.borrow().clone();
        for finding in leading.detector.on(self.now(), DetectorEvent::Tick(&registry)) {
            match finding {
                Finding::Failed(entry) | Finding::Returned(entry) => self.declare(entry, tasks),
                Finding::Overdue { node, incarnation } => {
                    self.declare(Entry::GiveUp { node, incarnation, at: wall() }, tasks);
                }
                Finding::Slow { member, observers } => {
                    let node = &member.node;
                    tracing::warn!(%node, ?observers, "a node takes changes much more slowly than others do: it is replaced where another one can be");
                }
                Finding::Isolated { accuser, accused } => {
                    tracing::warn!(%accuser, %accused, "one node alone does not hear another");
                }
            }
        }
        let mut conditions = leading.detector.conditions();
        conditions.not_parting = self.not_parting(&registry);
        let now = (registry.version(), conditions);
        if !leading.detector.settled() || leading.planning || leading.planned_for.as_ref() == Some(&now) {
            return;
        }
        leading.planning = true;
        let conditions = now.1.clone();
        leading.planned_for = Some(now);
        let shared = Arc::clone(self);
        tasks.spawn(async move {
            let expected = shared.settings.expected;
            // Milliseconds for many shards: not on a thread that serves others.
            let planned =
                move |registry: Arc<Registry>| plan_under(&registry, expected, PLAN_MAX, &conditions);
            let answered = match tokio::task::spawn_blocking(move || planned(registry)).await {
                Ok(entries) => shared.carry_out(entries).await,
                Err(_) => false,
            };
            Outcome::Planned { answered }
        });
    }

    /// Nodes whose version does not propose who leaves the sets that it leads.
    fn not_parting(&self, registry: &Registry) -> BTreeSet<NodeName> {
        let names = registry.nodes().iter().map(|node| &node.registration.node);
        let old = |name: &&NodeName| {
            self.network.link.version(name).is_some_and(|version| version.number() < PARTING_SINCE)
        };
        names.filter(old).cloned().collect()
    }

    fn declare(self: &Arc<Self>, entry: Entry, tasks: &mut JoinSet<Outcome>) {
        let (node, incarnation) = match &entry {
            Entry::Down { node, incarnation, observers } => {
                tracing::warn!(%node, %incarnation, ?observers, "a node has failed");
                (node.clone(), *incarnation)
            }
            Entry::Return { node, incarnation } => {
                tracing::info!(%node, %incarnation, "a node that was taken for failed returns with last copies");
                (node.clone(), *incarnation)
            }
            Entry::GiveUp { node, incarnation, .. } => {
                tracing::warn!(%node, %incarnation, "a failed node's last copies are given up");
                (node.clone(), *incarnation)
            }
            _ => return,
        };
        let shared = Arc::clone(self);
        tasks.spawn(async move {
            let tried = shared.propose_here(entry, Instant::now() + ENTRY_DEADLINE).await;
            let applied = !matches!(
                tried,
                Tried::NotLeader(_) | Tried::Unavailable(_) | Tried::Done(Response::Refused(_))
            );
            Outcome::Declared { node, incarnation, applied }
        });
    }

    /// Proposes entries side by side and waits for all answers; false where one got none.
    async fn carry_out(&self, entries: Vec<Entry>) -> bool {
        let until = Instant::now() + ENTRY_DEADLINE;
        let tried = entries.into_iter().map(|entry| self.propose_here(entry, until));
        let mut answered = true;
        for outcome in futures::future::join_all(tried).await {
            match outcome {
                // The set has moved on meanwhile; the next plan sees how.
                Tried::Done(Response::Refused(why)) => {
                    tracing::debug!(%why, "an entry of the plan was refused");
                }
                Tried::Done(_) => {}
                _ => answered = false,
            }
        }
        answered
    }

    /// To whoever leads, or the voter whose turn it is; once more to whom that one names.
    async fn send_report(&self, report: HealthReport, turn: usize) {
        for _ in 0..2 {
            let Some(to) = self.leader().or_else(|| self.next_voter(turn)) else { return };
            if to == self.settings.node {
                return;
            }
            let Some(version) = self.network.link.version(&to) else { return self.set_hint(None) };
            let request = Request::report(&report, version);
            match self.network.call(&to, &request, REPORT_DEADLINE).await {
                Ok(Answer::NotLeader(leader)) => {
                    self.set_hint(leader.and_then(|name| name.parse().ok()).filter(|name| *name != to));
                }
                Ok(_) => return,
                Err(_) => return self.set_hint(None),
            }
        }
    }
}
