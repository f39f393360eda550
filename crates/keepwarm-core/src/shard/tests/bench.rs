//! A shard with a catalog that the test answers for, and a count of every reference.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use keepwarm_types::{
    Birth, BlockChecksum, Bytes, Generation, GpuIndex, Incarnation, InstanceId, LeaseId, Millis, SessionId,
    SessionKey, ShardCount, ShardId, Timestamp, TxnId,
};
use uuid::Uuid;

use crate::registry::Member;
use crate::session::{BlockRef, Form, Home, Labels, Layout, Order, Part, Planes, Protect};
use crate::shard::{
    Answer, Command, Create, Event, PersistError, PlanWrite, Precondition, Record, Refusal, Request,
    RequestId, Shard, ShardSettings, Ticket, Verb, Write, WriteMode, WritePlan, Written,
};

pub(super) type Reply = Result<Box<Answer>, Refusal>;

/// Tokens in a block and bytes per token of the test layouts.
pub(super) const TOKENS_PER_BLOCK: u32 = 4;
pub(super) const TOKEN_BYTES: u32 = 10;

pub(super) struct Bench {
    pub(super) shard: Shard,
    pub(super) now: Timestamp,
    /// References per instance, as the shell would count them.
    pub(super) names: HashMap<InstanceId, u32>,
    pub(super) catalog: VecDeque<(Ticket, Vec<Record>)>,
    pub(super) replies: HashMap<RequestId, Reply>,
    pub(super) invalidated: Vec<Birth>,
    next: u64,
}

pub(super) fn settings() -> ShardSettings {
    ShardSettings {
        shard: ShardId(0),
        count: ShardCount::new(1).unwrap(),
        member: Member { node: "n1".parse().unwrap(), incarnation: Incarnation(2) },
        generation: Generation(3),
        begun: 0,
    }
}

pub(super) fn key(n: u128) -> SessionKey {
    SessionKey::new(
        "acme".parse().unwrap(),
        SessionId::new(Uuid::from_u128(0x4000_8000_0000_0000_0000 + n)).unwrap(),
    )
}

pub(super) fn paged(name: &str, order: Order) -> Part {
    let planes = Planes {
        tokens_per_block: TOKENS_PER_BLOCK,
        planes: 2,
        plane_bytes_per_token: TOKEN_BYTES / 2,
        order,
    };
    Part { name: name.parse().unwrap(), form: Form::Paged(planes), cold: None }
}

pub(super) fn layout(parts: Vec<Part>) -> Arc<Layout> {
    Arc::new(Layout::new("model", "print", parts).unwrap())
}

pub(super) fn home() -> Home {
    Home { node: "n1".parse().unwrap(), gpu: GpuIndex(0) }
}

pub(super) fn lease(n: u128) -> LeaseId {
    LeaseId(Uuid::from_u128(n))
}

pub(super) fn txn(n: u128) -> TxnId {
    TxnId(Uuid::from_u128(n))
}

impl Bench {
    pub(super) fn new() -> Self {
        Self {
            shard: Shard::new(settings()),
            now: Timestamp(1_000_000),
            names: HashMap::new(),
            catalog: VecDeque::new(),
            replies: HashMap::new(),
            invalidated: Vec::new(),
            next: 0,
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn on(&mut self, event: Event) {
        let commands = self.shard.on(self.now, event);
        self.shard.validate();
        for command in commands {
            match command {
                Command::Persist(ticket, records) => self.catalog.push_back((ticket, records)),
                Command::Adopt(_, instances) => {
                    for instance in instances {
                        assert!(self.names.insert(instance, 1).is_none(), "{instance:?} adopted twice");
                    }
                }
                Command::Retain(instances) => {
                    for instance in instances {
                        *self.names.get_mut(&instance).expect("only what is named can be retained") += 1;
                    }
                }
                Command::Release(instances) => {
                    for instance in instances {
                        let count =
                            self.names.get_mut(&instance).expect("only what is named can be released");
                        *count -= 1;
                        if *count == 0 {
                            self.names.remove(&instance);
                        }
                    }
                }
                Command::Reside(_) | Command::Ended(_) => {}
                Command::Again(request) => panic!("a shard alone lacks bytes for {request:?}"),
                Command::Invalidate(_, birth) => self.invalidated.push(birth),
                Command::Reply(id, reply) => {
                    assert!(self.replies.insert(id, reply).is_none(), "{id:?} answered twice");
                }
            }
        }
    }

    /// Sends a verb without letting the catalog answer.
    pub(super) fn send(&mut self, key: &SessionKey, verb: Verb) -> RequestId {
        let id = RequestId(self.fresh());
        self.on(Event::Request(Request { id, key: key.clone(), verb }));
        id
    }

    pub(super) fn persist_all(&mut self) {
        while let Some((ticket, _)) = self.catalog.pop_front() {
            self.on(Event::Persisted(ticket));
        }
    }

    pub(super) fn fail_one(&mut self, error: PersistError) {
        let (ticket, records) = self.catalog.pop_front().expect("something is on its way");
        self.on(Event::PersistFailed(ticket, error, records));
    }

    pub(super) fn reply(&mut self, id: RequestId) -> Reply {
        self.replies.remove(&id).expect("the request was answered")
    }

    /// Sends a verb, lets the catalog take what it must, and gives the answer.
    pub(super) fn ask(&mut self, key: &SessionKey, verb: Verb) -> Reply {
        let id = self.send(key, verb);
        self.persist_all();
        self.reply(id)
    }

    pub(super) fn create(&mut self, key: &SessionKey, layout: &Arc<Layout>) -> Reply {
        let birth = Birth::from_random(self.fresh());
        let (layout, protect) = (Arc::clone(layout), Protect::For(Millis(1000)));
        self.ask(
            key,
            Verb::Create(Create { layout, birth, protect, ttl: Some(Millis(60_000)), labels: Labels::new() }),
        )
    }

    pub(super) fn plan(
        &mut self,
        key: &SessionKey,
        part: &str,
        mode: WriteMode,
        precondition: Precondition,
    ) -> Result<WritePlan, Refusal> {
        let plan = PlanWrite { part: part.to_owned(), mode, precondition, body: None, txn: None };
        match *self.ask(key, Verb::PlanWrite(plan))? {
            Answer::Plan(plan) => Ok(*plan),
            other => panic!("not a plan: {other:?}"),
        }
    }

    /// A write of `bytes` more bytes as the shell would lay it from a plan.
    pub(super) fn laid(
        &mut self,
        part: &str,
        mode: WriteMode,
        plan: &WritePlan,
        bytes: u64,
        txn: Option<TxnId>,
        precondition: Precondition,
    ) -> Write {
        let mut left = u64::from(plan.tail_bytes) + bytes;
        let mut blocks = Vec::new();
        while left > 0 {
            let length = left.min(plan.block_bytes);
            let instance = InstanceId(self.fresh());
            let checksum = BlockChecksum::from_u128(instance.0.into());
            let stored = u32::try_from(plan.part.stored_bytes(length)).unwrap();
            blocks.push(BlockRef { instance, checksum, length: stored });
            left -= length;
        }
        Write {
            part: part.to_owned(),
            birth: plan.birth,
            tail: plan.tail.map(|tail| tail.instance),
            mode,
            precondition,
            txn,
            first_block: plan.first_block,
            blocks,
            length: Bytes(plan.base.0 + u64::from(plan.tail_bytes) + bytes),
            digest: None,
            asked: bytes,
        }
    }

    pub(super) fn append(
        &mut self,
        key: &SessionKey,
        part: &str,
        offset: u64,
        bytes: u64,
    ) -> Result<Written, Refusal> {
        let mode = WriteMode::Append { offset };
        let plan = self.plan(key, part, mode, Precondition::default())?;
        let write = self.laid(part, mode, &plan, bytes, None, Precondition::default());
        written(self.ask(key, Verb::Write(write)))
    }
}

pub(super) fn written(reply: Reply) -> Result<Written, Refusal> {
    match *reply? {
        Answer::Written(written) => Ok(written),
        other => panic!("not a write: {other:?}"),
    }
}
