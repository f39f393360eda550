//! What the router can be told.

use keepwarm_core::placement::Needs;
use keepwarm_types::{GpuIndex, SessionKey, Source};
use tokio::sync::oneshot;

use crate::handle::Move;

/// What was seen of a session.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    pub(crate) home: Option<GpuIndex>,
    /// Oldest first; at most 32.
    pub(crate) moves: Vec<Move>,
    pub(crate) hits: Vec<(Source, u64)>,
    pub(crate) misses: Vec<(&'static str, u64)>,
}

/// Everything the router can be told.
pub(crate) enum RouterMsg {
    /// Which GPU shall it run on?
    Place {
        key: SessionKey,
        /// The GPU that was asked for.
        wish: Option<GpuIndex>,
        /// A session whose home it should share.
        near: Option<SessionKey>,
        needs: Needs,
        reply: oneshot::Sender<Option<GpuIndex>>,
    },
    /// It runs there now.
    Homed(SessionKey, GpuIndex),
    /// Its bytes moved.
    Moved(SessionKey, Move),
    /// An activation found bytes there, or found none and why.
    Found(SessionKey, Source, &'static str),
    /// It has ended.
    Forget(SessionKey),
    /// What was seen of it?
    Recall(SessionKey, oneshot::Sender<History>),
}
