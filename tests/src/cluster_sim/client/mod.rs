//! Random clients: each goes to whom it believes to own the session, follows, and tells the oracle what it was told.

mod verbs;
mod writing;

use keepwarm_core::session::{Manifest, State};
use keepwarm_core::shard::{Answer, Refusal, Verb};
use keepwarm_types::SessionKey;
use rand::RngExt;
use uuid::Uuid;

use super::bug::Bug;
use super::invariants;
use super::keys::{FORKS, Keys, SESSIONS, stamp, unit};
use super::world::{Pins, Reply, Shared, stored_transcript};
use crate::sim::memory::Stamp;
use crate::sim::oracle::{AttemptId, Content, Fate, Floor, Seen};

/// How often a client follows a session that moves.
const FOLLOWS: usize = 4;

/// What came of a call that may have changed something.
pub(super) enum Came<T> {
    Done(T, Pins),
    No(Refusal),
    Unknown,
}

pub(super) fn came(reply: Reply) -> Came<Box<Answer>> {
    match reply {
        Reply::Answered(Ok(answer), pins) => Came::Done(answer, pins),
        Reply::Answered(Err(Refusal::OutcomeUnknown), _) | Reply::Lost => Came::Unknown,
        Reply::Answered(Err(refusal), _) => Came::No(refusal),
    }
}

/// One client.
pub struct Client {
    pub(super) world: Shared,
    keys: Keys,
    serial: u64,
}

impl Client {
    #[must_use]
    pub fn new(world: Shared, number: u64) -> Self {
        let keys = world.with(|world| world.keys);
        Self { world, keys, serial: number << 32 }
    }

    pub(super) fn fresh(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    pub(super) fn stamps(&mut self, key: &SessionKey, count: u64) -> Vec<Stamp> {
        (0..count).map(|_| stamp(key, self.fresh())).collect()
    }

    pub(super) fn random_bits(&self) -> u64 {
        self.world.with(|world| world.rng.random())
    }

    pub(super) fn uuid(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.random_bits()) << 64 | u128::from(self.random_bits()))
    }

    /// Random things, until nothing goes wrong any more.
    pub async fn run(mut self) {
        let wait = 100 + self.world.below(200);
        self.world.pause(wait).await;
        while !self.world.with(|world| world.healed) {
            self.world.pause(self.world.below(160)).await;
            let tenant = self.world.below(2);
            let forked = self.world.below(6) == 0;
            let shards = u64::from(self.keys.shards);
            let number =
                if forked { SESSIONS + self.world.below(FORKS * shards) } else { self.world.below(SESSIONS) };
            let key = self.keys.key(tenant, number);
            self.one(key, forked).await;
        }
    }

    /// Whether damage is what shall be found.
    fn is_about_damage(&self) -> bool {
        self.world.with(|world| world.bug(Bug::DamageTakenForLoss))
    }

    async fn one(&mut self, key: SessionKey, forked: bool) {
        let Some(manifest) = self.look(&key).await else {
            if !forked {
                self.create(&key).await;
            }
            return;
        };
        match self.world.below(23) {
            0..7 => self.append(&key, &manifest, None, true).await,
            7..9 => self.replace(&key, &manifest).await,
            9..12 => self.turn(&key, &manifest).await,
            12 => self.truncate(&key, &manifest).await,
            13 | 14 => self.fork(&key).await,
            15 if self.world.below(2) == 0 => self.delete(&key).await,
            16 if self.world.below(2) == 0 => self.evict(&key, &manifest).await,
            17 | 18 => self.demote(&key).await,
            19 if self.is_about_damage() || self.world.below(3) == 0 => self.condemn(&key, &manifest).await,
            20 if self.world.below(3) == 0 => self.cede(&key).await,
            _ => drop(self.read(&key).await),
        }
    }

    /// Whom to ask for a session: the owner by some registry's word, or anybody.
    pub(super) fn owner(&self, key: &SessionKey) -> usize {
        self.world.with(|world| {
            let any = world.below(world.shape.nodes as u64) as usize;
            if world.chance(150) {
                return any;
            }
            // A node that may be behind is asked for its map.
            let shard = world.keys.shard(key);
            let late =
                world.chance(400).then(|| world.replica(any, shard).map(|replica| (**replica.set()).clone()));
            let set = late.flatten().or_else(|| world.registry.set(shard));
            set.and_then(|set| set.replicas.first().map(|first| world.place(first))).unwrap_or(any)
        })
    }

    /// Asks, and follows a session that moves. Says at which node it was answered.
    pub(super) async fn ask(&self, key: &SessionKey, verb: impl Fn() -> Verb) -> (usize, Came<Box<Answer>>) {
        let mut last = (0, Came::No(Refusal::Moving("nobody was asked")));
        for _ in 0..FOLLOWS {
            let at = self.owner(key);
            last = (at, came(self.world.call(at, key, verb(), Vec::new()).await));
            let (Came::No(Refusal::Moving(_) | Refusal::Unavailable(_)), _) = (&last.1, at) else {
                return last;
            };
            self.world.pause(20 + self.world.below(150)).await;
        }
        last
    }

    pub(super) fn floor(&self, key: &SessionKey) -> Floor {
        self.world.with(|world| world.promises.oracle.floor(key))
    }

    /// Tells the oracle what an answer showed.
    pub(super) fn saw(&self, at: usize, manifest: &Manifest, parts: Option<Vec<Vec<Stamp>>>, floor: &Floor) {
        self.world.with(|world| {
            if let Some(parent) = &manifest.parent
                && manifest.revision.0 == 0
            {
                let of = SessionKey::new(manifest.key.tenant.clone(), parent.id);
                let content = world.promises.oracle.content(&of, parent.birth, parent.revision.0);
                if let Some(content) = content {
                    let content = forked(content, manifest);
                    world.promises.oracle.adopt_fork(manifest, content);
                }
            }
            let name = (manifest.key.clone(), manifest.birth);
            if manifest.parent.is_some() && !world.promises.oracle.lives.contains_key(&name) {
                // A fork of a revision whose outcome nobody knows: not followed.
                return;
            }
            let transcript = stored_transcript(world, at, manifest);
            let seen = Seen { manifest, parts, transcript };
            let checked = invariants::seen(world, &seen, floor);
            world.check(checked);
            world.promises.oracle.learn(&seen);
            world.promises.saw(manifest, world.now);
        });
    }

    pub(super) fn missed(&self, key: &SessionKey, refusal: &Refusal, floor: &Floor) {
        if matches!(
            refusal,
            Refusal::UnknownSession
                | Refusal::Deleted { .. }
                | Refusal::Expired { .. }
                | Refusal::Lost { .. }
        ) {
            self.world.with(|world| {
                let checked = invariants::absent(world, key, refusal, floor);
                world.check(checked);
            });
        }
    }

    pub(super) fn settle(&self, attempt: &AttemptId, fate: Fate) {
        self.world.with(|world| world.promises.oracle.settle(attempt, fate));
    }

    /// What is laid upon, if it is known what there is.
    pub(super) fn base(&self, manifest: &Manifest) -> Option<Content> {
        let content = self.world.with(|world| {
            let (birth, revision) = (manifest.birth, manifest.revision.0);
            world.promises.oracle.content(&manifest.key, birth, revision).cloned()
        })?;
        let cold = matches!(manifest.state, State::Cold(_));
        let parts = if cold { vec![Vec::new(); content.parts.len()] } else { content.parts };
        Some(Content { parts, transcript: content.transcript })
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
