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
//!     parts: vec![PartLayout { name: "state".to_owned(), form: Form::Bytes { block_bytes: Some(1 << 20) } }],
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
//! **Cancellation.** Dropping a call's future stops it; a write whose body was not wholly sent is not applied.

mod body;
mod calls;
mod chat;
mod client;
mod cluster;
mod digest;
mod error;
mod etag;
mod session;
mod sse;
mod verbs;

pub use body::PartBody;
pub use calls::{ArchiveReader, ChatStream, PartReader, Readiness, Selection, SessionFilter, WriteOptions};
pub use chat::{
    ChatAnswer, ChatCall, ChatEnd, ChatHead, ChatMessage, ChatPiece, ChatRequest, Model, PromptDetails, Usage,
};
pub use client::{Client, ClientBuilder};
pub use cluster::{Arena, Cluster, Contexts, Gpu, Node, Pinned, Shard, Spec};
pub use error::{ClientError, Problem};
pub use etag::{Etag, ParseEtagError};
pub use session::{
    Form, Home, Layout, LeaseInfo, NewSession, Order, PartLayout, PartState, Protect, Session, SessionPage,
    State, TierBytes,
};
pub use verbs::{
    Activation, Checkpoint, Commit, Deleted, Explanation, Fork, Freed, Lease, Length, Match, Move, Placement,
    Residency, StoredMessage, Transcript, Verdict, Written,
};
