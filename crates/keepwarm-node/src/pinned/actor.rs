//! The shell around the pinned tier's residency.

use std::sync::Arc;

use keepwarm_core::residency::{Residency, ResidencyCommand, ResidencyEvent, Resident};
use keepwarm_memory::Arena;
use keepwarm_types::{Bytes, Millis, Tier};
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::message::{PinnedMsg, Pool, Reserve};
use crate::clock::now;
use crate::handle::PinnedInfo;
use crate::links::Links;
use crate::metrics::Metrics;
use crate::room::{Room, Want};
use crate::shard::ShardMsg;

/// How long a write waits for room: long enough for a committed eviction or two, short of a client's patience.
pub(crate) const ROOM_WAIT: Millis = Millis(5000);
/// One part in this many of the arena is kept from clients, for checkpoints.
const KEPT_SHARE: u64 = 20;

pub(crate) struct PinnedActor;

pub(crate) struct PinnedArgs {
    pub(crate) arena: Arena,
    pub(crate) residency: Residency,
    /// The share of the arena that other nodes' sessions may fill while there is room to spare.
    pub(crate) low: f64,
    pub(crate) links: Arc<Links>,
    pub(crate) metrics: Arc<Metrics>,
}

pub(crate) struct PinnedState {
    room: Room,
    kept: Bytes,
    spare: Bytes,
    links: Arc<Links>,
    metrics: Arc<Metrics>,
}

impl Actor for PinnedActor {
    type Msg = PinnedMsg;
    type State = PinnedState;
    type Arguments = PinnedArgs;

    async fn pre_start(
        &self,
        _: ActorRef<PinnedMsg>,
        args: PinnedArgs,
    ) -> Result<PinnedState, ActorProcessingErr> {
        let reserved = args.arena.figures().reserved;
        let kept = Bytes(reserved.0 / KEPT_SHARE);
        let spare = reserved.saturating_sub(Bytes((reserved.0 as f64 * args.low) as u64));
        let room = Room::new(args.arena, args.residency, Tier::Pinned);
        Ok(PinnedState { room, kept, spare, links: args.links, metrics: args.metrics })
    }

    async fn handle(
        &self,
        _: ActorRef<PinnedMsg>,
        message: PinnedMsg,
        state: &mut PinnedState,
    ) -> Result<(), ActorProcessingErr> {
        let now = now();
        let evictions = match message {
            PinnedMsg::Reserve(reserve) => {
                let kept = match reserve.pool {
                    Pool::Client => state.kept,
                    Pool::Spare => state.spare,
                    Pool::Restore | Pool::SpillIn | Pool::ReplicaIn => Bytes::ZERO,
                };
                let Reserve { owner, pool, sizes, deadline, reply } = reserve;
                let want = Want { owner, sizes, kept, deadline, reply };
                if pool == Pool::Spare {
                    state.room.at_once(want);
                    return Ok(());
                }
                state.room.want(now, want)
            }
            PinnedMsg::Reside(residence) if residence.bytes == Bytes::ZERO => {
                state.room.on(now, ResidencyEvent::Gone(residence.key))
            }
            PinnedMsg::Reside(residence) => {
                let used = residence.last_used_at.since(now).0 == 0;
                let resident = Resident {
                    birth: residence.birth,
                    bytes: residence.bytes,
                    dirty: false,
                    leased: residence.leased,
                    protected_until: residence.protected_until,
                    expires_at: residence.expires_at,
                };
                state.room.on(now, ResidencyEvent::Put { key: residence.key, resident, used })
            }
            PinnedMsg::EvictRefused(key) => state.room.on(now, ResidencyEvent::Refused(key)),
            PinnedMsg::Tick => state.room.tick(now),
            PinnedMsg::Info(reply) => {
                let _ = reply.send(PinnedInfo {
                    arena: state.room.arena.figures().into(),
                    locked: state.room.arena.locked().clone(),
                    sessions: state.room.residency.sessions() as u64,
                });
                return Ok(());
            }
        };
        for command in evictions {
            let ResidencyCommand::Evict { key, birth, why } = command else { continue };
            state.metrics.evicted(Tier::Pinned, why);
            if let Ok(shard) = state.links.shard(&key) {
                let _ = shard.cast(ShardMsg::Evict { key, birth, why });
            }
        }
        Ok(())
    }
}
