//! What a node's registry is told at start, and what is wrong with it.

use std::time::Duration;

use keepwarm_core::registry::{DetectorSettings, RegistrySettings};
use keepwarm_types::NodeName;
use uuid::Uuid;

/// How many voters a cluster may have: one for a single node, three outlive one failure, five two.
pub const VOTERS: [usize; 3] = [1, 3, 5];
/// An election may start after this many heartbeats without one, at least.
const HEARTBEATS_MISSED_MIN: u32 = 3;

/// Whether this node may found the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bootstrap {
    /// It joins one.
    Forbidden,
    /// The bootstrap file is there, and names this cluster.
    Allowed {
        /// The id in the file.
        cluster_id: u128,
    },
}

/// How fast the group notices and acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timers {
    /// A leader shows itself this often.
    pub heartbeat: Duration,
    /// Shortest wait for an election; each start of a process draws one between the two.
    pub election_min: Duration,
    /// Longest wait for an election. The wait begins when the leader's lease is over, which lasts as long as this after
    /// its last sign of life; before that no voter votes for another.
    pub election_max: Duration,
    /// When silence between nodes counts.
    pub detector: DetectorSettings,
    /// The leader looks at reports this often.
    pub tick: Duration,
    /// A follower that does not vote waits this long for news before it asks another voter.
    pub poll: Duration,
}

impl Default for Timers {
    /// For a local network: an election 290 to 400 ms after a leader's last sign of life, and suspicion after 400 ms; so a
    /// second election, where the first is split, still ends within the second that a take-over may take.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(30),
            election_min: Duration::from_millis(90),
            election_max: Duration::from_millis(200),
            detector: DetectorSettings::default(),
            tick: Duration::from_millis(25),
            poll: Duration::from_secs(1),
        }
    }
}

/// What a node's registry is told at start.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This node.
    pub node: NodeName,
    /// Its data folder's identity.
    pub disk: Uuid,
    /// The cluster's name, for messages.
    pub cluster: String,
    /// The cluster's id: messages of another are refused.
    pub cluster_id: u128,
    /// Names of the nodes that vote, from the spec: one, three or five.
    pub voters: Vec<NodeName>,
    /// Names of all nodes of the spec, this one and the voters among them.
    pub nodes: Vec<NodeName>,
    /// How many nodes of the spec hold sessions: the first sets wait for as many as a set needs.
    pub expected: usize,
    /// Shards and replication, for the cluster's life.
    pub registry: RegistrySettings,
    /// How fast.
    pub timers: Timers,
    /// Whether it may found the cluster.
    pub bootstrap: Bootstrap,
}

/// What is wrong with [`Settings`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// Two or four voters outlive no more failures than one or three, and have more to fail.
    #[error(
        "{0} voters: name one (a single node), three or five; a cluster of two needs a third node as voter"
    )]
    Voters(usize),
    /// A name is there twice.
    #[error("node '{0}' is named twice")]
    Twice(NodeName),
    /// A voter is no node.
    #[error("voter '{0}' is no node of the spec")]
    Unknown(NodeName),
    /// The node itself is no node of the spec.
    #[error("this node, '{0}', is no node of the spec: correct node.name or the spec")]
    Stranger(NodeName),
    /// Several nodes need more than one voter.
    #[error("one voter, '{0}', for {1} nodes: when it fails, so does the cluster; name three voters")]
    OneVoter(NodeName, usize),
    /// The bootstrap file is another cluster's.
    #[error("the bootstrap file is of cluster {found:032x}, not {expected:032x}: remove it, or use its spec")]
    Bootstrap {
        /// In the file.
        found: u128,
        /// In the spec.
        expected: u128,
    },
    /// The timers do not fit each other.
    #[error(
        "elections after {election_min:?} to {election_max:?} with heartbeats of {heartbeat:?}: the first must be \
             at least {HEARTBEATS_MISSED_MIN} heartbeats, the second later than the first"
    )]
    Timers {
        /// Leader's heartbeat.
        heartbeat: Duration,
        /// Earliest election.
        election_min: Duration,
        /// Latest election.
        election_max: Duration,
    },
}

impl Settings {
    /// Whether this node votes by name.
    #[must_use]
    pub fn votes(&self) -> bool {
        self.voters.contains(&self.node)
    }

    pub(crate) fn check(&self) -> Result<(), SettingsError> {
        for names in [&self.voters, &self.nodes] {
            let mut sorted = names.clone();
            sorted.sort_unstable();
            if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(SettingsError::Twice(pair[0].clone()));
            }
        }
        if let Some(voter) = self.voters.iter().find(|voter| !self.nodes.contains(voter)) {
            return Err(SettingsError::Unknown(voter.clone()));
        }
        if !self.nodes.contains(&self.node) {
            return Err(SettingsError::Stranger(self.node.clone()));
        }
        match &self.voters[..] {
            [only] if self.nodes.len() > 1 => {
                return Err(SettingsError::OneVoter(only.clone(), self.nodes.len()));
            }
            voters if !VOTERS.contains(&voters.len()) => return Err(SettingsError::Voters(voters.len())),
            _ => {}
        }
        if let Bootstrap::Allowed { cluster_id: found } = self.bootstrap
            && found != self.cluster_id
        {
            return Err(SettingsError::Bootstrap { found, expected: self.cluster_id });
        }
        let Timers { heartbeat, election_min, election_max, .. } = self.timers;
        if heartbeat.is_zero()
            || election_min < heartbeat * HEARTBEATS_MISSED_MIN
            || election_max <= election_min
        {
            return Err(SettingsError::Timers { heartbeat, election_min, election_max });
        }
        Ok(())
    }
}
