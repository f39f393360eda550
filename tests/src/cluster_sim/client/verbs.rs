//! Looking, creating, turns, cuts, forks, evictions, ends and reads.

use keepwarm_core::session::{Home, Labels, Manifest, Protect, State, TranscriptDelta};
use keepwarm_core::shard::{Answer, Create, Cut, Fork, Precondition, Refusal, Turn, Verb};
use keepwarm_types::{Birth, Bytes, ColdReason, GpuIndex, LeaseId, Millis, SessionKey, Tokens};

use super::{Came, Client};
use crate::cluster_sim::keys::{BYTES_PER_BLOCK, FORKS, TOKENS_PER_BLOCK, layout, number};
use crate::sim::oracle::{Content, Fate};

const PROTECT_MS: u64 = 200;
const TTL_MS: u64 = 1_500;
const LEASE_MS: u64 = 2_000;

impl Client {
    /// The session as it is now.
    pub async fn look(&self, key: &SessionKey) -> Option<Manifest> {
        let floor = self.floor(key);
        match self.ask(key, || Verb::Get).await {
            (at, Came::Done(answer, _)) => {
                let Answer::Session { view, .. } = *answer else { panic!("not a session") };
                self.saw(at, &view.manifest, None, &floor);
                Some(Manifest::clone(&view.manifest))
            }
            (_, Came::No(refusal)) => {
                self.missed(key, &refusal, &floor);
                None
            }
            (_, Came::Unknown) => None,
        }
    }

    pub async fn create(&mut self, key: &SessionKey) {
        let layout = layout(number(key));
        let birth = Birth::from_random(self.random_bits());
        let empty = Content { parts: vec![Vec::new(); layout.parts().len()], transcript: Vec::new() };
        let ttl = (number(key) == 3).then_some(Millis(TTL_MS));
        let floor = self.floor(key);
        let attempt = self.world.with(|world| {
            let attempt = world.promises.oracle.attempt(key, birth, 0, empty);
            if let Some(life) = world.promises.oracle.lives.get_mut(&(key.clone(), birth)) {
                life.ttl = ttl.map(|ttl| ttl.0);
            }
            attempt
        });
        let protect = Protect::For(Millis(PROTECT_MS));
        let create = Create { layout, birth, protect, ttl, labels: Labels::new() };
        match self.ask(key, || Verb::Create(create.clone())).await {
            (at, Came::Done(answer, _)) => {
                let Answer::Session { view, new, .. } = *answer else { panic!("not a session") };
                let made = view.manifest.birth == birth;
                debug_assert!(made || !new);
                self.settle(&attempt, if made { Fate::Committed } else { Fate::Refused });
                self.saw(at, &view.manifest, None, &floor);
            }
            (_, Came::No(refusal)) => {
                self.settle(&attempt, Fate::Refused);
                self.missed(key, &refusal, &floor);
            }
            (_, Came::Unknown) => self.settle(&attempt, Fate::Unknown),
        }
    }

    /// A model's turn: the transcript under a lease, then the state that follows; sometimes the home dies between.
    pub(super) async fn turn(&mut self, key: &SessionKey, manifest: &Manifest) {
        if manifest.layout.parts()[0].form.planes().is_none() {
            return;
        }
        let lease = LeaseId(self.uuid());
        let home = Home { node: "n1".parse().unwrap(), gpu: GpuIndex(0) };
        let floor = self.floor(key);
        let verb = || Verb::Activate { lease, ttl: Millis(LEASE_MS), home: home.clone() };
        let (granted, at) = match self.ask(key, verb).await {
            (at, Came::Done(answer, pins)) => {
                self.world.done(&pins);
                match *answer {
                    Answer::Lease(grant) => (Manifest::clone(&grant.manifest), at),
                    other => panic!("not a lease: {other:?}"),
                }
            }
            _ => return,
        };
        self.saw(at, &granted, None, &floor);
        let known = self
            .world
            .with(|world| world.promises.oracle.content(key, granted.birth, granted.revision.0).cloned());
        if let Some(mut next) = known {
            let keep = next.transcript.len();
            if keep >= granted.length_tokens.as_usize() {
                let tokens: Vec<u32> = (0..3).map(|_| self.fresh() as u32).collect();
                next.transcript.extend(&tokens);
                let attempt = self.begin(&granted, next);
                let keep_tokens = Tokens(keep as u64);
                let transcript = TranscriptDelta { keep_tokens, tokens, ..TranscriptDelta::default() };
                let turn = Turn { lease, transcript };
                match self.ask(key, || Verb::Turn(turn.clone())).await {
                    (at, Came::Done(answer, _)) => {
                        let Answer::Written(written) = *answer else { panic!("not a turn") };
                        self.made(at, &attempt, &written, &floor);
                        if self.world.below(3) > 0 {
                            self.append(key, &written.manifest, Some(lease), false).await;
                        }
                    }
                    (_, Came::No(_)) => self.settle(&attempt, Fate::Refused),
                    (_, Came::Unknown) => self.settle(&attempt, Fate::Unknown),
                }
            }
        }
        if self.world.below(4) > 0 {
            let _ = self.ask(key, || Verb::Release { lease }).await;
        }
    }

    /// The session shall run at another replica.
    pub(super) async fn cede(&self, key: &SessionKey) {
        let to = self.world.with(|world| {
            let set = world.registry.set(world.keys.shard(key))?;
            let chosen = world.below(set.replicas.len() as u64) as usize;
            set.replicas.get(chosen).map(|member| member.node.clone())
        });
        if let Some(to) = to {
            // Whatever the answer is, nothing of the session has changed.
            let _ = self.ask(key, || Verb::Cede(to.clone())).await;
        }
    }

    pub(super) async fn truncate(&mut self, key: &SessionKey, manifest: &Manifest) {
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
        let floor = self.floor(key);
        let precondition = Precondition { etag: Some(manifest.etag()), ..Precondition::default() };
        match self.ask(key, || Verb::Truncate { cut, precondition }).await {
            (at, Came::Done(answer, _)) => {
                let Answer::Session { view, .. } = *answer else { panic!("not a session") };
                self.settle(&attempt, Fate::Committed);
                self.saw(at, &view.manifest, None, &floor);
            }
            (_, Came::No(_)) => self.settle(&attempt, Fate::Refused),
            (_, Came::Unknown) => self.settle(&attempt, Fate::Unknown),
        }
    }

    pub(super) async fn fork(&mut self, parent: &SessionKey) {
        let keys = self.world.with(|world| world.keys);
        let child = keys.fork(parent, self.world.below(FORKS));
        if child == *parent {
            return;
        }
        let (floor, birth) = (self.floor(&child), Birth::from_random(self.random_bits()));
        let length = (self.world.below(2) == 0).then(|| Tokens(self.world.below(8)));
        let branch = self.world.below(3) == 0;
        let fork =
            Fork { child: child.id, birth, length, labels: None, keep_messages: None, branch, lease: None };
        if let (at, Came::Done(answer, _)) = self.ask(parent, || Verb::Fork(fork.clone())).await {
            let Answer::Session { view, .. } = *answer else { panic!("not a session") };
            self.saw(at, &view.manifest, None, &floor);
        }
    }

    pub(super) async fn delete(&mut self, key: &SessionKey) {
        self.world.with(|world| world.promises.oracle.ending(key));
        if let (_, Came::Done(answer, _)) = self.ask(key, || Verb::Delete).await {
            let Answer::Deleted(deleted) = *answer else { panic!("not an end") };
            self.world.with(|world| world.promises.oracle.ended(key, deleted.birth));
        }
    }

    /// Another replica shall hold what the owner holds: nothing may be lost by that.
    pub(super) async fn demote(&mut self, key: &SessionKey) {
        let _ = self.ask(key, || Verb::Demote).await;
    }

    /// The owner's copy of a block turns out to be damaged: only where nobody else has the bytes they may be lost.
    pub(super) async fn condemn(&mut self, key: &SessionKey, manifest: &Manifest) {
        let Some(damaged) = manifest.instances().next().map(|block| block.instance) else { return };
        let birth = manifest.birth;
        let _ = self.ask(key, || Verb::Condemn { birth, damaged }).await;
    }

    pub(super) async fn evict(&mut self, key: &SessionKey, manifest: &Manifest) {
        let birth = manifest.birth;
        self.world.with(|world| world.promises.evicting(key, birth, world.now));
        let verb = || Verb::GoCold { birth, reason: ColdReason::Evicted, force: false };
        let _ = self.ask(key, verb).await;
    }

    /// Reads all, block by block, while others write. The refusal, where there is nothing to read.
    pub async fn read(&self, key: &SessionKey) -> Result<(), Option<Refusal>> {
        let floor = self.floor(key);
        let (at, manifest, pins) = match self.ask(key, || Verb::ReadAll).await {
            (at, Came::Done(answer, pins)) => match *answer {
                Answer::Read(grant) => (at, Manifest::clone(&grant.manifest), pins),
                other => panic!("not a read: {other:?}"),
            },
            (_, Came::No(refusal)) => {
                self.missed(key, &refusal, &floor);
                return Err(Some(refusal));
            }
            (_, Came::Unknown) => return Err(None),
        };
        let mut parts = Vec::new();
        for state in &manifest.parts {
            let mut units = Vec::new();
            for block in &state.blocks {
                if self.world.below(4) == 0 {
                    self.world.pause(self.world.below(20)).await;
                }
                match self.world.read(block, &pins) {
                    Some(Ok(content)) => units.extend(content),
                    Some(Err(content)) => {
                        let why = format!("{key}: a block that nobody damaged reads as {content:?}");
                        self.world.with(|world| world.check(Err(why)));
                        return Err(None);
                    }
                    None => return Err(None),
                }
            }
            parts.push(units);
        }
        self.world.done(&pins);
        self.saw(at, &manifest, Some(parts), &floor);
        Ok(())
    }
}
