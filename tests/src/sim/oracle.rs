//! What clients were promised: every life of every session, its revisions, and what each may contain.
//!
//! A write names the revision that it builds on, so what it would make is known before it is sent. Whether it
//! was made is known when it is answered; an answer that never came leaves both open.

use std::collections::BTreeMap;

use keepwarm_core::session::{Manifest, State};
use keepwarm_types::{Birth, ColdReason, SessionKey, Timestamp};

use super::memory::Stamp;

/// What a revision holds: a part's units, and the transcript.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    pub parts: Vec<Vec<Stamp>>,
    pub transcript: Vec<u32>,
}

/// What became of an attempt to make a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Not answered yet.
    Open,
    /// Committed, as its answer or a later observation said.
    Committed,
    /// Nobody can say.
    Unknown,
    /// "No", for good.
    Refused,
}

/// One attempt to make one revision.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub content: Content,
    pub fate: Fate,
}

/// One life of a session.
#[derive(Debug, Clone, Default)]
pub struct Life {
    pub revisions: BTreeMap<u64, Vec<Attempt>>,
    /// The highest revision that anybody was told of.
    pub told: u64,
    /// Somebody asked for its end.
    pub may_end: bool,
    /// Its end was acknowledged.
    pub ended: bool,
    /// It expires this long after a use.
    pub ttl: Option<u64>,
    /// The last use that was answered.
    pub used: Timestamp,
}

/// Names an attempt.
#[derive(Debug, Clone)]
pub struct AttemptId {
    pub key: SessionKey,
    pub birth: Birth,
    pub revision: u64,
    nth: usize,
}

/// What was known of a session when a request was sent; its answer must not know less.
#[derive(Debug, Clone)]
pub struct Floor {
    pub life: Option<(Birth, u64)>,
    pub ended: Vec<Birth>,
}

/// What an answer showed of a session.
#[derive(Debug)]
pub struct Seen<'a> {
    pub manifest: &'a Manifest,
    /// Units of each part, where they were read.
    pub parts: Option<Vec<Vec<Stamp>>>,
    pub transcript: Option<Vec<u32>>,
}

/// All that was promised.
#[derive(Debug, Default)]
pub struct Oracle {
    pub lives: BTreeMap<(SessionKey, Birth), Life>,
    current: BTreeMap<SessionKey, Birth>,
    pub restarts: u64,
    pub flips: u64,
}

impl Oracle {
    /// An attempt to make `revision` with `content`.
    pub fn attempt(&mut self, key: &SessionKey, birth: Birth, revision: u64, content: Content) -> AttemptId {
        let life = self.lives.entry((key.clone(), birth)).or_default();
        let attempts = life.revisions.entry(revision).or_default();
        attempts.push(Attempt { content, fate: Fate::Open });
        AttemptId { key: key.clone(), birth, revision, nth: attempts.len() - 1 }
    }

    pub fn settle(&mut self, id: &AttemptId, fate: Fate) {
        let Some(life) = self.lives.get_mut(&(id.key.clone(), id.birth)) else { return };
        let Some(attempt) = life.revisions.get_mut(&id.revision).and_then(|all| all.get_mut(id.nth)) else {
            return;
        };
        if attempt.fate != Fate::Committed {
            attempt.fate = fate;
        }
        if fate == Fate::Committed {
            life.told = life.told.max(id.revision);
            self.current.insert(id.key.clone(), id.birth);
        }
    }

    /// The content of a revision, where only one thing can be meant.
    #[must_use]
    pub fn content(&self, key: &SessionKey, birth: Birth, revision: u64) -> Option<&Content> {
        let attempts = self.lives.get(&(key.clone(), birth))?.revisions.get(&revision)?;
        let committed = attempts.iter().find(|attempt| attempt.fate == Fate::Committed);
        let mut open = attempts.iter().filter(|attempt| attempt.fate != Fate::Refused);
        let only = open.next().filter(|_| open.next().is_none());
        committed.or(only).map(|attempt| &attempt.content)
    }

    #[must_use]
    pub fn floor(&self, key: &SessionKey) -> Floor {
        let life = self.current.get(key).and_then(|birth| {
            let life = self.lives.get(&(key.clone(), *birth))?;
            (!life.ended).then_some((*birth, life.told))
        });
        let ended = self.lives.iter().filter(|((of, _), life)| of == key && life.ended);
        Floor { life, ended: ended.map(|((_, birth), _)| *birth).collect() }
    }

    pub fn used(&mut self, key: &SessionKey, birth: Birth, at: Timestamp) {
        if let Some(life) = self.lives.get_mut(&(key.clone(), birth)) {
            life.used = life.used.max(at);
        }
    }

    /// A session's end was asked for.
    pub fn ending(&mut self, key: &SessionKey) {
        for ((of, _), life) in &mut self.lives {
            if of == key {
                life.may_end = true;
            }
        }
    }

    pub fn ended(&mut self, key: &SessionKey, birth: Birth) {
        if let Some(life) = self.lives.get_mut(&(key.clone(), birth)) {
            life.ended = true;
        }
        if self.current.get(key) == Some(&birth) {
            self.current.remove(key);
        }
    }

    /// A fork's first revision is known only once its parent's revision is.
    pub fn adopt_fork(&mut self, manifest: &Manifest, content: Content) {
        let name = (manifest.key.clone(), manifest.birth);
        if self.lives.contains_key(&name) {
            return;
        }
        let id = self.attempt(&manifest.key, manifest.birth, 0, content);
        self.settle(&id, Fate::Committed);
        if let Some(life) = self.lives.get_mut(&name) {
            life.ttl = manifest.ttl.map(|ttl| ttl.0);
            life.used = manifest.created_at;
        }
    }

    /// What was seen is settled: the attempt that made it was committed, and nobody may be told less again.
    pub fn learn(&mut self, seen: &Seen<'_>) {
        let manifest = seen.manifest;
        let (key, revision) = (manifest.key.clone(), manifest.revision.0);
        let Some(life) = self.lives.get_mut(&(key.clone(), manifest.birth)) else { return };
        life.told = life.told.max(revision);
        self.current.insert(key, manifest.birth);
        let Some(attempts) = life.revisions.get_mut(&revision) else { return };
        if attempts.iter().any(|attempt| attempt.fate == Fate::Committed) {
            return;
        }
        let mut fitting = attempts.iter_mut().filter(|attempt| fits(&attempt.content, seen));
        if let (Some(one), None) = (fitting.next(), fitting.next()) {
            one.fate = Fate::Committed;
        }
    }

    /// Whether anything made this reason true.
    #[must_use]
    pub const fn explains(&self, reason: ColdReason) -> bool {
        match reason {
            ColdReason::Restarted => self.restarts > 0,
            ColdReason::Evicted => true,
            ColdReason::HoldersLost | ColdReason::Corrupt => self.flips > 0,
        }
    }
}

/// Whether an answer can show this content: lengths always, units and tokens where they were read.
#[must_use]
pub fn fits(content: &Content, seen: &Seen<'_>) -> bool {
    let manifest = seen.manifest;
    let cold = matches!(manifest.state, State::Cold(_));
    let lengths = cold
        || content.parts.iter().zip(manifest.layout.parts()).zip(&manifest.parts).all(
            |((units, part), state)| {
                let unit = part.form.planes().map_or(1, keepwarm_core::session::Planes::token_bytes);
                units.len() as u64 * unit == state.length.0
            },
        );
    lengths
        && content.transcript.len() as u64 == manifest.transcript_tokens.0
        && seen.parts.as_ref().is_none_or(|parts| *parts == content.parts)
        && seen.transcript.as_ref().is_none_or(|tokens| *tokens == content.transcript)
}

impl AttemptId {
    /// Of what is staged: no revision yet.
    #[must_use]
    pub fn none(key: &SessionKey) -> Self {
        Self { key: key.clone(), birth: Birth::from_random(0), revision: 0, nth: usize::MAX }
    }
}
