//! What clients were promised, and what may explain that bytes are gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use keepwarm_core::registry::Member;
use keepwarm_core::session::{self, Manifest};
use keepwarm_types::{Birth, Bytes, Generation, Millis, SessionKey, ShardId, Timestamp};

use crate::sim::oracle::Oracle;

/// How long an eviction may be under way: a copy or two of its bytes, and its change.
const UNDER_WAY: Millis = Millis(2_000);

/// Who was said to hold which revision of a session.
#[derive(Debug, Clone)]
pub struct Told {
    pub birth: Birth,
    pub revision: u64,
    pub holders: Arc<[Member]>,
    /// When somebody last asked that the bytes go.
    pub evicting: Option<Timestamp>,
}

/// One state of one life of a session.
pub type State = (SessionKey, Birth, u64);

/// All that was promised.
#[derive(Debug, Default)]
pub struct Promises {
    /// Lives, revisions and their contents.
    pub oracle: Oracle,
    /// By session, the last state with bytes that a client saw.
    pub told: BTreeMap<SessionKey, Told>,
    /// Processes that have ended, or were taken out of a set.
    pub gone: BTreeSet<Member>,
    /// Whose copy of a life's bytes was found damaged, and not made anew since.
    pub damaged: BTreeSet<(SessionKey, Birth, Member)>,
    /// When somebody last asked that a life's bytes go, whether or not a client had seen them.
    asked: BTreeMap<(SessionKey, Birth), Timestamp>,
    /// The last placement of a life's bytes.
    last: BTreeMap<(SessionKey, Birth), Arc<[Member]>>,
    /// Who answered for a shard in each generation.
    pub primaries: BTreeMap<(ShardId, Generation), Member>,
    /// By state, every placement of its bytes that was on its way to a disk.
    pub placements: BTreeMap<State, Vec<Arc<[Member]>>>,
    /// Shards whose every catalog was lost.
    lost: BTreeSet<SessionKey>,
}

impl Promises {
    pub fn gone(&mut self, member: Member) {
        self.gone.insert(member);
    }

    /// Somebody asks that a session's bytes go.
    pub fn evicting(&mut self, key: &SessionKey, birth: Birth, now: Timestamp) {
        self.asked.insert((key.clone(), birth), now);
        if let Some(told) = self.told.get_mut(key) {
            told.evicting = Some(now);
        }
    }

    /// A primary decides who holds a state's bytes.
    pub fn placed(&mut self, manifest: &Manifest) {
        if manifest.state == session::State::Warm && manifest.stored_bytes() > Bytes::ZERO {
            let life = (manifest.key.clone(), manifest.birth);
            let before = self.last.insert(life, Arc::clone(&manifest.holders));
            for holder in manifest.holders.iter() {
                // Who was relieved of the bytes and holds them again has other ones.
                if before.as_ref().is_some_and(|before| !before.contains(holder)) {
                    self.damaged.remove(&(manifest.key.clone(), manifest.birth, holder.clone()));
                }
            }
            let state = (manifest.key.clone(), manifest.birth, manifest.revision.0);
            let all = self.placements.entry(state).or_default();
            if !all.contains(&manifest.holders) {
                all.push(Arc::clone(&manifest.holders));
            }
        }
    }

    /// A client sees a session in this state.
    pub fn saw(&mut self, manifest: &Manifest, now: Timestamp) {
        let (birth, revision) = (manifest.birth, manifest.revision.0);
        let known = self.told.get(&manifest.key);
        let newer = known.is_none_or(|told| told.birth != birth || told.revision < revision);
        if newer && manifest.state == session::State::Warm && manifest.stored_bytes() > Bytes::ZERO {
            let holders = Arc::clone(&manifest.holders);
            // What was asked a moment ago may be carried out on what is seen only now.
            let asked = self.asked.get(&(manifest.key.clone(), birth)).copied();
            let evicting = asked.filter(|asked| now.since(*asked) < UNDER_WAY);
            self.told.insert(manifest.key.clone(), Told { birth, revision, holders, evicting });
        }
    }

    /// Every catalog of these sessions was lost: nothing is promised of them any more.
    pub fn shard_lost(&mut self, within: impl Fn(&SessionKey) -> bool) {
        for ((key, _), life) in &mut self.oracle.lives {
            if within(key) {
                life.may_end = true;
                life.told = 0;
                self.lost.insert(key.clone());
            }
        }
    }

    /// Whether a session was lost with every catalog of its shard.
    #[must_use]
    pub fn was_lost(&self, key: &SessionKey) -> bool {
        self.lost.contains(key)
    }
}
