//! What a session is: its layout, the manifest that names its bytes, its transcript and its lease.
//!
//! These are plain values; the decisions over them are in [`crate::shard`].

mod cold;
mod layout;
mod lease;
mod manifest;
mod transcript;

pub use cold::{Fp8, Number, SCALE_BYTES};
pub use layout::{
    BLOCK_BYTES_DEFAULT, BLOCK_BYTES_MAX, Form, Layout, LayoutError, Order, PARTS_MAX, Part, PartName,
    Planes, TOKENS_PER_BLOCK_MAX,
};
pub use lease::{LEASE_TTL_DEFAULT, LEASE_TTL_MAX, LEASE_TTL_MIN, Lease};
pub use manifest::{
    BlockRef, Etag, Home, LABEL_BYTES_MAX, LABELS_MAX, Labels, Manifest, PROTECT_DEFAULT, Parent,
    ParseEtagError, PartState, Protect, Stamp, State, WRITE_IDS_KEPT, WriteMemo,
};
pub use transcript::{Message, TranscriptDelta};
