//! What the parts of one node's registry share: its settings, its group, what it has applied, who leads.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keepwarm_core::registry::{HealthReport, Registry};
use keepwarm_types::{NodeName, Timestamp};
use openraft::{RaftMetrics, ServerState};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

use crate::network::Network;
use crate::raft_types::{Raft, RaftPeer};
use crate::settings::Settings;

/// How this node takes part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// No cluster yet: it waits to found one, or to be let in.
    Waiting {
        /// For what, for the operator.
        why: String,
    },
    /// Let in, and copying; it does not vote yet.
    Learner,
    /// It votes.
    Voter,
    /// It does not vote by the spec, and follows.
    Follower,
    /// Its log failed: it has stepped out, and the process must be restarted.
    Failed {
        /// What failed and what to do.
        why: String,
    },
}

pub(crate) type Metrics = RaftMetrics<u64, RaftPeer>;

pub(crate) struct Shared {
    pub(crate) settings: Settings,
    /// This name's and disk's raft id.
    pub(crate) id: u64,
    pub(crate) network: Network,
    /// None on a node that does not vote.
    pub(crate) raft: Option<Raft>,
    pub(crate) registry: watch::Sender<Arc<Registry>>,
    pub(crate) standing: watch::Sender<Standing>,
    pub(crate) reports: mpsc::Sender<HealthReport>,
    /// Who leads, as somebody said.
    pub(crate) hint: Mutex<Option<NodeName>>,
    /// One change of the group at a time.
    pub(crate) membership: tokio::sync::Mutex<()>,
    /// For proposals that wait here.
    pub(crate) room: Semaphore,
    pub(crate) started: Instant,
}

impl Shared {
    /// Whether this node leads, as far as it knows.
    pub(crate) fn leads(&self) -> bool {
        let Some(raft) = &self.raft else { return false };
        let metrics = raft.metrics();
        let metrics = metrics.borrow();
        metrics.state == ServerState::Leader && metrics.running_state.is_ok()
    }

    pub(crate) fn leader(&self) -> Option<NodeName> {
        let own = self.raft.as_ref().and_then(|raft| {
            let metrics = raft.metrics();
            let metrics = metrics.borrow();
            let leader = metrics.current_leader?;
            metrics.membership_config.membership().get_node(&leader)?.name.clone()
        });
        own.or_else(|| self.hint.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    pub(crate) fn set_hint(&self, leader: Option<NodeName>) {
        *self.hint.lock().unwrap_or_else(PoisonError::into_inner) = leader;
    }

    /// The leader's name as a text, for answers; only from the group itself.
    pub(crate) fn leader_text(&self) -> Option<String> {
        self.leader()
            .filter(|leader| *leader != self.settings.node || self.leads())
            .map(|name| name.to_string())
    }

    /// Milliseconds since the start: what the detector calls now.
    pub(crate) fn now(&self) -> Timestamp {
        Timestamp(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

/// The time of day, for what is only shown.
pub(crate) fn wall() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
