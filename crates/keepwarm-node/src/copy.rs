//! Running a batch of copies on a device, with the watchdog.

use keepwarm_memory::{Block, Device, Direction, Job, Transfer};
use keepwarm_types::Millis;

use crate::error::Error;
use crate::gpu::COPY_DEADLINE;

/// The first of these that does not have the bytes it was sealed with.
pub(crate) async fn first_damaged(blocks: Vec<Block>) -> Option<Block> {
    let damaged = move || blocks.into_iter().find(|block| block.verify().is_err());
    // Where the runtime ends nobody asks any more.
    tokio::task::spawn_blocking(damaged).await.ok().flatten()
}

/// Submits a batch of copies and waits for it, at most [`COPY_DEADLINE`]: a device that takes longer is fenced.
///
/// Cancel safe: a dropped wait leaves the copies to run and gives their memory back afterwards.
pub(crate) async fn run(
    device: &dyn Device,
    direction: Direction,
    jobs: Vec<Job>,
    at: &'static str,
) -> Result<Vec<Block>, Error> {
    let transfer = device.submit(direction, jobs).map_err(|error| Error::from(error.cause))?;
    ended(device, transfer, at).await
}

/// Waits for a batch of any kind, as [`run`] does.
pub(crate) async fn ended(
    device: &dyn Device,
    transfer: Transfer,
    at: &'static str,
) -> Result<Vec<Block>, Error> {
    match tokio::time::timeout(COPY_DEADLINE, transfer).await {
        Ok(Ok(copies)) => Ok(copies),
        Ok(Err(error)) => Err(match Error::from(error.cause) {
            Error::Corrupt { detail, .. } => Error::Corrupt { at, detail },
            other => other,
        }),
        Err(_) => {
            device.fence("a copy did not end within its deadline");
            let reason = format!("{} hangs and is fenced", device.name());
            Err(Error::Unavailable { reason, retry_after: Millis(1000) })
        }
    }
}
