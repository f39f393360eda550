//! Bringing a session's blocks to a GPU: over a link where another GPU of the node has them already, the rest from pinned
//! memory.
//!
//! This runs as a task of the loading GPU's actor and asks the others for guards, so no actor waits for another. The
//! pinned guards stay at hand: what does not come over a link, for whatever reason, is taken from there in the same load. An
//! instance is written once, so its number says that the bytes are those that the manifest means.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use keepwarm_core::session::Manifest;
use keepwarm_memory::{Block, BlockMut, CUDA_PATIENCE, DeviceError, Job, Link, TransferError};
use keepwarm_types::{Bytes, GpuIndex, InstanceId, Millis, Owner};
use ractor::ActorRef;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::actor::{COPY_DEADLINE, ROOM_WAIT, copy_in, sizes};
use super::board::Board;
use super::message::GpuMsg;
use super::ways::Ways;
use crate::clock::now;
use crate::cold;
use crate::error::Error;
use crate::links::Links;
use crate::metrics::Metrics;

/// What a load gives its links before it takes everything from pinned memory: half of the watchdog's time. A device that hangs
/// is fenced by its own watchdog before (`CUDA_PATIENCE`), and that ends what waits for it.
const NEAR_DEADLINE: Duration = Duration::from_secs(COPY_DEADLINE.as_secs() / 2);
const _: () = assert!(NEAR_DEADLINE.as_secs() > CUDA_PATIENCE.as_secs());

/// How long a load waits for room while it has guards of other GPUs' blocks.
const NEAR_ROOM_WAIT: Millis = Millis(250);

/// The other GPUs of the node, as one of them sees them.
pub(crate) struct Near {
    pub(crate) index: GpuIndex,
    pub(crate) boards: Vec<Arc<Board>>,
    pub(crate) links: Arc<Links>,
    pub(crate) ways: Arc<Ways>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Blocks that another GPU has, and the way from there.
struct Lent<'a> {
    from: &'a Board,
    link: Arc<Link>,
    blocks: Vec<Block>,
}

/// What a load brought.
#[derive(Debug, Default)]
pub(crate) struct Fetched {
    pub(crate) copies: Vec<Block>,
    /// How much of it came from which other GPU; the rest is from pinned memory.
    pub(crate) near: Vec<(GpuIndex, Bytes)>,
}

impl Fetched {
    pub(crate) fn bytes(&self) -> Bytes {
        bytes(&self.copies)
    }
}

fn bytes(blocks: &[Block]) -> Bytes {
    blocks.iter().map(|block| Bytes(block.length() as u64)).sum()
}

/// Guards of those of `wanted` that are among a GPU's instances: for `owner`, who has been granted these instances in
/// pinned memory; never another tenant's.
//= GUARANTEES.md#G4
pub(super) fn lend(
    instances: &HashMap<InstanceId, (Block, u32)>,
    owner: &Owner,
    wanted: &[InstanceId],
) -> Vec<Block> {
    let here = wanted.iter().filter_map(|instance| instances.get(instance));
    let theirs = here.filter(|(block, _)| block.owner().tenant == owner.tenant);
    theirs.map(|(block, _)| block.share(owner.birth)).collect()
}

impl Near {
    fn here(&self) -> Option<&Board> {
        self.boards.get(usize::from(self.index.0)).map(AsRef::as_ref)
    }

    /// What leads from or to this GPU is given up.
    pub(super) fn close(&self) {
        self.ways.close(self.index);
    }

    /// Brings `missing` here, of which these are the pinned guards. Room for all of it is had at once.
    ///
    /// # Errors
    /// As of a load from pinned memory alone.
    pub(super) async fn fetch(
        &self,
        myself: &ActorRef<GpuMsg>,
        manifest: &Manifest,
        missing: Vec<Block>,
    ) -> Result<Fetched, Error> {
        let here = self.here().ok_or_else(|| Error::Internal(format!("there is no GPU {}", self.index)))?;
        let owner = Owner { tenant: manifest.key.tenant.clone(), birth: manifest.birth };
        let deadline = Instant::now() + NEAR_DEADLINE;
        let mut lent = self.lent(here, &owner, &missing, deadline).await;
        let from_near: HashSet<_> = lent.iter().flat_map(|lent| &lent.blocks).map(Block::instance).collect();
        let rest = |came: &HashSet<InstanceId>| -> Vec<Block> {
            missing.iter().filter(|block| !came.contains(&block.instance())).cloned().collect()
        };
        let mut far = cold::incoming(manifest, rest(&from_near));
        // What comes over a link lies there as it lies here: the source in HBM says how long it is.
        let near = lent.iter().flat_map(|lent| lent.blocks.iter().map(Block::capacity));
        let wanted = sizes(near.chain(far.iter().map(|incoming| incoming.size)));
        let wait = if lent.is_empty() { ROOM_WAIT } else { NEAR_ROOM_WAIT };
        let mut targets = match room(myself, &owner, wanted, wait).await {
            Ok(targets) => targets.into_iter(),
            Err(error) if lent.is_empty() => return Err(error),
            Err(_) => {
                // The other GPU may wait for the memory of what it lends, while this one waits for its.
                lent.clear();
                far = cold::incoming(manifest, missing.clone());
                room(myself, &owner, sizes(far.iter().map(|incoming| incoming.size)), ROOM_WAIT)
                    .await?
                    .into_iter()
            }
        };
        let over = lent.into_iter().map(|lent| {
            let targets = targets.by_ref().take(lent.blocks.len()).collect();
            self.over(here, lent, targets, deadline, manifest)
        });
        let over: Vec<_> = over.collect();
        let (over, far) = tokio::join!(join_all(over), copy_in(&**here.device(), far, targets.collect()));
        let mut fetched = Fetched { copies: far?, near: Vec::new() };
        for (from, copies) in over {
            if !copies.is_empty() {
                fetched.near.push((from, bytes(&copies)));
                fetched.copies.extend(copies);
            }
        }
        let lost = rest(&fetched.copies.iter().map(Block::instance).collect());
        if !lost.is_empty() {
            let lost = cold::incoming(manifest, lost);
            let wanted = sizes(lost.iter().map(|incoming| incoming.size));
            let targets = room(myself, &owner, wanted, ROOM_WAIT).await?;
            fetched.copies.extend(copy_in(&**here.device(), lost, targets).await?);
        }
        Ok(fetched)
    }

    /// Which other GPUs have some of these blocks, and a link here. Each block is named once.
    async fn lent<'a>(
        &'a self,
        here: &Board,
        owner: &Owner,
        missing: &[Block],
        deadline: Instant,
    ) -> Vec<Lent<'a>> {
        let mut wanted: Vec<_> = missing.iter().map(Block::instance).collect();
        let mut lent = Vec::new();
        for board in self.boards.iter().filter(|board| board.index() != self.index) {
            if wanted.is_empty() {
                break;
            }
            let Some(actor) = self.links.gpu(board.index()).filter(|_| self.ways.may_be(board, here)) else {
                continue;
            };
            let (reply, blocks) = oneshot::channel();
            let ask = GpuMsg::Lend { owner: owner.clone(), instances: wanted.clone(), reply };
            // An actor that has ended since has nothing.
            let blocks = if actor.cast(ask).is_ok() { timeout_at(deadline, blocks).await } else { continue };
            let Ok(Ok(blocks)) = blocks else { continue };
            if blocks.is_empty() {
                continue;
            }
            match timeout_at(deadline, self.ways.open(board, here)).await {
                Ok(None) => {}
                Ok(Some(link)) => {
                    let found: HashSet<_> = blocks.iter().map(Block::instance).collect();
                    wanted.retain(|instance| !found.contains(instance));
                    lent.push(Lent { from: board, link, blocks });
                }
                // The driver does not answer: no later load shall wait for that.
                Err(_) => self.ways.give_up(board, here),
            }
        }
        lent
    }

    /// Copies over a link; nothing where that failed, which is no error of the load.
    async fn over(
        &self,
        here: &Board,
        lent: Lent<'_>,
        targets: Vec<BlockMut>,
        deadline: Instant,
        manifest: &Manifest,
    ) -> (GpuIndex, Vec<Block>) {
        let Lent { from, link, blocks } = lent;
        let jobs = blocks.into_iter().zip(targets).map(|(source, target)| Job { source, target }).collect();
        let copied = match link.copy(jobs) {
            Ok(transfer) => timeout_at(deadline, transfer).await,
            Err(refused) => Ok(Err(refused)),
        };
        let why = match copied {
            Ok(Ok(copies)) => return (from.index(), copies),
            Ok(Err(TransferError { cause, .. })) => {
                if matches!(cause, DeviceError::Corrupt(_)) {
                    self.doubt(from, manifest);
                }
                cause.to_string()
            }
            Err(_) => {
                // Neither side is fenced by now, so nobody knows whose fault it is.
                self.ways.give_up(from, here);
                format!("nothing came within {NEAR_DEADLINE:?}")
            }
        };
        let key = &manifest.key;
        tracing::warn!(%key, ?link, why, "blocks did not come over a link: they are taken from pinned memory");
        (from.index(), Vec::new())
    }

    /// What a GPU has of a session may be damaged there: it is not kept, unless somebody works with it.
    fn doubt(&self, from: &Board, manifest: &Manifest) {
        self.metrics.checksum_failed("link");
        if let Some(actor) = self.links.gpu(from.index()) {
            let (reply, _) = oneshot::channel();
            let _ = actor.cast(GpuMsg::Demote { key: manifest.key.clone(), reply });
        }
    }
}

/// Room in the arena of this GPU's actor, for all of it.
async fn room(
    myself: &ActorRef<GpuMsg>,
    owner: &Owner,
    sizes: Vec<(Bytes, usize)>,
    wait: Millis,
) -> Result<Vec<BlockMut>, Error> {
    let gone = || Error::Internal("the gpu actor ended while a load waited for room".to_owned());
    let (reply, targets) = oneshot::channel();
    let scratch = GpuMsg::Scratch { owner: owner.clone(), sizes, deadline: now() + wait, reply };
    myself.cast(scratch).map_err(|_| gone())?;
    targets.await.map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use keepwarm_memory::{Arena, ArenaSettings};
    use keepwarm_types::Birth;

    use super::*;

    fn owner(tenant: &str, birth: u64) -> Owner {
        Owner { tenant: tenant.parse().unwrap(), birth: Birth::from_random(birth) }
    }

    //= GUARANTEES.md#G4
    #[test]
    fn blocks_are_lent_for_another_life_of_their_tenant_and_never_to_another_tenant() {
        let settings =
            ArenaSettings { extent: Bytes(1 << 20), ..ArenaSettings::new("hbm:0", Bytes(4 << 20)) };
        let arena = Arena::reserve(&settings).unwrap();
        let targets = arena.allocate(&owner("acme", 1), Bytes(4096), 3).unwrap().into_iter();
        let blocks: Vec<_> = targets.map(|target| target.seal(0).unwrap()).collect();
        let mut instances: HashMap<_, _> =
            blocks.iter().map(|block| (block.instance(), (block.clone(), 1))).collect();
        let wanted: Vec<_> = blocks.iter().map(Block::instance).collect();
        instances.remove(&wanted[1]);
        let fork = owner("acme", 2);
        let lent = lend(&instances, &fork, &wanted);
        assert_eq!(lent.iter().map(Block::instance).collect::<Vec<_>>(), [wanted[0], wanted[2]]);
        assert!(lent.iter().all(|block| block.owner() == fork), "{lent:?}");
        assert!(lend(&instances, &owner("other", 1), &wanted).is_empty());
    }
}
