//! Ways between the node's GPUs: a link for each ordered pair that has one, made at its first use and kept.
//!
//! That two GPUs have none is kept as well, and said once. A link is made by a thread of its own, since the driver may let
//! it wait, and at most one at a time for a pair: all who want it wait for the same. What leads from or to a fenced GPU is
//! given up.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use keepwarm_memory::{Device, Link, LinkError, ScratchFigures};
use keepwarm_types::GpuIndex;

use super::board::Board;

/// When a link that could not be made, or on which nothing moved, is tried again. Each try may leave two threads behind
/// until its device moves again: at most a dozen tries an hour.
const AGAIN: Duration = Duration::from_secs(300);

/// What is known of the way from one GPU to another.
#[derive(Clone)]
enum Found {
    Open(Arc<Link>),
    /// The hardware has none.
    Never,
    /// Not at that time.
    NotAt(Instant),
}

/// The same for all who wait for it.
type Finding = Shared<BoxFuture<'static, Found>>;

/// From a GPU to another.
type Pair = (GpuIndex, GpuIndex);

/// The ways between a node's GPUs.
#[derive(Default)]
pub(crate) struct Ways {
    /// At most one for each ordered pair of the node's GPUs.
    known: Mutex<HashMap<Pair, Finding>>,
}

impl fmt::Debug for Ways {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ways").field("known", &self.known().len()).finish()
    }
}

fn pair(from: &Board, to: &Board) -> Pair {
    (from.index(), to.index())
}

impl Ways {
    fn known(&self) -> MutexGuard<'_, HashMap<Pair, Finding>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a link may be had; false where it is known that there is none now.
    pub(super) fn may_be(&self, from: &Board, to: &Board) -> bool {
        let known = self.known();
        let found = known.get(&pair(from, to)).and_then(Shared::peek);
        let barred = match found {
            Some(Found::Never) => true,
            Some(Found::NotAt(at)) => at.elapsed() < AGAIN,
            Some(Found::Open(_)) | None => false,
        };
        !barred && from.healthy() && to.healthy()
    }

    /// The link from one GPU to another, which is made where there is none yet. May take as long as the driver does.
    pub(super) async fn open(&self, from: &Board, to: &Board) -> Option<Arc<Link>> {
        if !self.may_be(from, to) {
            return None;
        }
        let finding = {
            let mut known = self.known();
            let is_over =
                |finding: &Finding| matches!(finding.peek(), Some(Found::NotAt(at)) if at.elapsed() >= AGAIN);
            if known.get(&pair(from, to)).is_some_and(is_over) {
                known.remove(&pair(from, to));
            }
            let make = || find(Arc::clone(from.device()), Arc::clone(to.device()));
            known.entry(pair(from, to)).or_insert_with(make).clone()
        };
        match finding.await {
            Found::Open(link) => Some(link),
            Found::Never | Found::NotAt(_) => None,
        }
    }

    /// On this link nothing moved in time: another is tried later.
    pub(super) fn give_up(&self, from: &Board, to: &Board) {
        let not_now = futures::future::ready(Found::NotAt(Instant::now())).boxed().shared();
        // Nobody else may have asked for it: it is known from here on.
        let _ = not_now.clone().now_or_never();
        self.known().insert(pair(from, to), not_now);
    }

    /// Nothing goes from or to this GPU any more.
    pub(super) fn close(&self, gpu: GpuIndex) {
        self.known().retain(|(from, to), _| *from != gpu && *to != gpu);
    }

    /// Figures of the scratch pools that links have on the GPU that they lead to.
    pub(crate) fn scratch(&self, to: GpuIndex) -> Vec<ScratchFigures> {
        let known = self.known();
        let into = known.iter().filter(|((_, target), _)| *target == to);
        let scratch = |found: &Found| match found {
            Found::Open(link) => Some(link.scratch()),
            Found::Never | Found::NotAt(_) => None,
        };
        into.filter_map(|(_, finding)| finding.peek().and_then(scratch)).collect()
    }
}

/// Makes a link on a thread that may wait.
fn find(from: Arc<dyn Device>, to: Arc<dyn Device>) -> Finding {
    let made = tokio::task::spawn_blocking(move || match from.link_to(&*to) {
        Ok(link) => {
            tracing::info!(from = from.name(), to = to.name(), "a link between two GPUs");
            Found::Open(Arc::new(link))
        }
        Err(error @ LinkError::NotPossible { .. }) => {
            tracing::info!(%error, "no link between two GPUs");
            Found::Never
        }
        Err(error) => {
            tracing::warn!(%error, "no link between two GPUs");
            Found::NotAt(Instant::now())
        }
    });
    async move { made.await.unwrap_or_else(|_| Found::NotAt(Instant::now())) }.boxed().shared()
}

#[cfg(test)]
mod tests {
    use keepwarm_memory::{ArenaSettings, HostDevice};
    use keepwarm_types::Bytes;

    use super::*;

    fn board(index: u16) -> Board {
        let settings = ArenaSettings {
            extent: Bytes(1 << 20),
            ..ArenaSettings::new(format!("hbm:{index}"), Bytes(4 << 20))
        };
        Board::new(GpuIndex(index), Arc::new(HostDevice::new(&settings, Arc::default()).unwrap()))
    }

    #[tokio::test]
    async fn that_there_is_no_way_is_known_after_the_first_question() {
        let (ways, from, to) = (Ways::default(), board(0), board(1));
        assert!(ways.may_be(&from, &to));
        assert!(ways.open(&from, &to).await.is_none(), "a link between host devices");
        assert!(!ways.may_be(&from, &to) && ways.may_be(&to, &from), "each direction is a pair");
        assert!(ways.scratch(GpuIndex(1)).is_empty());
    }

    #[tokio::test]
    async fn what_was_given_up_or_is_fenced_is_not_asked_for() {
        let (ways, from, to) = (Ways::default(), board(0), board(1));
        ways.give_up(&from, &to);
        assert!(!ways.may_be(&from, &to) && ways.open(&from, &to).await.is_none());
        ways.close(GpuIndex(1));
        assert!(ways.may_be(&from, &to), "a pair that was closed is not known any more");
        to.device().fence("over");
        assert!(!ways.may_be(&from, &to) && !ways.may_be(&to, &from));
        assert!(ways.open(&from, &to).await.is_none());
        assert!(ways.known().is_empty(), "a fenced GPU was asked for a link");
    }
}
