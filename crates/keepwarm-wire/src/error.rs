//! Why a payload cannot be written or read.

use std::fmt::Display;
use std::str::FromStr;

use crate::limits::{NAME_BYTES_MAX, TooLong, within};
use crate::version::{VERSION, VERSION_OLDEST, Version};

/// Why a value cannot be written for a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// More of something than may be.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The peer's version has no word for it.
    #[error(
        "{what} cannot be said in version {version}, which is what the peer speaks: it came with version {since}"
    )]
    Unsayable {
        /// What it is.
        what: &'static str,
        /// What both ends of the link speak.
        version: Version,
        /// The first version that can say it.
        since: u16,
    },
}

/// Why a payload cannot be read. None of these passes by trying again: the peer is of another version, or broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The frame is of another kind.
    #[error("a frame of kind {found:#06x} came where one of kind {wanted:#06x} was due")]
    Kind {
        /// What came.
        found: u16,
        /// What was due.
        wanted: u16,
    },
    /// The payload ends within its header.
    #[error("a payload of {0} bytes is shorter than its header")]
    Short(usize),
    /// The sender speaks a version that this node does not.
    #[error(
        "a payload of version {0} came, and this node reads {oldest} to {newest}: upgrade by one version at a time",
        oldest = VERSION_OLDEST,
        newest = VERSION
    )]
    Version(u16),
    /// The archive does not hold together.
    #[error("the archive is damaged: {0}")]
    Archive(String),
    /// More of something than may be.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// A value that its type does not allow.
    #[error("{field}: {reason}")]
    Field {
        /// Which field, e.g. `manifest.layout`.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// A value that its type does not allow.
pub(crate) fn field(field: &'static str, reason: impl Display) -> DecodeError {
    DecodeError::Field { field, reason: reason.to_string() }
}

/// Reads a name by its type's own rule; its length is looked at first, so that no error quotes a megabyte.
pub(crate) fn name<T>(what: &'static str, text: &str) -> Result<T, DecodeError>
where
    T: FromStr,
    T::Err: Display,
{
    within(what, text.len(), NAME_BYTES_MAX)?;
    text.parse().map_err(|error: T::Err| field(what, error))
}
