//! The way into a node for everything above it: the HTTP API, the engine, the tests.
//!
//! A [`Handle`] is cheap to clone. Each call takes its permit before anything is sent and answers through a
//! reply port. Dropping a call's future before it is done leaves the session either as it was or as the
//! call would have left it; a write that was not finished leaves nothing.

mod admin;
mod cede;
mod cluster;
mod damage;
mod inner;
mod request;
mod running;
mod sessions;
mod view;

pub use cluster::Whereabouts;
pub use inner::Handle;
pub(crate) use inner::{Inner, InnerParts, WeakHandle};
pub use request::{
    ActivateRequest, BodyDigest, CreateRequest, ForkRequest, Selection, TurnPart, TurnRequest, WriteRequest,
};
pub use view::{
    Activation, ArenaInfo, CheckpointInfo, ClusterInfo, ContextInfo, Explanation, Freed, GpuInfo, GpuState,
    Move, NodeEvent, NodeInfo, PinnedInfo, Receipt, ScratchInfo, SessionInfo, SessionPage, ShardInfo,
    TierBytes, TranscriptInfo, TurnDone, Verdict, WriteDone,
};
