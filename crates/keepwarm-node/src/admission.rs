//! Permits, taken before anything is sent.
//!
//! Who holds a permit of one pool waits only for pools to its right: client, relayed, restore, replica-in.
//! Relayed requests take the client permits of the node that answers them. Each pool has a fixed number of permits;
//! the first says no at once, the others are waited for.

use std::sync::Arc;

use keepwarm_types::Millis;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Error;

/// Messages of other nodes' replicas that wait for their shard: each is small, and more than a few hundred mean that
/// a shard does not keep up, which its peers then feel on their link.
const REPLICA_IN_PERMITS: usize = 4096;
/// Requests of clients at work at once. Each holds at most one write region or one read, so that with the
/// default body limit the arena, not the mailboxes, is what fills up.
pub const CLIENT_PERMITS: usize = 1024;
/// Loads and checkpoints between HBM and pinned memory at work at once, over all GPUs of the node.
pub const RESTORE_PERMITS: usize = 64;
/// When a client that was turned away may come again.
const RETRY_AFTER: Millis = Millis(500);

/// A place among those at work; given back on drop.
#[derive(Debug)]
pub(crate) struct Permit(#[allow(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// The pools of permits of this node.
#[derive(Debug, Clone)]
pub(crate) struct Admission {
    client: Arc<Semaphore>,
    restore: Arc<Semaphore>,
    replica_in: Arc<Semaphore>,
}

impl Admission {
    pub(crate) fn new() -> Self {
        Self {
            client: Arc::new(Semaphore::new(CLIENT_PERMITS)),
            restore: Arc::new(Semaphore::new(RESTORE_PERMITS)),
            replica_in: Arc::new(Semaphore::new(REPLICA_IN_PERMITS)),
        }
    }

    /// A permit for a client's request.
    ///
    /// # Errors
    /// [`Error::Overloaded`] at once where all are taken, [`Error::Draining`] after [`Admission::close`].
    pub(crate) fn client(&self) -> Result<Permit, Error> {
        take(&self.client, "too many requests are at work")
    }

    /// Waits for a permit to move bytes between HBM and pinned memory. Its holders wait for no client, so
    /// the wait is bounded by theirs.
    pub(crate) async fn restore(&self) -> Result<Permit, Error> {
        self.restore.clone().acquire_owned().await.map(Permit).map_err(|_| Error::Draining)
    }

    /// Waits for a permit to hand a message of another node's replica to its shard. Its holders wait for nobody.
    pub(crate) async fn replica_in(&self) -> Result<Permit, Error> {
        self.replica_in.clone().acquire_owned().await.map(Permit).map_err(|_| Error::Draining)
    }

    /// Turns every further client away.
    pub(crate) fn close(&self) {
        self.client.close();
    }

    /// Clients' requests at work.
    pub(crate) fn busy(&self) -> usize {
        CLIENT_PERMITS - self.client.available_permits()
    }
}

//= GUARANTEES.md#G8
fn take(pool: &Arc<Semaphore>, what: &'static str) -> Result<Permit, Error> {
    match pool.clone().try_acquire_owned() {
        Ok(permit) => Ok(Permit(permit)),
        Err(tokio::sync::TryAcquireError::NoPermits) => {
            Err(Error::Overloaded { what, retry_after: RETRY_AFTER })
        }
        Err(tokio::sync::TryAcquireError::Closed) => Err(Error::Draining),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    //= GUARANTEES.md#G8
    #[test]
    fn the_last_permit_is_refused_and_comes_back_on_drop() {
        let admission = Admission::new();
        let mut held: Vec<_> = (0..CLIENT_PERMITS).map(|_| admission.client().unwrap()).collect();
        assert!(matches!(admission.client(), Err(Error::Overloaded { .. })));
        held.pop();
        assert!(admission.client().is_ok());
        admission.close();
        assert_eq!(admission.client().unwrap_err(), Error::Draining);
    }
}
