//! ractor actors: thin shells that feed the core and carry out its commands.
//!
//! | actor | how many | owns |
//! |---|---|---|
//! | node | 1 | supervises the rest; start-up order, shutdown |
//! | router | 1 | placement, the homes it has seen |
//! | gpu | one per GPU | device, arena, resident LRU, leases running there |
//! | pinned | 1 | pinned arena, its residency |
//! | shard | one per shard | this node's replica (the core's `Replica`) and the guards of its sessions' bytes |
//!
//! Mailboxes are unbounded, so a permit is taken before anything is sent; bulk bytes never travel through
//! them, only guards do. An actor never waits for another: it answers through a reply port, and long work is
//! a task that reports back. Links, registry and what other nodes send are tasks of `cluster`. `Err` from a handler is only for "my own state is broken", and none returns it.

mod admission;
pub mod archive;
mod book;
mod checkpoint;
mod clock;
mod cluster;
mod cold;
mod copy;
mod disk;
mod error;
mod gpu;
mod growth;
mod handle;
mod links;
mod metrics;
mod node;
mod pinned;
mod read;
mod room;
mod router;
mod shard;
mod uploads;
mod write;

pub use admission::{CLIENT_PERMITS, RESTORE_PERMITS};
pub use clock::now;
pub use cluster::{IncomingRelay, JoinError, RelayStream, RelayedCaller};
pub use error::Error;
pub use handle::{
    ActivateRequest, Activation, ArenaInfo, BodyDigest, CheckpointInfo, ClusterInfo, ContextInfo,
    CreateRequest, Explanation, ForkRequest, Freed, GpuInfo, GpuState, Handle, Move, NodeEvent, NodeInfo,
    PinnedInfo, Receipt, ScratchInfo, Selection, SessionInfo, SessionPage, ShardInfo, TierBytes,
    TranscriptInfo, TurnDone, TurnPart, TurnRequest, Verdict, Whereabouts, WriteDone, WriteRequest,
};
pub use metrics::Metrics;
pub use node::{Node, ShutdownReport, StartError, WORKSPACE_MAX, cuda_selector};
pub use read::{Chunks, PartReader};
pub use write::{BODY_BYTES_MAX, WriteSink, WriteStart};
