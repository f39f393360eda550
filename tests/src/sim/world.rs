//! Virtual time, one node, its disk, the network between it and its clients, and what goes wrong.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use keepwarm_core::session::{BlockRef, Manifest};
use keepwarm_core::shard::{Answer, Event, Refusal, Verb};
use keepwarm_types::{Birth, InstanceId, Millis, SessionKey, TenantName, Timestamp};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Options;
use super::bug::Bug;
use super::disk::Disk;
use super::invariants;
use super::memory::{POISON, Stamp, checksum};
use super::node::{Effect, Node};
use super::oracle::Oracle;

/// Virtual milliseconds within which every call is answered while the node is up.
pub const ANSWERED_WITHIN_MS: u64 = 30_000;
/// What is remembered of the last happenings, for a failure's report.
const TRACE_LINES: usize = 40;
const TICK_MS: u64 = 20;

/// An answer, or none: the node died with it.
pub enum Reply {
    Answered(Result<Box<Answer>, Refusal>, Pins),
    Lost,
}

/// What a reader holds, and of which run of the node.
#[derive(Debug, Clone, Default)]
pub struct Pins {
    life: u64,
    instances: Vec<InstanceId>,
}

enum Happening {
    Arrive { life: u64, call: u64, key: SessionKey, verb: Verb, brought: Vec<InstanceId> },
    Deliver { life: u64, call: u64, reply: Reply },
    Room { life: u64, call: u64, granted: bool },
    Sync { life: u64 },
    Evict { life: u64, key: SessionKey, birth: Birth },
    Tick,
    Wake,
    Crash,
    Restart,
    DiskFull(bool),
    DiskBreaks,
    Flip,
}

/// Everything but the clients.
pub struct World {
    pub now: Timestamp,
    pub rng: ChaCha8Rng,
    pub node: Option<Node>,
    pub disk: Disk,
    pub oracle: Oracle,
    pub life: u64,
    queue: BTreeMap<(Timestamp, u64), Happening>,
    next: u64,
    answers: BTreeMap<u64, Reply>,
    rooms: BTreeMap<u64, bool>,
    /// Calls without an answer, and since when.
    pub waiting: BTreeMap<u64, (String, Timestamp)>,
    syncing: bool,
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

impl World {
    pub fn new(options: Options) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        let disk = Disk::default();
        let now = Timestamp(1_000_000);
        let node = Node::start(1, now, &disk, options.bug);
        let mut world = Self {
            now,
            node: Some(node),
            disk,
            oracle: Oracle::default(),
            life: 1,
            queue: BTreeMap::new(),
            next: 0,
            answers: BTreeMap::new(),
            rooms: BTreeMap::new(),
            waiting: BTreeMap::new(),
            syncing: false,
            options,
            violation: None,
            trace: VecDeque::new(),
            steps: 0,
            answered: BTreeMap::new(),
            rng: ChaCha8Rng::seed_from_u64(rng.random()),
        };
        world.after(TICK_MS, Happening::Tick);
        if world.options.crash_at.is_none() {
            world.plan_faults(&mut rng);
        }
        world
    }

    fn plan_faults(&mut self, rng: &mut ChaCha8Rng) {
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(50..4_000);
            self.after(at, Happening::Crash);
        }
        for _ in 0..rng.random_range(0..3) {
            let at = rng.random_range(50..4_000);
            match rng.random_range(0..3) {
                0 => {
                    self.after(at, Happening::DiskFull(true));
                    self.after(at + rng.random_range(10..300), Happening::DiskFull(false));
                }
                1 => {
                    self.after(at, Happening::DiskBreaks);
                    self.after(at + rng.random_range(100..400), Happening::Crash);
                }
                _ => self.after(at, Happening::Flip),
            }
        }
    }

    fn after(&mut self, millis: u64, happening: Happening) {
        self.next += 1;
        self.queue.insert((self.now + Millis(millis), self.next), happening);
    }

    #[allow(clippy::print_stdout, reason = "asked for with --verbose")]
    pub fn say(&mut self, line: impl FnOnce() -> String) {
        let line = format!("{:>7} {}", self.now.0 - 1_000_000, line());
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
            self.violation = Some(violation);
        }
    }

    /// Lets the next thing happen; false when nothing is left.
    pub fn step(&mut self) -> bool {
        let Some(((at, _), happening)) = self.queue.pop_first() else { return false };
        self.now = at;
        self.steps += 1;
        self.happen(happening);
        if self.options.crash_at == Some(self.steps) {
            self.happen(Happening::Crash);
        }
        let checked = invariants::always(self);
        self.check(checked);
        true
    }

    fn happen(&mut self, happening: Happening) {
        let (now, here) = (self.now, self.life);
        let up = self.node.is_some();
        match happening {
            Happening::Arrive { life, call, key, verb, brought } if life == here && up => {
                self.say(|| format!("call {call} arrives: {key} {}", word(&verb)));
                self.node(|node, disk| node.ask(now, disk, call, key, verb, brought));
            }
            // The node that it was meant for is gone: its sender learns that from the connection.
            Happening::Arrive { call, .. } => self.lose(call),
            Happening::Deliver { life, call, reply } if life == here => {
                self.waiting.remove(&call);
                self.answers.insert(call, reply);
            }
            Happening::Room { life, call, granted } if life == here => {
                self.rooms.insert(call, granted);
            }
            Happening::Sync { life } if life == here && up => self.sync(),
            Happening::Evict { life, key, birth } if life == here && up => {
                self.say(|| format!("evict {key} {birth}"));
                self.node(|node, disk| node.evict(now, disk, key, birth));
            }
            Happening::Tick => {
                self.node(|node, disk| node.tick(now, disk));
                self.after(TICK_MS, Happening::Tick);
            }
            Happening::Crash if up => self.crash(),
            Happening::Restart if !up => {
                self.say(|| "restart".to_owned());
                self.life += 1;
                self.oracle.restarts += 1;
                self.node = Some(Node::start(self.life, now, &self.disk, self.options.bug));
            }
            Happening::DiskFull(full) => {
                self.say(|| format!("disk full: {full}"));
                self.disk.full = full;
            }
            Happening::DiskBreaks => {
                self.say(|| "the next sync fails".to_owned());
                self.disk.breaks = true;
            }
            Happening::Flip => {
                self.say(|| "a bit flips".to_owned());
                self.oracle.flips += 1;
                let choice = self.rng.random_range(0..1_000);
                if let Some(node) = &mut self.node {
                    node.memory.flip(choice);
                }
            }
            Happening::Wake
            | Happening::Deliver { .. }
            | Happening::Room { .. }
            | Happening::Sync { .. }
            | Happening::Evict { .. }
            | Happening::Crash
            | Happening::Restart => {}
        }
    }

    /// Lets the node do something, and carries its effects on.
    fn node(&mut self, act: impl FnOnce(&mut Node, &mut Disk) -> Vec<Effect>) {
        let Some(node) = &mut self.node else { return };
        let effects = act(node, &mut self.disk);
        let evicted = std::mem::take(&mut node.evicted);
        for (manifest, at) in evicted {
            let checked = invariants::protected::check(&self.oracle, &manifest, at);
            self.check(checked);
        }
        let life = self.life;
        for effect in effects {
            match effect {
                Effect::Sync if self.syncing => {}
                Effect::Sync => {
                    self.syncing = true;
                    let wait = self.rng.random_range(1..12);
                    self.after(wait, Happening::Sync { life });
                }
                Effect::Answer(call, reply, instances) => {
                    let kind = match &reply {
                        Ok(_) => "done",
                        Err(Refusal::OutcomeUnknown) => "unknown",
                        Err(_) => "refused",
                    };
                    *self.answered.entry(kind).or_default() += 1;
                    if self.options.bug == Some(Bug::AnswerLost) && self.rng.random_range(0..40) == 0 {
                        continue;
                    }
                    self.say(|| format!("call {call} answered: {}", shown(&reply)));
                    let reply = Reply::Answered(reply, Pins { life, instances });
                    let wait = self.rng.random_range(0..8);
                    self.after(wait, Happening::Deliver { life, call, reply });
                }
                Effect::Room(call, granted) => self.after(0, Happening::Room { life, call, granted }),
                Effect::Evict(key, birth) => {
                    let wait = self.rng.random_range(0..10);
                    self.after(wait, Happening::Evict { life, key, birth });
                }
            }
        }
    }

    fn sync(&mut self) {
        self.syncing = false;
        let luck = self.rng.random();
        let (now, bug) = (self.now, self.options.bug);
        for (ticket, outcome) in self.disk.sync(luck, bug) {
            let event = match outcome {
                Ok(()) => Event::Persisted(ticket),
                Err((error, records)) => Event::PersistFailed(ticket, error, records),
            };
            self.node(|node, disk| node.on(now, disk, event));
        }
        let checked = invariants::transcripts::check(&self.disk.store);
        self.check(checked);
    }

    fn crash(&mut self) {
        self.say(|| "crash".to_owned());
        let waiting = self.disk.waiting();
        let reached = self.rng.random_range(0..=waiting);
        self.disk.crash(reached, self.options.bug);
        self.node = None;
        self.syncing = false;
        self.life += 1;
        self.rooms.clear();
        for call in self.waiting.keys().copied().collect::<Vec<_>>() {
            self.lose(call);
        }
        let down = self.rng.random_range(5..100);
        self.after(down, Happening::Restart);
    }

    fn lose(&mut self, call: u64) {
        if self.waiting.remove(&call).is_some() {
            self.answers.insert(call, Reply::Lost);
        }
    }

    fn unpin(&mut self, pins: &Pins) {
        if pins.life == self.life
            && let Some(node) = &mut self.node
        {
            node.unpin(&pins.instances);
        }
    }
}

impl Shared {
    pub fn with<T>(&self, act: impl FnOnce(&mut World) -> T) -> T {
        act(&mut self.0.borrow_mut())
    }

    pub fn below(&self, end: u64) -> u64 {
        self.with(|world| world.rng.random_range(0..end))
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

    /// Sends a verb and waits for its answer, or for the news that there will be none.
    pub async fn call(&self, key: &SessionKey, verb: Verb, brought: Vec<InstanceId>) -> Reply {
        let call = self.with(|world| {
            world.next += 1;
            let (call, life) = (world.next, world.life);
            world.waiting.insert(call, (format!("{key} {}", word(&verb)), world.now));
            let wait = world.rng.random_range(0..6);
            let key = key.clone();
            world.after(wait, Happening::Arrive { life, call, key, verb, brought });
            call
        });
        let answer = |world: &mut World| world.answers.remove(&call).map_or(Poll::Pending, Poll::Ready);
        poll_fn(|_| self.with(answer)).await
    }

    /// Asks for room in the pinned tier; false where there is none, or no node.
    pub async fn room(&self, tenant: &TenantName, blocks: usize) -> bool {
        let asked = self.with(|world| {
            world.node.as_ref()?;
            world.next += 1;
            let (call, now) = (world.next, world.now);
            world.node(|node, _| node.need(now, tenant, call, blocks));
            Some((call, world.life))
        });
        let Some((call, life)) = asked else { return false };
        poll_fn(|_| {
            self.with(|world| match world.rooms.remove(&call) {
                Some(granted) => Poll::Ready(granted),
                None if world.life != life => Poll::Ready(false),
                None => Poll::Pending,
            })
        })
        .await
    }

    /// Takes blocks for a write; none where the arena is full after all.
    pub fn take(&self, contents: Vec<Vec<Stamp>>, units: &[u64]) -> Option<Vec<BlockRef>> {
        self.with(|world| {
            let node = world.node.as_mut()?;
            let mut taken = Vec::new();
            for (content, unit) in contents.into_iter().zip(units) {
                let (checksum, units) = (checksum(&content), content.len() as u64);
                let Some(instance) = node.memory.take(content) else {
                    taken.iter().for_each(|block: &BlockRef| node.memory.unpin(block.instance));
                    return None;
                };
                let length = u32::try_from(units * unit).expect("a block is small");
                taken.push(BlockRef { instance, checksum, length });
            }
            Some(taken)
        })
    }

    /// A sender gives up before it sent what it had taken.
    pub fn give_back(&self, blocks: &[BlockRef], life: u64) {
        self.with(|world| {
            let instances = blocks.iter().map(|block| block.instance).collect();
            let node_life = world.life;
            if node_life == life
                && let Some(node) = &mut world.node
            {
                let instances: Vec<InstanceId> = instances;
                instances.iter().for_each(|instance| node.memory.unpin(*instance));
            }
        });
    }

    pub fn done(&self, pins: &Pins) {
        self.with(|world| world.unpin(pins));
    }

    /// The verified content of a block that is pinned: an error where its bytes are not what was written.
    pub fn read(&self, block: &BlockRef, pins: &Pins) -> Option<Result<Vec<Stamp>, ()>> {
        self.with(|world| {
            if pins.life != world.life {
                return None;
            }
            let bug = world.options.bug;
            let other = (bug == Some(Bug::AnotherSessionsBlocks) && world.rng.random_range(0..10) == 0)
                .then(|| pins.instances.first().map(|first| InstanceId(first.0.wrapping_sub(3))))
                .flatten();
            let content = world.node.as_ref()?.memory.read(other.unwrap_or(block.instance));
            let believed = bug == Some(Bug::ChecksumsNotVerified) || other.is_some();
            if !believed && checksum(&content) != block.checksum && content != [POISON] {
                return Some(Err(()));
            }
            Some(Ok(content))
        })
    }
}

/// The transcript as the catalog has it, where that is of the same revision.
#[must_use]
pub fn stored_transcript(world: &World, manifest: &Manifest) -> Option<Vec<u32>> {
    let stored = world.disk.store.manifests.get(&manifest.key)?;
    let same = stored.birth == manifest.birth && stored.revision == manifest.revision;
    let name = (manifest.key.clone(), manifest.birth);
    same.then(|| world.disk.store.transcripts.get(&name).cloned().unwrap_or_default())
}

fn word(verb: &Verb) -> String {
    let text = format!("{verb:?}");
    text.chars().take(60).collect()
}

fn shown(reply: &Result<Box<Answer>, Refusal>) -> String {
    match reply {
        Ok(answer) => match &**answer {
            Answer::Written(written) => format!("revision {} of {}", written.revision, written.birth),
            Answer::Session { view, .. } => {
                format!("session at {} of {}", view.manifest.revision, view.manifest.birth)
            }
            other => format!("{other:?}").chars().take(60).collect(),
        },
        Err(refusal) => format!("no: {refusal}"),
    }
}
