//! How registries of different nodes reach each other: a narrow trait, so that peer links and tests plug in.

use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use keepwarm_types::NodeName;
use keepwarm_wire::Version;

/// Longest request or answer. The largest is a snapshot: 65,536 shards of 32 bytes are 2 MiB, 65,000 nodes of 90
/// bytes 6 MiB.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Why a call got no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryLinkError {
    /// Certainly nothing has arrived.
    #[error("{0} cannot be reached: check that it runs and that its peer address is right")]
    Unreachable(NodeName),
    /// The request may have arrived.
    #[error("the link to {0} broke before it answered")]
    Lost(NodeName),
    /// The request may have arrived; no answer came in time.
    #[error("{0} has not answered in time")]
    Deadline(NodeName),
}

/// Carries requests to other nodes' registries.
pub trait RegistryLink: Send + Sync + 'static {
    /// The version that a node speaks on its link; none while it cannot be reached.
    fn version(&self, to: &NodeName) -> Option<Version>;

    /// Sends a request to a node's registry and gives its answer; the deadline bounds all of it. Dropping the future
    /// gives the answer up; the request may have arrived.
    ///
    /// # Errors
    /// [`RegistryLinkError`], which says whether the request may have arrived.
    fn call(
        &self,
        to: &NodeName,
        request: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Bytes, RegistryLinkError>>;
}
