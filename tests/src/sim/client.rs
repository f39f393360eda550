//! Random clients: each knows what its writes would make, and tells the oracle what it was answered.

mod writing;

use keepwarm_core::session::{
    Form, Home, Labels, Layout, Manifest, Order, Part, Planes, Protect, State, TranscriptDelta,
};
use keepwarm_core::shard::{Answer, Create, Cut, Fork, Precondition, Refusal, Turn, Verb};
use keepwarm_types::{
    Birth, Bytes, ColdReason, GpuIndex, LeaseId, Millis, SessionId, SessionKey, TenantName, Tokens, WriteId,
};
use rand::RngExt;
use std::sync::Arc;
use uuid::Uuid;

use super::invariants;
use super::memory::Stamp;
use super::oracle::{AttemptId, Content, Fate, Floor, Seen};
use super::world::{Pins, Reply, Shared, stored_transcript};

/// Sessions that clients create; forks take ids above these.
const SESSIONS: u64 = 6;
const FORKS: u64 = 4;
const TOKENS_PER_BLOCK: u32 = 4;
const PLANE_BYTES: u32 = 1;
const PLANES: u32 = 2;
const BYTES_PER_BLOCK: u64 = 8;
const PROTECT_MS: u64 = 200;
const TTL_MS: u64 = 1_500;
const LEASE_MS: u64 = 5_000;
const TENANTS: [&str; 2] = ["acme", "zeta"];
const SESSION_SHIFT: u32 = 50;
const TENANT_SHIFT: u32 = 62;

fn key(tenant: u64, session: u64) -> SessionKey {
    let uuid = Uuid::from_u128(0x4000_8000_0000_0000_0000 + u128::from(session));
    let tenant = TENANTS[usize::from(tenant != 0)].parse().unwrap();
    SessionKey::new(tenant, SessionId::new(uuid).unwrap())
}

/// The tenant that a stamp was written for.
#[must_use]
pub fn tenant_of(stamp: Stamp) -> TenantName {
    TENANTS[usize::from(stamp >> TENANT_SHIFT != 0)].parse().unwrap()
}

/// The session that a stamp was written to.
#[must_use]
pub fn session_of(stamp: Stamp) -> SessionKey {
    key(stamp >> TENANT_SHIFT, (stamp >> SESSION_SHIFT) & 0xfff)
}

/// One paged part, two of them in both orders, or a string of bytes.
fn layout(session: u64) -> Arc<Layout> {
    let paged = |name: &str, order| {
        let planes = Planes {
            tokens_per_block: TOKENS_PER_BLOCK,
            planes: PLANES,
            plane_bytes_per_token: PLANE_BYTES,
            order,
        };
        Part { name: name.parse().unwrap(), form: Form::Paged(planes), cold: None }
    };
    let bytes =
        Part { name: "b".parse().unwrap(), form: Form::Bytes { block_bytes: BYTES_PER_BLOCK }, cold: None };
    let parts = match session % 3 {
        0 => vec![paged("kv", Order::Token)],
        1 => vec![paged("k", Order::Plane), paged("v", Order::Token)],
        _ => vec![bytes],
    };
    Arc::new(Layout::new("model", "print", parts).unwrap())
}

fn unit(form: &Form) -> u64 {
    form.planes().map_or(1, Planes::token_bytes)
}

/// What came of a call that may have changed something.
enum Came<T> {
    Done(T, Pins),
    No(Refusal),
    Unknown,
}

fn came(reply: Reply) -> Came<Box<Answer>> {
    match reply {
        Reply::Answered(Ok(answer), pins) => Came::Done(answer, pins),
        Reply::Answered(Err(Refusal::OutcomeUnknown), _) | Reply::Lost => Came::Unknown,
        Reply::Answered(Err(refusal), _) => Came::No(refusal),
    }
}

/// One client.
pub struct Client {
    world: Shared,
    serial: u64,
}

impl Client {
    pub const fn new(world: Shared, number: u64) -> Self {
        Self { world, serial: number << 32 }
    }

    fn fresh(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    fn stamps(&mut self, key: &SessionKey, count: u64) -> Vec<Stamp> {
        let tenant = u64::from(key.tenant.as_str() == TENANTS[1]) << TENANT_SHIFT;
        let session = (key.id.uuid().as_u128() as u64 & 0xfff) << SESSION_SHIFT;
        (0..count)
            .map(|_| tenant | session | (self.fresh() & 0xff_ffff) | ((self.serial >> 32) << 24))
            .collect()
    }

    fn random_bits(&self) -> u64 {
        self.world.with(|world| world.rng.random())
    }

    fn uuid(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.random_bits()) << 64 | u128::from(self.random_bits()))
    }

    /// Does so many random things.
    pub async fn run(mut self, things: u64) {
        for _ in 0..things {
            self.world.pause(self.world.below(60)).await;
            let tenant = self.world.below(2);
            let forked = self.world.below(5) == 0;
            let session =
                if forked { SESSIONS + self.world.below(FORKS) } else { self.world.below(SESSIONS) };
            self.one(key(tenant, session), forked).await;
        }
    }

    async fn one(&mut self, key: SessionKey, forked: bool) {
        let Some(manifest) = self.look(&key).await else {
            if !forked {
                self.create(&key).await;
            }
            return;
        };
        match self.world.below(20) {
            0..6 => self.append(&key, &manifest, None, true).await,
            6..8 => self.replace(&key, &manifest).await,
            8..11 => self.turn(&key, &manifest).await,
            11 => self.truncate(&key, &manifest).await,
            12 | 13 => self.fork(&key).await,
            14 => self.delete(&key).await,
            _ => self.read(&key).await,
        }
    }

    fn floor(&self, key: &SessionKey) -> Floor {
        self.world.with(|world| world.oracle.floor(key))
    }

    /// Tells the oracle what an answer showed.
    fn saw(&self, manifest: &Manifest, parts: Option<Vec<Vec<Stamp>>>, floor: &Floor) {
        self.world.with(|world| {
            if let Some(parent) = &manifest.parent
                && manifest.revision.0 == 0
            {
                let of = SessionKey::new(manifest.key.tenant.clone(), parent.id);
                if let Some(content) = world.oracle.content(&of, parent.birth, parent.revision.0) {
                    let content = forked(content, manifest);
                    world.oracle.adopt_fork(manifest, content);
                }
            }
            let name = (manifest.key.clone(), manifest.birth);
            if manifest.parent.is_some() && !world.oracle.lives.contains_key(&name) {
                // A fork of a revision whose outcome nobody knows: not followed.
                return;
            }
            let transcript = stored_transcript(world, manifest);
            let seen = Seen { manifest, parts, transcript };
            let checked = invariants::seen(world, &seen, floor);
            world.check(checked);
            world.oracle.learn(&seen);
        });
    }

    fn missed(&self, key: &SessionKey, refusal: &Refusal, floor: &Floor) {
        if matches!(refusal, Refusal::UnknownSession | Refusal::Deleted { .. } | Refusal::Expired { .. }) {
            self.world.with(|world| {
                let checked = invariants::absent(world, key, refusal, floor);
                world.check(checked);
            });
        }
    }

    /// The session as it is now.
    pub async fn look(&self, key: &SessionKey) -> Option<Manifest> {
        let floor = self.floor(key);
        match came(self.world.call(key, Verb::Get, Vec::new()).await) {
            Came::Done(answer, _) => {
                let Answer::Session { view, .. } = *answer else { panic!("not a session") };
                self.saw(&view.manifest, None, &floor);
                Some(Manifest::clone(&view.manifest))
            }
            Came::No(refusal) => {
                self.missed(key, &refusal, &floor);
                None
            }
            Came::Unknown => None,
        }
    }

    pub async fn create(&mut self, key: &SessionKey) {
        let session = key.id.uuid().as_u128() as u64 & 0xfff;
        let layout = layout(session);
        let birth = Birth::from_random(self.random_bits());
        let empty = Content { parts: vec![Vec::new(); layout.parts().len()], transcript: Vec::new() };
        let ttl = (session == 4).then_some(Millis(TTL_MS));
        let (attempt, floor, sent) = self.world.with(|world| {
            let floor = world.oracle.floor(key);
            let attempt = world.oracle.attempt(key, birth, 0, empty);
            if let Some(life) = world.oracle.lives.get_mut(&(key.clone(), birth)) {
                life.ttl = ttl.map(|ttl| ttl.0);
                life.used = world.now;
            }
            (attempt, floor, world.now)
        });
        let protect = Protect::For(Millis(PROTECT_MS));
        let create = Create { layout, birth, protect, ttl, labels: Labels::new() };
        match came(self.world.call(key, Verb::Create(create), Vec::new()).await) {
            Came::Done(answer, _) => {
                let Answer::Session { view, new, .. } = *answer else { panic!("not a session") };
                let made = new && view.manifest.birth == birth;
                self.settle(&attempt, if made { Fate::Committed } else { Fate::Refused });
                self.saw(&view.manifest, None, &floor);
                self.world.with(|world| world.oracle.used(key, view.manifest.birth, sent));
            }
            Came::No(refusal) => {
                self.settle(&attempt, Fate::Refused);
                self.missed(key, &refusal, &floor);
            }
            Came::Unknown => self.settle(&attempt, Fate::Unknown),
        }
    }

    fn settle(&self, attempt: &AttemptId, fate: Fate) {
        self.world.with(|world| world.oracle.settle(attempt, fate));
    }

    fn base(&self, manifest: &Manifest) -> Option<Content> {
        let content = self.world.with(|world| {
            world.oracle.content(&manifest.key, manifest.birth, manifest.revision.0).cloned()
        })?;
        let cold = matches!(manifest.state, State::Cold(_));
        let parts = if cold { vec![Vec::new(); content.parts.len()] } else { content.parts };
        Some(Content { parts, transcript: content.transcript })
    }

    fn demand(&self, manifest: &Manifest, lease: Option<LeaseId>) -> Precondition {
        let write_id = (self.world.below(3) == 0).then(|| WriteId(self.uuid()));
        Precondition { etag: Some(manifest.etag()), lease, write_id }
    }

    /// A block was found damaged: what it belongs to has lost its bytes.
    async fn condemn(&self, key: &SessionKey, birth: Birth) {
        let verb = Verb::GoCold { birth, reason: ColdReason::HoldersLost, force: true };
        let _ = self.world.call(key, verb, Vec::new()).await;
    }

    /// A model's turn: the transcript under a lease, then the state that follows; sometimes the GPU dies between.
    async fn turn(&mut self, key: &SessionKey, manifest: &Manifest) {
        if manifest.layout.parts()[0].form.planes().is_none() {
            return;
        }
        let lease = LeaseId(self.uuid());
        let home = Home { node: "n1".parse().unwrap(), gpu: GpuIndex(0) };
        let (floor, sent) = (self.floor(key), self.world.with(|world| world.now));
        let verb = Verb::Activate { lease, ttl: Millis(LEASE_MS), home };
        let granted = match came(self.world.call(key, verb, Vec::new()).await) {
            Came::Done(answer, pins) => {
                self.world.done(&pins);
                match *answer {
                    Answer::Lease(grant) => Manifest::clone(&grant.manifest),
                    other => panic!("not a lease: {other:?}"),
                }
            }
            _ => return,
        };
        self.saw(&granted, None, &floor);
        self.world.with(|world| world.oracle.used(key, granted.birth, sent));
        if let Some(base) = self.base(&granted) {
            let content = self
                .world
                .with(|world| world.oracle.content(key, granted.birth, granted.revision.0).cloned());
            let mut next = content.unwrap_or(base);
            let keep = next.transcript.len().max(granted.length_tokens.as_usize());
            if keep == next.transcript.len() {
                let tokens: Vec<u32> = (0..3).map(|_| self.fresh() as u32).collect();
                next.transcript.extend(&tokens);
                let attempt = self.begin(&granted, next);
                let transcript = TranscriptDelta {
                    keep_tokens: Tokens(keep as u64),
                    tokens,
                    ..TranscriptDelta::default()
                };
                let turn = Turn { lease, transcript };
                match came(self.world.call(key, Verb::Turn(turn), Vec::new()).await) {
                    Came::Done(answer, _) => {
                        let Answer::Written(written) = *answer else { panic!("not a turn") };
                        self.made(&attempt, &written, &floor, sent);
                        if self.world.below(3) > 0 {
                            self.append(key, &written.manifest, Some(lease), false).await;
                        }
                    }
                    Came::No(_) => self.settle(&attempt, Fate::Refused),
                    Came::Unknown => self.settle(&attempt, Fate::Unknown),
                }
            }
        }
        if self.world.below(4) > 0 {
            let _ = self.world.call(key, Verb::Release { lease }, Vec::new()).await;
        }
    }

    async fn truncate(&mut self, key: &SessionKey, manifest: &Manifest) {
        let Some(base) = self.base(manifest) else { return };
        let counted = manifest.layout.parts()[0].form.planes().is_some();
        let cold = matches!(manifest.state, State::Cold(_));
        let longest = base.parts[0].len().max(base.transcript.len()) as u64;
        if cold || longest == 0 || (!counted && base.parts[0].is_empty()) {
            return;
        }
        let to = self.world.below(longest);
        let mut next = base;
        let per_block = if counted { u64::from(TOKENS_PER_BLOCK) } else { BYTES_PER_BLOCK };
        for units in &mut next.parts {
            if to < units.len() as u64 {
                units.truncate((to - to % per_block) as usize);
            }
        }
        next.transcript.truncate(to as usize);
        let cut = if counted { Cut::Tokens(Tokens(to)) } else { Cut::Bytes(Bytes(to)) };
        let attempt = self.begin(manifest, next);
        let (floor, sent) = (self.floor(key), self.world.with(|world| world.now));
        let precondition = self.demand(manifest, None);
        let fate = match came(self.world.call(key, Verb::Truncate { cut, precondition }, Vec::new()).await) {
            Came::Done(answer, _) => {
                let Answer::Session { view, .. } = *answer else { panic!("not a session") };
                self.settle(&attempt, Fate::Committed);
                self.saw(&view.manifest, None, &floor);
                self.world.with(|world| world.oracle.used(key, view.manifest.birth, sent));
                Fate::Committed
            }
            Came::No(_) => Fate::Refused,
            Came::Unknown => Fate::Unknown,
        };
        self.settle(&attempt, fate);
    }

    async fn fork(&mut self, parent: &SessionKey) {
        let tenant = u64::from(parent.tenant.as_str() == TENANTS[1]);
        let child = key(tenant, SESSIONS + self.world.below(FORKS));
        let (floor, birth) = (self.floor(&child), Birth::from_random(self.random_bits()));
        let length = (self.world.below(2) == 0).then(|| Tokens(self.world.below(8)));
        let branch = self.world.below(3) == 0;
        if branch {
            // Where there are too many branches the oldest ends.
            self.world.with(|world| (0..FORKS).for_each(|n| world.oracle.ending(&key(tenant, SESSIONS + n))));
        }
        let fork =
            Fork { child: child.id, birth, length, labels: None, keep_messages: None, branch, lease: None };
        if let Came::Done(answer, _) = came(self.world.call(parent, Verb::Fork(fork), Vec::new()).await) {
            let Answer::Session { view, .. } = *answer else { panic!("not a session") };
            self.saw(&view.manifest, None, &floor);
        }
    }

    async fn delete(&mut self, key: &SessionKey) {
        self.world.with(|world| world.oracle.ending(key));
        if let Came::Done(answer, _) = came(self.world.call(key, Verb::Delete, Vec::new()).await) {
            let Answer::Deleted(deleted) = *answer else { panic!("not an end") };
            self.world.with(|world| world.oracle.ended(key, deleted.birth));
        }
    }

    /// Reads all parts, block by block, while others write.
    pub async fn read(&self, key: &SessionKey) {
        let (floor, sent) = (self.floor(key), self.world.with(|world| world.now));
        let (manifest, pins) = match came(self.world.call(key, Verb::ReadAll, Vec::new()).await) {
            Came::Done(answer, pins) => match *answer {
                Answer::Read(grant) => (Manifest::clone(&grant.manifest), pins),
                other => panic!("not a read: {other:?}"),
            },
            Came::No(refusal) => return self.missed(key, &refusal, &floor),
            Came::Unknown => return,
        };
        self.world.with(|world| world.oracle.used(key, manifest.birth, sent));
        let mut parts = Vec::new();
        for state in &manifest.parts {
            let mut units = Vec::new();
            for block in &state.blocks {
                if self.world.below(4) == 0 {
                    self.world.pause(self.world.below(20)).await;
                }
                match self.world.read(block, &pins) {
                    Some(Ok(content)) => units.extend(content),
                    Some(Err(())) => {
                        self.world.done(&pins);
                        self.world.with(|world| {
                            let flipped = world.oracle.flips > 0;
                            world.check(if flipped {
                                Ok(())
                            } else {
                                Err(format!("{key}: damaged by nobody"))
                            });
                        });
                        return self.condemn(key, manifest.birth).await;
                    }
                    None => return,
                }
            }
            parts.push(units);
        }
        self.world.done(&pins);
        self.saw(&manifest, Some(parts), &floor);
    }
}

/// What a fork begins with.
fn forked(parent: &Content, child: &Manifest) -> Content {
    let cold = matches!(child.state, State::Cold(_));
    let parts =
        parent.parts.iter().zip(child.layout.parts()).zip(&child.parts).map(|((units, part), state)| {
            let length = if cold { 0 } else { (state.length.0 / unit(&part.form)) as usize };
            units.iter().copied().take(length).collect()
        });
    let transcript = parent.transcript.iter().copied().take(child.transcript_tokens.as_usize()).collect();
    Content { parts: parts.collect(), transcript }
}

/// Every session that there can be.
#[must_use]
pub fn all_keys() -> Vec<SessionKey> {
    (0..2).flat_map(|tenant| (0..SESSIONS + FORKS).map(move |session| key(tenant, session))).collect()
}
