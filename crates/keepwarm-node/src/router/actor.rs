//! The shell around the core's placement.

use std::num::NonZeroUsize;
use std::sync::Arc;

use keepwarm_core::placement::{GpuLoad, choose};
use keepwarm_types::{GpuIndex, SessionKey, Source};
use lru::LruCache;
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::message::{History, RouterMsg};
use crate::gpu::Board;

/// Sessions whose home and moves are remembered: some 2 KiB each with a full list of moves, 200 MiB at most.
const HISTORIES_MAX: NonZeroUsize = NonZeroUsize::new(100_000).expect("not zero");
/// Moves that are remembered of one session.
const MOVES_MAX: usize = 32;

pub(crate) struct RouterActor;

pub(crate) struct RouterArgs {
    pub(crate) boards: Vec<Arc<Board>>,
}

pub(crate) struct RouterState {
    boards: Vec<Arc<Board>>,
    histories: LruCache<SessionKey, History>,
}

impl Actor for RouterActor {
    type Msg = RouterMsg;
    type State = RouterState;
    type Arguments = RouterArgs;

    async fn pre_start(
        &self,
        _: ActorRef<RouterMsg>,
        args: RouterArgs,
    ) -> Result<RouterState, ActorProcessingErr> {
        Ok(RouterState { boards: args.boards, histories: LruCache::new(HISTORIES_MAX) })
    }

    async fn handle(
        &self,
        _: ActorRef<RouterMsg>,
        message: RouterMsg,
        state: &mut RouterState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RouterMsg::Place { key, wish, near, needs, reply } => {
                let seen = |key: &SessionKey| state.histories.peek(key).and_then(|history| history.home);
                let warm = seen(&key).or_else(|| near.as_ref().and_then(seen));
                let loads: Vec<GpuLoad> = state.boards.iter().map(|board| board.load()).collect();
                let _ = reply.send(choose(&loads, wish, warm, needs));
            }
            RouterMsg::Homed(key, gpu) => state.history(key).home = Some(gpu),
            RouterMsg::Moved(key, moved) => {
                let moves = &mut state.history(key).moves;
                if moves.len() >= MOVES_MAX {
                    moves.remove(0);
                }
                moves.push(moved);
            }
            RouterMsg::Found(key, source, why) => {
                let history = state.history(key);
                if source == Source::None {
                    count(&mut history.misses, why);
                } else {
                    count(&mut history.hits, source);
                }
            }
            RouterMsg::Forget(key) => {
                state.histories.pop(&key);
            }
            RouterMsg::Recall(key, reply) => {
                let _ = reply.send(state.histories.get(&key).cloned().unwrap_or_default());
            }
        }
        Ok(())
    }
}

impl RouterState {
    fn history(&mut self, key: SessionKey) -> &mut History {
        self.histories.get_or_insert_mut(key, History::default)
    }
}

fn count<T: PartialEq>(counts: &mut Vec<(T, u64)>, what: T) {
    match counts.iter_mut().find(|(counted, _)| *counted == what) {
        Some((_, count)) => *count += 1,
        None => counts.push((what, 1)),
    }
}

/// The index of a GPU in a list of them.
pub(crate) const fn gpu_index(place: usize) -> GpuIndex {
    GpuIndex(place as u16)
}
