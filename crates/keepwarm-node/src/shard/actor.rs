//! The shell around the core's shard.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use keepwarm_catalog::Catalog;
use keepwarm_core::session::Protect;
use keepwarm_core::shard::{
    Answer, Command, Event, PersistError, Record, Request, RequestId, Shard, Ticket, Verb,
};
use keepwarm_memory::Block;
use keepwarm_types::{Birth, ColdReason, InstanceId, SessionKey, Timestamp};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::oneshot;

use super::message::{Answered, Ask, ShardMsg};
use crate::admission::Permit;
use crate::clock::now;
use crate::error::Error;
use crate::gpu::GpuMsg;
use crate::handle::Handle;
use crate::pinned::PinnedMsg;

pub(crate) struct ShardActor;

pub(crate) struct ShardArgs {
    pub(crate) core: Shard,
    pub(crate) catalog: Catalog,
    pub(crate) handle: Handle,
    /// When a tick is due, for the node's timer.
    pub(crate) deadline: Arc<AtomicU64>,
}

/// One guard per instance, and how many manifests and stages name it.
struct Named {
    block: Block,
    names: u32,
}

enum Waiting {
    Client { guards: Vec<Block>, reply: oneshot::Sender<Result<Answered, Error>>, _permit: Option<Permit> },
    Eviction(SessionKey),
}

pub(crate) struct ShardState {
    args: ShardArgs,
    named: HashMap<InstanceId, Named>,
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
        Ok(ShardState { args, named: HashMap::new(), waiting: HashMap::new(), next: 0 })
    }

    async fn handle(
        &self,
        myself: ActorRef<ShardMsg>,
        message: ShardMsg,
        state: &mut ShardState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ShardMsg::Ask(Ask { key, verb, guards, permit, reply }) => {
                state.ask(&myself, key, verb, Waiting::Client { guards, reply, _permit: permit });
            }
            ShardMsg::Evict { key, birth, why } => {
                tracing::debug!(%key, why = why.word(), "eviction proposed");
                let reason = ColdReason::Evicted;
                let waiting = Waiting::Eviction(key.clone());
                state.ask(&myself, key, Verb::GoCold { birth, reason, force: false }, waiting);
            }
            ShardMsg::Durable(ticket, Ok(())) => state.on(&myself, Event::Persisted(ticket)),
            ShardMsg::Durable(ticket, Err((error, records))) => {
                state.on(&myself, Event::PersistFailed(ticket, error, records));
            }
            ShardMsg::Tick => state.on(&myself, Event::Tick),
            ShardMsg::Count(reply) => {
                let _ = reply.send(state.args.core.len() as u64);
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
        self.on(myself, Event::Request(Request { id, key, verb }));
    }

    fn on(&mut self, myself: &ActorRef<ShardMsg>, event: Event) {
        for command in self.args.core.on(now(), event) {
            match command {
                Command::Persist(ticket, records) => self.persist(myself, ticket, records),
                Command::Adopt(request, instances) => self.adopt(request, &instances),
                Command::Retain(instances) => instances.iter().for_each(|instance| self.name(*instance)),
                Command::Release(instances) => instances.iter().for_each(|instance| self.unname(*instance)),
                Command::Reside(residence) => {
                    let forever = residence.protected_until == Timestamp::NEVER;
                    let protect = forever.then_some(Protect::Forever);
                    self.args.handle.inner().book.hold(&residence.key, protect, residence.bytes);
                    if let Ok(pinned) = self.args.handle.links().pinned() {
                        let _ = pinned.cast(PinnedMsg::Reside(residence));
                    }
                }
                Command::Invalidate(key, birth) => self.invalidate(&key, birth),
                Command::Ended(key) => self.args.handle.ended(key),
                Command::Reply(request, result) => self.reply(request, result),
            }
        }
    }

    fn persist(&self, myself: &ActorRef<ShardMsg>, ticket: Ticket, records: Vec<Record>) {
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
        let Some(Waiting::Client { guards, .. }) = self.waiting.get_mut(&request) else { return };
        for block in guards.drain(..) {
            debug_assert!(instances.contains(&block.instance()), "the core adopts what the request brought");
            self.named.insert(block.instance(), Named { block, names: 1 });
        }
    }

    fn name(&mut self, instance: InstanceId) {
        if let Some(named) = self.named.get_mut(&instance) {
            named.names += 1;
        }
    }

    fn unname(&mut self, instance: InstanceId) {
        if let Some(named) = self.named.get_mut(&instance) {
            named.names -= 1;
            if named.names == 0 {
                self.named.remove(&instance);
            }
        }
    }

    fn invalidate(&self, key: &SessionKey, birth: Birth) {
        for gpu in self.args.handle.links().gpus() {
            let _ = gpu.cast(GpuMsg::Drop { key: key.clone(), birth, reply: None });
        }
    }

    fn reply(&mut self, request: RequestId, result: Result<Box<Answer>, keepwarm_core::shard::Refusal>) {
        match self.waiting.remove(&request) {
            Some(Waiting::Client { reply, .. }) => {
                let answered = result.map_err(Error::from).and_then(|answer| {
                    let blocks = self.guards(&answer)?;
                    Ok(Answered { answer, blocks })
                });
                // A client that has gone away needs no answer.
                let _ = reply.send(answered);
            }
            Some(Waiting::Eviction(key)) => {
                if result.is_err()
                    && let Ok(pinned) = self.args.handle.links().pinned()
                {
                    let _ = pinned.cast(PinnedMsg::EvictRefused(key));
                }
            }
            None => {}
        }
    }

    /// Guards of what an answer names, made for its reader.
    fn guards(&self, answer: &Answer) -> Result<Vec<Block>, Error> {
        let guard = |instance: InstanceId, birth: Birth| {
            let named = self.named.get(&instance);
            let lost =
                || Error::Internal(format!("no guard of instance {} that a manifest names", instance.0));
            named.map(|named| named.block.share(birth)).ok_or_else(lost)
        };
        match answer {
            Answer::Read(grant) => {
                let parts = grant.manifest.parts.iter().enumerate();
                let wanted = parts.filter(|(index, _)| grant.part.is_none_or(|part| part == *index));
                let blocks = wanted.flat_map(|(_, part)| &part.blocks);
                blocks.map(|block| guard(block.instance, grant.manifest.birth)).collect()
            }
            Answer::Lease(grant) => {
                grant.manifest.instances().map(|block| guard(block.instance, grant.manifest.birth)).collect()
            }
            Answer::Plan(plan) => plan.tail.iter().map(|tail| guard(tail.instance, plan.birth)).collect(),
            _ => Ok(Vec::new()),
        }
    }
}
