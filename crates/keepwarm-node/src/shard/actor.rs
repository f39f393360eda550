//! The shell around the core's replica.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use keepwarm_catalog::Catalog;
use keepwarm_core::replica::{Replica, ReplicaCommand, ReplicaEvent, Role};
use keepwarm_core::session::Protect;
use keepwarm_core::shard::{
    Answer, Command, PersistError, Record, Refusal, Request, RequestId, Ticket, Verb,
};
use keepwarm_memory::Block;
use keepwarm_types::{Birth, InstanceId, SessionKey, Timestamp};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use super::guards::Guards;
use super::message::{Answered, Ask, ShardFigures, ShardMsg};
use super::peers;
use crate::admission::Permit;
use crate::clock::now;
use crate::cluster::Whose;
use crate::error::Error;
use crate::gpu::GpuMsg;
use crate::handle::Handle;
use crate::pinned::PinnedMsg;

pub(crate) struct ShardActor;

pub(crate) struct ShardArgs {
    pub(crate) core: Replica,
    pub(crate) catalog: Catalog,
    pub(crate) handle: Handle,
    /// When a tick is due, for the node's timer.
    pub(crate) deadline: Arc<AtomicU64>,
}

/// A client's request.
struct Waiting {
    guards: Vec<Block>,
    reply: oneshot::Sender<Result<Answered, Error>>,
    /// The answer, until it may be given.
    held: Option<Result<Answered, Error>>,
    _permit: Option<Permit>,
}

pub(crate) struct ShardState {
    pub(super) args: ShardArgs,
    pub(super) guards: Guards,
    waiting: HashMap<RequestId, Waiting>,
    next: u64,
}

impl Actor for ShardActor {
    type Msg = ShardMsg;
    type State = ShardState;
    type Arguments = ShardArgs;

    async fn pre_start(
        &self,
        _: ActorRef<ShardMsg>,
        args: ShardArgs,
    ) -> Result<ShardState, ActorProcessingErr> {
        args.deadline.store(args.core.next_deadline().0, Ordering::Relaxed);
        Ok(ShardState { args, guards: Guards::default(), waiting: HashMap::new(), next: 0 })
    }

    async fn handle(
        &self,
        myself: ActorRef<ShardMsg>,
        message: ShardMsg,
        state: &mut ShardState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ShardMsg::Ask(Ask { key, verb, guards, permit, reply }) => {
                let waiting = Waiting { guards, reply, held: None, _permit: permit };
                state.ask(&myself, key, verb, waiting);
            }
            ShardMsg::Evict { key, birth, why } => {
                tracing::debug!(%key, why = why.word(), "eviction proposed");
                state.on(&myself, ReplicaEvent::Evict(key, birth));
            }
            ShardMsg::Durable(ticket, Ok(())) => {
                state.args.handle.inner().disk.answered(true);
                state.on(&myself, ReplicaEvent::Persisted(ticket));
            }
            ShardMsg::Durable(ticket, Err((error, records))) => {
                state.args.handle.inner().disk.answered(false);
                state.on(&myself, ReplicaEvent::PersistFailed(ticket, error, records));
            }
            ShardMsg::Peer(envelope, _permit) => state.on(&myself, ReplicaEvent::Peer(envelope)),
            ShardMsg::Set(set) => state.on(&myself, ReplicaEvent::Set(set)),
            ShardMsg::Leaves(generation, member) => {
                state.on(&myself, ReplicaEvent::Leaves(generation, member));
            }
            ShardMsg::Linked(member) => state.on(&myself, ReplicaEvent::Linked(member)),
            ShardMsg::Arrived(key, blocks, kept) => {
                let instances = blocks.iter().map(Block::instance).collect();
                blocks.into_iter().for_each(|block| state.guards.take(block));
                state.on(&myself, ReplicaEvent::Arrived(key, instances));
                let _ = kept.send(());
            }
            ShardMsg::Copied(id, result) => {
                let result =
                    result.map(|blocks| blocks.into_iter().for_each(|block| state.guards.take(block)));
                state.on(&myself, ReplicaEvent::Copied(id, result));
            }
            ShardMsg::Lend(blocks, birth, reply) => {
                let _ = reply.send(state.guards.all(&blocks, birth));
            }
            ShardMsg::RegistryConfirmed(round) => {
                state.on(&myself, ReplicaEvent::RegistryConfirmed { round });
            }
            ShardMsg::ProposalFailed(generation) => {
                state.on(&myself, ReplicaEvent::ProposalFailed(generation));
            }
            ShardMsg::Tick => state.on(&myself, ReplicaEvent::Tick),
            ShardMsg::Count(reply) => {
                let core = &state.args.core;
                let _ = reply.send(ShardFigures {
                    sessions: core.len() as u64,
                    role: core.role(),
                    set: Arc::clone(core.set()),
                    under_replicated: core.under_replicated() as u64,
                    needed: core.needed_here() as u64,
                });
            }
            ShardMsg::Panic => panic!("a panic was asked for"),
        }
        state.args.deadline.store(state.args.core.next_deadline().0, Ordering::Relaxed);
        Ok(())
    }
}

impl ShardState {
    fn ask(&mut self, myself: &ActorRef<ShardMsg>, key: SessionKey, verb: Verb, waiting: Waiting) {
        self.next += 1;
        let id = RequestId(self.next);
        self.waiting.insert(id, waiting);
        self.on(myself, ReplicaEvent::Request(Request { id, key, verb }));
    }

    fn on(&mut self, myself: &ActorRef<ShardMsg>, event: ReplicaEvent) {
        let office = self.args.core.role() == Role::Primary;
        let commands = self.args.core.on(now(), event);
        match (office, self.args.core.role() == Role::Primary) {
            (false, true) => self.count_sessions(true),
            (true, false) => self.count_sessions(false),
            _ => {}
        }
        for command in commands {
            self.carry_out(myself, command);
        }
    }

    /// Sessions count against their tenants' quotas where their shard's primary is.
    fn count_sessions(&self, here: bool) {
        let book = &self.args.handle.inner().book;
        for (key, protect) in self.args.core.sessions() {
            if here {
                book.recovered(&key.tenant);
                book.hold(key, Some(protect), keepwarm_types::Bytes::ZERO);
            } else {
                book.end(&key.tenant);
            }
        }
    }

    fn carry_out(&mut self, myself: &ActorRef<ShardMsg>, command: ReplicaCommand) {
        match command {
            ReplicaCommand::Shard(command) => self.carry_out_shards(command),
            ReplicaCommand::Persist(ticket, records) => self.persist(myself, ticket, records),
            ReplicaCommand::Reply(request, result) => self.reply(request, result),
            ReplicaCommand::Hold(request, result) => {
                let answered = self.answered(result);
                if let Some(waiting) = self.waiting.get_mut(&request) {
                    waiting.held = Some(answered);
                }
            }
            ReplicaCommand::Deliver(request) => {
                if let Some(Waiting { reply, held: Some(answered), .. }) = self.waiting.remove(&request) {
                    // A client that has gone away needs no answer.
                    let _ = reply.send(answered);
                }
            }
            ReplicaCommand::Refuse(request, refusal) => self.reply(request, Err(refusal)),
            ReplicaCommand::Send(envelope) => peers::send(&self.args.handle, envelope),
            ReplicaCommand::SendWhole(envelope) => {
                peers::send_whole(&self.args.handle, &self.args.catalog, envelope);
            }
            ReplicaCommand::Stays(key) => {
                if let Ok(pinned) = self.args.handle.links().pinned() {
                    let _ = pinned.cast(PinnedMsg::EvictRefused(key));
                }
            }
            ReplicaCommand::Took(member, delay) => {
                let pace = &self.args.handle.inner().pace;
                pace.lock().unwrap_or_else(PoisonError::into_inner).took(now(), &member, delay);
            }
            ReplicaCommand::Copy { id, to, key, birth, blocks, spare } => {
                let guards = self.guards.all(&blocks, birth);
                let whose = Whose { generation: self.args.core.set().generation, key, birth, spare };
                let moved = peers::Moved { id, with: to, whose, blocks };
                peers::copy(&self.args.handle, myself, moved, guards);
            }
            ReplicaCommand::Fetch { id, from, key, birth, blocks, spare } => {
                let whose = Whose { generation: self.args.core.set().generation, key, birth, spare };
                peers::fetch(&self.args.handle, myself, peers::Moved { id, with: from, whose, blocks });
            }
            ReplicaCommand::Propose(change) => {
                peers::propose(&self.args.handle, myself, self.args.core.id(), self.args.core.set(), change);
            }
            ReplicaCommand::ConfirmRegistry { round } => {
                peers::confirm(&self.args.handle, myself, self.args.core.id(), self.args.core.set(), round);
            }
        }
    }

    fn carry_out_shards(&mut self, command: Command) {
        match command {
            Command::Adopt(request, instances) => self.adopt(request, &instances),
            Command::Retain(instances) => self.guards.retain(&instances),
            Command::Release(instances) => self.guards.release(&instances),
            Command::Reside(residence) => {
                let forever = residence.protected_until == Timestamp::NEVER;
                let protect = forever.then_some(Protect::Forever);
                self.args.handle.inner().book.hold(&residence.key, protect, residence.stored);
                if let Ok(pinned) = self.args.handle.links().pinned() {
                    let _ = pinned.cast(PinnedMsg::Reside(residence));
                }
            }
            Command::Invalidate(key, birth) => self.invalidate(&key, birth),
            Command::Ended(key) => self.args.handle.ended(key),
            Command::Persist(..) | Command::Reply(..) | Command::Again(_) => {
                tracing::error!("the replica passed on what it carries out itself");
            }
        }
    }

    fn persist(&self, myself: &ActorRef<ShardMsg>, ticket: Ticket, records: Vec<Record>) {
        self.args.handle.inner().disk.asked();
        let to = myself.clone();
        let done = Box::new(move |outcome| {
            // A shard that has ended is recovered from what was persisted.
            let _ = to.cast(ShardMsg::Durable(ticket, outcome));
        });
        if let Err(refused) = self.args.catalog.submit(records, done) {
            let _ = myself.cast(ShardMsg::Durable(ticket, Err((PersistError::NotApplied, refused.0))));
        }
    }

    fn adopt(&mut self, request: RequestId, instances: &[InstanceId]) {
        let Some(waiting) = self.waiting.get_mut(&request) else { return };
        for block in waiting.guards.drain(..) {
            debug_assert!(instances.contains(&block.instance()), "the core adopts what the request brought");
            self.guards.take(block);
        }
    }

    fn invalidate(&self, key: &SessionKey, birth: Birth) {
        for gpu in self.args.handle.links().gpus() {
            let _ = gpu.cast(GpuMsg::Drop { key: key.clone(), birth, reply: None });
        }
    }

    fn answered(&self, result: Result<Box<Answer>, Refusal>) -> Result<Answered, Error> {
        let answer = result.map_err(Error::from)?;
        let blocks = self.guards.of(&answer)?;
        Ok(Answered { answer, blocks })
    }

    fn reply(&mut self, request: RequestId, result: Result<Box<Answer>, Refusal>) {
        if let Some(Waiting { reply, .. }) = self.waiting.remove(&request) {
            // A client that has gone away needs no answer.
            let _ = reply.send(self.answered(result));
        }
    }
}
