//! A typed HTTP client for keepwarm: sessions, their bytes, their moves, chat, and what operators see.
//!
//! This crate owns the way to a node: addresses, credentials, deadlines, retries, digests. Its types mirror
//! what goes over the wire and are its own; it knows nothing of how a node works.
//!
//! ```no_run
//! use keepwarm_client::{Client, Form, Layout, NewSession, PartBody, PartLayout, WriteOptions};
//!
//! # async fn example() -> Result<(), keepwarm_client::ClientError> {
//! let client = Client::new("http://127.0.0.1:7000")?;
//! let layout = Layout {
//!     model: "llama".to_owned(),
//!     fingerprint: "blake3:1f".to_owned(),
//!     parts: vec![PartLayout { name: "state".to_owned(), form: Form::Bytes { block_bytes: Some(1 << 20) }, cold: None }],
//! };
//! let session = client.create(&NewSession::new(layout)).await?;
//! let body = PartBody::from(vec![7u8; 1 << 20]);
//! client.put_part(session.id, "state", body, &WriteOptions::default()).await?;
//!
//! let reader = client.part(session.id, "state").await?;
//! assert_eq!(reader.bytes().await?.len(), 1 << 20); // checked against the server's digest
//! # Ok(())
//! # }
//! ```
//!
//! **Retries.** A call is sent again only where that cannot do its work twice: reads, creates (their ids are
//! always minted here), writes (they carry a write id), and any call that was answered 429 or 503, which says
//! that it was not applied. Each call ends by its deadline, retries included.
//!
//! **Ways.** After the first answer about a session the client asks for the cluster's shard map, and from then on each session's
//! owner directly, at the addresses that the map has and with the token that it was given. Where a node is not reached, the
//! next attempt asks another: a replica, a [`ClientBuilder::seed`], or any node of the map. [`ClientBuilder::fixed`] keeps to one
//! address, for a load balancer in front of the nodes.
//!
//! **Cancellation.** Dropping a call's future stops it; a write whose body was not wholly sent is not applied.

mod body;
mod calls;
mod chat;
mod client;
mod cluster;
mod digest;
mod error;
mod etag;
mod routes;
mod session;
mod sse;
mod verbs;

pub use body::PartBody;
pub use calls::{ArchiveReader, ChatStream, PartReader, Readiness, Selection, SessionFilter, WriteOptions};
pub use chat::{
    ChatAnswer, ChatCall, ChatEnd, ChatHead, ChatMessage, ChatPiece, ChatRequest, ColdForm, Model,
    PromptDetails, Usage,
};
pub use client::{Client, ClientBuilder};
pub use cluster::{Arena, Cluster, Contexts, Gpu, Node, Pinned, Scratch, Shard, ShardMap, Spec};
pub use error::{ClientError, Problem};
pub use etag::{Etag, ParseEtagError};
pub use session::{
    Cold, Form, Home, Layout, LeaseInfo, NewSession, Number, Order, PartLayout, PartState, Protect, Session,
    SessionPage, State, TierBytes,
};
pub use verbs::{
    Activation, Checkpoint, Commit, Deleted, Explanation, Fork, Freed, Lease, Length, Match, Move, Placement,
    Residency, StoredMessage, Transcript, Verdict, Written,
};
