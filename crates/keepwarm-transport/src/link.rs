//! What a node needs of its links, and what comes in over them.

use std::time::Duration;

use futures::future::BoxFuture;
use keepwarm_types::{Incarnation, NodeName};
use keepwarm_wire::{Frame, Version};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::stream::ByteStream;

/// What a message is for; the first is the most urgent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Whether a peer is there.
    Liveness,
    /// Who owns what: the registry, changes, take-overs.
    Ownership,
    /// Bytes that somebody waits for.
    Restore,
    /// Bytes of changes on their way to holders.
    Checkpoint,
    /// Clients' requests on their way to the owner.
    Relay,
    /// Everything that may take its time.
    Rebalance,
}

impl Class {
    /// All, the most urgent first.
    pub const ALL: [Self; 6] =
        [Self::Liveness, Self::Ownership, Self::Restore, Self::Checkpoint, Self::Relay, Self::Rebalance];

    pub(crate) const fn number(self) -> u8 {
        self as u8
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The word that metrics use.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Liveness => "liveness",
            Self::Ownership => "ownership",
            Self::Restore => "restore",
            Self::Checkpoint => "checkpoint",
            Self::Relay => "relay",
            Self::Rebalance => "rebalance",
        }
    }
}

/// One process of one node, as links tell processes apart: a later start has a higher incarnation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerId {
    /// Which node.
    pub node: NodeName,
    /// Which start of it.
    pub incarnation: Incarnation,
}

/// Why something did not get through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// There is no link now; nothing was sent.
    #[error("node '{0}' is not connected")]
    NotConnected(NodeName),
    /// The queue to the peer is full; nothing was sent.
    #[error("the queue to node '{0}' is full")]
    Full(NodeName),
    /// No answer came in time; the request may have arrived.
    #[error("node '{0}' did not answer in time")]
    Deadline(NodeName),
    /// The link or stream broke; what was sent may have arrived.
    #[error("the link broke: {0}")]
    Closed(String),
}

/// A peer, as its link shows it.
#[derive(Debug, Clone)]
pub struct PeerStatus {
    /// Which node.
    pub node: NodeName,
    /// Where it is dialled.
    pub address: String,
    /// The process that is connected; none while it is not up.
    pub up: Option<Incarnation>,
    /// The version that the link speaks, while it is up.
    pub version: Option<Version>,
    /// Why it is not up.
    pub reason: Option<String>,
    /// Round trip, while it is up.
    pub rtt: Option<Duration>,
    /// When anything was last heard of it.
    pub last_heard: Option<Instant>,
    /// Bytes sent and received on streams, by class.
    pub bytes: [(u64, u64); 6],
}

/// What comes in.
#[derive(Debug)]
pub enum Incoming {
    /// A peer is up, and what is spoken with it.
    Up(PeerId, Version),
    /// A peer is down, and why.
    Down(PeerId, String),
    /// A frame; in the order in which it was sent while a connection lasts.
    Frame(PeerId, Frame),
    /// A request that wants an answer.
    Call {
        /// Who asks.
        from: PeerId,
        /// How urgent it is.
        class: Class,
        /// What is asked.
        request: Frame,
        /// Takes the answer; dropping it tells the caller that there is none.
        answer: Responder,
    },
    /// A stream that a peer opened.
    Stream {
        /// Who opened it.
        from: PeerId,
        /// How urgent it is.
        class: Class,
        /// What it is for.
        header: Frame,
        /// Its bytes.
        stream: ByteStream,
    },
}

/// Takes the answer to a call.
#[derive(Debug)]
pub struct Responder {
    pub(crate) to: oneshot::Sender<Frame>,
    pub(crate) version: Version,
}

impl Responder {
    /// The version that whoever asks speaks on this link.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Answers. A caller that has gone away needs none.
    pub fn send(self, answer: Frame) {
        let _ = self.to.send(answer);
    }

    /// Waits until nobody wants the answer any more: the caller gave up, or the link broke. Cancel safe.
    pub async fn unwanted(&mut self) {
        self.to.closed().await;
    }
}

/// Links to all peers of one node.
pub trait Transport: Send + Sync + 'static {
    /// This process.
    fn local(&self) -> &PeerId;

    /// The version to encode in for a peer; none while it is not connected.
    ///
    /// It lasts as long as the process at the other end: a link to the next one may speak another. What was encoded for
    /// the earlier process is then as good as what was on its way to it: a peer that does not read its version refuses
    /// it.
    fn version(&self, peer: &NodeName) -> Option<Version>;

    /// Queues a frame for a peer: in order, and lost where the connection ends.
    ///
    /// # Errors
    /// [`LinkError::NotConnected`] or [`LinkError::Full`], at once.
    fn send(&self, to: &NodeName, frame: Frame) -> Result<(), LinkError>;

    /// Asks a peer, on a stream of its own. Dropping the future gives the answer up; the request may have arrived.
    ///
    /// # Errors
    /// [`LinkError`]; only [`LinkError::NotConnected`] says that nothing arrived.
    fn call(
        &self,
        to: &NodeName,
        class: Class,
        request: Frame,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Frame, LinkError>>;

    /// Opens a stream to a peer. Dropping the stream resets it.
    ///
    /// # Errors
    /// [`LinkError`].
    fn open(
        &self,
        to: &NodeName,
        class: Class,
        header: Frame,
    ) -> BoxFuture<'_, Result<ByteStream, LinkError>>;

    /// All other nodes and where they are; names are resolved again at each try.
    fn set_peers(&self, peers: Vec<(NodeName, String)>);

    /// Ends the connection to a peer that is known to be gone, so that nobody waits for it; it is dialled again.
    fn disconnect(&self, node: &NodeName);

    /// What the links show now.
    fn peers(&self) -> Vec<PeerStatus>;

    /// Ends all links.
    fn close(&self);
}

pub(crate) fn closed(error: impl std::fmt::Display) -> LinkError {
    LinkError::Closed(error.to_string())
}
