//! Virtual time, the nodes, what happens to them, and the calls of clients.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use keepwarm_core::registry::{Entry, Member, Registry, RegistrySettings, ReplicaSet};
use keepwarm_core::replica::{CopyFailed, CopyId, Envelope, ReplicaEvent};
use keepwarm_core::session::{BlockRef, Manifest};
use keepwarm_core::shard::{Answer, Refusal, Verb};
use keepwarm_types::{
    Generation, Incarnation, InstanceId, Millis, SessionKey, ShardCount, ShardId, Timestamp,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::bug::Bug;
use super::faults::Fault;
use super::keys::Keys;
use super::node::{Node, Process};
use super::promises::Promises;
use super::{Options, invariants};
use crate::sim::memory::{Stamp, checksum};

/// What is remembered of the last happenings, for a failure's report.
const TRACE_LINES: usize = 60;
/// When the world begins.
pub const BEGIN: Timestamp = Timestamp(10_000_000);
/// How long a client waits for an answer.
pub const CLIENT_PATIENCE_MS: u64 = 7_000;

/// An answer, or none: the connection broke, or nobody answered for long.
pub enum Reply {
    Answered(Result<Box<Answer>, Refusal>, Pins),
    Lost,
}

/// What a reader holds, and in which process.
#[derive(Debug, Clone, Default)]
pub struct Pins {
    pub at: usize,
    pub life: u64,
    pub instances: Vec<InstanceId>,
}

/// Bytes on their way from one process to another.
#[derive(Debug)]
pub struct Transfer {
    pub id: CopyId,
    pub shard: ShardId,
    pub key: SessionKey,
    pub blocks: Vec<BlockRef>,
    pub source: Member,
    pub target: Member,
    /// Whether the receiver asked for them.
    pub fetched: bool,
    /// Whether it takes them only into room that it has to spare.
    pub spare: bool,
    /// What the source pinned when it began to send.
    pub pinned: bool,
}

/// What happens to one process.
#[derive(Debug)]
pub enum Local {
    Request { call: u64, key: SessionKey, verb: Verb, brought: Vec<InstanceId> },
    Message(Envelope),
    Event(ShardId, ReplicaEvent),
    Copied(ShardId, CopyId, Result<(), CopyFailed>),
    Sync,
    Tick(ShardId),
    Watch(ShardId, Arc<ReplicaSet>),
    Registered(Incarnation),
    RegisterAgain,
}

/// Who proposed an entry, and is to be told.
#[derive(Debug, Clone, Copy)]
pub struct Proposer {
    pub node: usize,
    pub life: u64,
    pub shard: Option<ShardId>,
}

#[derive(Debug)]
pub enum Happening {
    At { node: usize, life: u64, what: Local },
    Transfer(Box<Transfer>),
    Look { node: usize, life: u64, shard: ShardId, generation: Generation, round: u64 },
    Apply(Entry, Option<Proposer>),
    Follow,
    Plan,
    Detect,
    Fault(Fault),
    Mend(Fault),
    Restart(usize),
    Heal,
    Deliver { call: u64, reply: Reply },
    Timeout(u64),
    Wake,
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a reply")
    }
}

/// What differs from seed to seed.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub nodes: usize,
    pub shards: u32,
    pub replication: usize,
    pub degraded: bool,
    /// Messages lost and doubled, of a thousand.
    pub loss: u32,
    pub doubled: u32,
    /// Room in each node, in blocks.
    pub room: usize,
    /// All begin with the version before, and are started again one after another with the present one.
    pub rolling: bool,
}

/// Everything but the clients.
pub struct World {
    pub now: Timestamp,
    pub rng: ChaCha8Rng,
    pub shape: Shape,
    pub keys: Keys,
    pub nodes: Vec<Node>,
    pub lives: u64,
    pub registry: Registry,
    /// The registry answers nobody.
    pub stalled: bool,
    /// Nodes that are cut from the registry.
    pub astray: BTreeSet<usize>,
    /// Directed links that let nothing through.
    pub cut: BTreeMap<(usize, usize), u32>,
    /// Since when each node does not hear each other one.
    pub unheard: BTreeMap<(usize, usize), (Incarnation, Timestamp)>,
    pub promises: Promises,
    pub healed: bool,
    queue: BTreeMap<(Timestamp, u64), Happening>,
    pub next: u64,
    answers: BTreeMap<u64, Reply>,
    /// Calls without an answer, and since when.
    pub waiting: BTreeMap<u64, (String, Timestamp)>,
    pub options: Options,
    pub violation: Option<String>,
    trace: VecDeque<String>,
    /// Happenings so far.
    pub steps: u64,
    /// Answers by kind, for the report.
    pub answered: BTreeMap<&'static str, u64>,
}

/// A client's hold on the world.
#[derive(Clone)]
pub struct Shared(pub Rc<RefCell<World>>);

fn shape(rng: &mut ChaCha8Rng) -> Shape {
    let nodes = rng.random_range(3..=5);
    Shape {
        nodes,
        shards: if rng.random_range(0..3) == 0 { 2 } else { 1 },
        replication: if rng.random_range(0..4) == 0 { 1 } else { 2 },
        degraded: rng.random_range(0..3) > 0,
        loss: [0, 10, 60][rng.random_range(0..3)],
        doubled: [0, 20][rng.random_range(0..2)],
        room: if rng.random_range(0..4) == 0 { 40 } else { 400 },
        rolling: rng.random_range(0..4) == 0,
    }
}

impl World {
    pub fn new(options: Options) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        let mut shape = shape(&mut rng);
        if options.bug == Some(Bug::NotReconciled) {
            // What differs at a take-over is what got lost.
            shape.loss = 300;
        }
        if matches!(options.bug, Some(Bug::ConfirmedByOne | Bug::LeftWithCopies)) {
            (shape.nodes, shape.replication) = (5, 2);
        }
        let shards = ShardCount::new(shape.shards.into()).unwrap();
        let nodes = (0..shape.nodes).map(|index| Node::new(index, &mut rng)).collect();
        let mut world = Self {
            now: BEGIN,
            shape,
            keys: Keys { shards: shape.shards },
            nodes,
            lives: 0,
            registry: Registry::new(RegistrySettings { shards, replication: shape.replication }),
            stalled: false,
            astray: BTreeSet::new(),
            cut: BTreeMap::new(),
            unheard: BTreeMap::new(),
            promises: Promises::default(),
            healed: false,
            queue: BTreeMap::new(),
            next: 0,
            answers: BTreeMap::new(),
            waiting: BTreeMap::new(),
            options,
            violation: None,
            trace: VecDeque::new(),
            steps: 0,
            answered: BTreeMap::new(),
            rng: ChaCha8Rng::seed_from_u64(rng.random()),
        };
        for node in 0..shape.nodes {
            world.after(rng.random_range(0..20), Happening::Restart(node));
        }
        world.after(50, Happening::Follow);
        world.after(60, Happening::Plan);
        world.after(50, Happening::Detect);
        world.plan_faults(&mut rng);
        world.say(|| format!("{shape:?}"));
        world
    }

    pub fn after(&mut self, millis: u64, happening: Happening) {
        self.next += 1;
        self.queue.insert((self.now + Millis(millis), self.next), happening);
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.rng.random_range(0..end)
    }

    /// True so many times in a thousand.
    pub fn chance(&mut self, of_a_thousand: u32) -> bool {
        of_a_thousand > 0 && self.rng.random_range(0..1000) < of_a_thousand
    }

    pub fn bug(&self, bug: Bug) -> bool {
        self.options.bug == Some(bug)
    }

    #[allow(clippy::print_stdout, reason = "asked for with --verbose")]
    pub fn say(&mut self, line: impl FnOnce() -> String) {
        if !self.options.verbose && !self.options.traced {
            return;
        }
        let line = format!("{:>7} {}", self.now.0 - BEGIN.0, line());
        if self.options.verbose {
            println!("{line}");
        }
        if self.trace.len() == TRACE_LINES {
            self.trace.pop_front();
        }
        self.trace.push_back(line);
    }

    #[must_use]
    pub fn trace(&self) -> String {
        self.trace.iter().map(|line| format!("{line}\n")).collect()
    }

    /// Notes the first thing that must not be.
    pub fn check(&mut self, result: Result<(), String>) {
        if let Err(violation) = result
            && self.violation.is_none()
        {
            self.say(|| format!("VIOLATION {violation}"));
            self.violation = Some(violation);
        }
    }

    /// Lets the next thing happen; false when nothing is left.
    pub fn step(&mut self) -> bool {
        let Some(((at, _), happening)) = self.queue.pop_first() else { return false };
        self.now = at;
        self.steps += 1;
        self.happen(happening);
        let checked = invariants::answered::check(self);
        self.check(checked);
        true
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::At { node, life, what } => self.at(node, life, what),
            Happening::Transfer(transfer) => self.transferred(*transfer),
            Happening::Look { node, life, shard, generation, round } => {
                self.look(node, life, shard, generation, round);
            }
            Happening::Apply(entry, proposer) => self.apply(&entry, proposer),
            Happening::Follow => self.follow(),
            Happening::Plan => self.plan(),
            Happening::Detect => self.detect(),
            Happening::Fault(fault) => self.fault(fault),
            Happening::Mend(fault) => self.mend(fault),
            Happening::Restart(node) => self.restart(node),
            Happening::Heal => self.heal(),
            Happening::Deliver { call, reply } => self.deliver(call, reply),
            Happening::Timeout(call) => self.deliver(call, Reply::Lost),
            Happening::Wake => {}
        }
    }

    /// Something happens to a process, if it is still that one; a paused one finds it when it goes on.
    fn at(&mut self, node: usize, life: u64, what: Local) {
        let Some(process) = self.process(node, life) else {
            if let Local::Request { call, .. } = what {
                self.lose(call);
            }
            return;
        };
        if process.paused {
            process.backlog.push(what);
            return;
        }
        self.local(node, what);
    }

    pub fn local(&mut self, node: usize, what: Local) {
        match what {
            Local::Request { call, key, verb, brought } => self.request(node, call, key, verb, brought),
            Local::Message(envelope) => self.receive(node, envelope),
            Local::Event(shard, event) => self.on(node, shard, event),
            Local::Copied(shard, id, result) => self.on(node, shard, ReplicaEvent::Copied(id, result)),
            Local::Sync => self.sync(node),
            Local::Tick(shard) => self.tick(node, shard),
            Local::Watch(shard, set) => self.on(node, shard, ReplicaEvent::Set(set)),
            Local::Registered(incarnation) => self.registered(node, incarnation),
            Local::RegisterAgain => self.register(node),
        }
    }

    pub fn process(&mut self, node: usize, life: u64) -> Option<&mut Process> {
        self.nodes[node].process.as_mut().filter(|process| process.life == life)
    }

    /// Whether nothing from one node reaches the other.
    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        from != to && self.cut.get(&(from, to)).is_some_and(|times| *times > 0)
    }

    pub fn deliver(&mut self, call: u64, reply: Reply) {
        if self.waiting.remove(&call).is_some() {
            self.answers.insert(call, reply);
        } else if let Reply::Answered(_, pins) = reply {
            self.unpin(&pins);
        }
    }

    pub fn lose(&mut self, call: u64) {
        if self.waiting.contains_key(&call) {
            let wait = self.below(10);
            self.after(wait, Happening::Deliver { call, reply: Reply::Lost });
        }
    }

    pub fn unpin(&mut self, pins: &Pins) {
        if let Some(process) = self.process(pins.at, pins.life) {
            pins.instances.iter().for_each(|instance| process.memory.unpin(*instance));
        }
    }
}

impl Shared {
    pub fn with<T>(&self, act: impl FnOnce(&mut World) -> T) -> T {
        act(&mut self.0.borrow_mut())
    }

    pub fn below(&self, end: u64) -> u64 {
        self.with(|world| world.below(end))
    }

    /// Lets virtual time pass.
    pub async fn pause(&self, millis: u64) {
        let until = self.with(|world| {
            world.after(millis, Happening::Wake);
            world.now + Millis(millis)
        });
        poll_fn(|_| if self.with(|world| world.now >= until) { Poll::Ready(()) } else { Poll::Pending })
            .await;
    }

    /// Sends a verb to a node and waits for its answer, or for the news that there will be none.
    pub async fn call(&self, at: usize, key: &SessionKey, verb: Verb, brought: Vec<InstanceId>) -> Reply {
        let call = self.with(|world| {
            world.next += 1;
            let call = world.next;
            world.waiting.insert(call, (format!("{key} {}", word(&verb)), world.now));
            world.say(|| format!("call {call} to n{}: {key} {}", at + 1, word(&verb)));
            let wait = 1 + world.below(6);
            world.after(CLIENT_PATIENCE_MS, Happening::Timeout(call));
            match world.nodes[at].process.as_ref().map(|process| process.life) {
                Some(life) => {
                    let what = Local::Request { call, key: key.clone(), verb, brought };
                    world.after(wait, Happening::At { node: at, life, what });
                }
                None => world.lose(call),
            }
            call
        });
        let answer = |world: &mut World| world.answers.remove(&call).map_or(Poll::Pending, Poll::Ready);
        poll_fn(|_| self.with(answer)).await
    }

    /// Takes blocks for a write at a node; none where it has no room.
    pub fn take(
        &self,
        at: usize,
        life: u64,
        key: &SessionKey,
        contents: &[Vec<Stamp>],
        unit: u64,
    ) -> Option<Vec<BlockRef>> {
        self.with(|world| {
            let process = world.process(at, life)?;
            if !process.memory.has_room(contents.len()) {
                return None;
            }
            let mut taken = Vec::new();
            for content in contents {
                let instance = process.memory.take(content.clone(), (key.tenant.clone(), key.id))?;
                let length = u32::try_from(content.len() as u64 * unit).expect("a block is small");
                taken.push(BlockRef { instance, checksum: checksum(content), length });
            }
            Some(taken)
        })
    }

    pub fn done(&self, pins: &Pins) {
        self.with(|world| world.unpin(pins));
    }

    /// The verified content of a block that is pinned; none where the process has gone with it.
    pub fn read(&self, block: &BlockRef, pins: &Pins) -> Option<Result<Vec<Stamp>, Vec<Stamp>>> {
        self.with(|world| {
            let content = world.process(pins.at, pins.life)?.memory.read(block.instance);
            if checksum(&content) == block.checksum { Some(Ok(content)) } else { Some(Err(content)) }
        })
    }
}

/// The transcript as the answering node's catalog has it, where that is of the same state.
#[must_use]
pub fn stored_transcript(world: &World, at: usize, manifest: &Manifest) -> Option<Vec<u32>> {
    let store = &world.nodes[at].disk.store;
    let stored = store.manifests.get(&manifest.key)?;
    let name = (manifest.key.clone(), manifest.birth);
    (stored.stamp == manifest.stamp).then(|| store.transcripts.get(&name).cloned().unwrap_or_default())
}

pub fn word(verb: &Verb) -> String {
    let text = format!("{verb:?}");
    text.chars().take(60).collect()
}
