//! The copies that a secondary or a learner keeps, and what a primary may do to them.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use keepwarm_types::{Birth, Bytes, InstanceId, SessionKey, Timestamp};

use super::event::ReplicaCommand;
use super::message::{Compare, Content, Install, Message, Prepare, Span};
use super::saving::{Then, parent};
use super::state::{Part, Replica, release, retain};
use crate::registry::Member;
use crate::session::{Manifest, Stamp, State, TranscriptDelta};
use crate::shard::{Command, Record, Residence, Tombstone, TranscriptChange};

/// What a session's last change made of it.
#[derive(Debug, Clone)]
pub(super) enum Head {
    Live(Arc<Manifest>),
    Ended(Tombstone),
}

/// A session as it is here. Every instance that it names, or named and must still keep, has one name in memory.
#[derive(Debug, Clone)]
pub(super) struct Copy {
    pub(super) head: Head,
    /// Whether all bytes of the head are here, as its manifest says they should.
    pub(super) holding: bool,
    /// Read from the catalog, which does not know instances: the manifest names no blocks though it may have some.
    pub(super) bare: bool,
    /// Instances of what was before, kept until the head is committed everywhere.
    pub(super) extra: Vec<InstanceId>,
    /// The message of the present primary that made it so, by its number; 0 where that was another's.
    pub(super) heard: u64,
}

impl Copy {
    /// As the catalog has it.
    pub(super) fn on_disk(head: Head) -> Self {
        let bytes = |manifest: &Arc<Manifest>| {
            manifest.state == State::Warm && manifest.parts.iter().any(|part| part.length.0 > 0)
        };
        let bare = matches!(&head, Head::Live(manifest) if bytes(manifest));
        Self { head, holding: false, bare, extra: Vec::new(), heard: 0 }
    }

    /// The head, if its next holders have gone before they were committed and all of its bytes are here still: what they
    /// were to take over from this node. Those bytes are the head's again then.
    pub(super) fn taken_back(&mut self, me: &Member, set: &[Member]) -> Option<Arc<Manifest>> {
        let Head::Live(manifest) = &self.head else { return None };
        let warm = manifest.state == State::Warm && manifest.stored_bytes() > Bytes::ZERO;
        let gone = manifest.holders.iter().all(|holder| holder == me || !set.contains(holder));
        let blocks: Vec<_> = manifest.instances().map(|block| block.instance).collect();
        let here = !blocks.is_empty() && blocks.iter().all(|block| self.extra.contains(block));
        if self.holding || self.bare || !warm || !gone || !here {
            return None;
        }
        let mut taken = Manifest::clone(manifest);
        taken.holders = Arc::from([me.clone()]);
        for block in blocks {
            if let Some(at) = self.extra.iter().position(|extra| *extra == block) {
                self.extra.swap_remove(at);
            }
        }
        Some(Arc::new(taken))
    }

    pub(super) fn stamp(&self) -> Stamp {
        match &self.head {
            Head::Live(manifest) => manifest.stamp,
            Head::Ended(grave) => grave.stamp,
        }
    }

    fn names(&self, member: &Member) -> bool {
        matches!(&self.head, Head::Live(manifest) if manifest.holders.contains(member))
    }

    /// Instances that have a name because of this copy.
    pub(super) fn held(&self) -> impl Iterator<Item = InstanceId> {
        let head = match &self.head {
            Head::Live(manifest) if self.holding => Some(manifest),
            _ => None,
        };
        let head = head.into_iter().flat_map(|manifest| manifest.instances().map(|block| block.instance));
        head.chain(self.extra.iter().copied())
    }
}

/// All copies of the shard.
#[derive(Debug, Default)]
pub(super) struct Follower {
    pub(super) copies: BTreeMap<SessionKey, Copy>,
    /// The last message of the present primary that took a session away, by its number.
    pub(super) dropped: u64,
}

impl Follower {
    /// Whether the primary said something later of this session, or may have.
    fn is_late(&self, key: &SessionKey, sent: u64) -> bool {
        sent < self.copies.get(key).map_or(self.dropped, |copy| copy.heard)
    }

    /// Another primary counts its messages anew.
    pub(super) fn listen_anew(&mut self) {
        self.dropped = 0;
        self.copies.values_mut().for_each(|copy| copy.heard = 0);
    }

    pub(super) fn head(&self, key: &SessionKey) -> Option<Stamp> {
        self.copies.get(key).map(Copy::stamp)
    }

    fn within(&self, span: &Span) -> Vec<SessionKey> {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        match span {
            Span::One(key) => self.copies.contains_key(key).then(|| key.clone()).into_iter().collect(),
            Span::Between { after, through } => {
                let from = after.as_ref().map_or(Unbounded, Excluded);
                let to = through.as_ref().map_or(Unbounded, Included);
                self.copies.range((from, to)).map(|(key, _)| key.clone()).collect()
            }
        }
    }

    pub(super) fn validate(&self) {
        for (key, copy) in &self.copies {
            if let Head::Live(manifest) = &copy.head {
                assert_eq!(manifest.key, *key, "a copy lies under another key");
            } else {
                assert!(!copy.holding, "{key} has ended and holds bytes");
            }
        }
    }
}

impl Replica {
    /// Takes what the primary says.
    pub(super) fn told(&mut self, from: Member, sent: u64, message: Message, out: &mut Vec<ReplicaCommand>) {
        match message {
            Message::Prepare(prepare) => self.prepare(from, sent, *prepare, out),
            Message::Install(install) => self.install(from, sent, *install, out),
            Message::Compare(compare) => self.compare(from, sent, compare, out),
            Message::Confirm { round } => self.say(&from, Message::Confirmed { round }, out),
            Message::Committed(heads) => {
                for (key, stamp) in &heads {
                    self.settle(key, |head| head == *stamp, out);
                }
                self.say(&from, Message::Noted { heads, before: None }, out);
            }
            Message::Settled { before } => {
                let Part::Follower(follower) = &self.part else { return };
                let keys: Vec<_> = follower.copies.keys().cloned().collect();
                for key in keys {
                    self.settle(&key, |head| head.generation < before, out);
                }
                self.say(&from, Message::Noted { heads: Vec::new(), before: Some(before) }, out);
            }
            Message::Prepared { .. }
            | Message::NeedWhole { .. }
            | Message::Compared { .. }
            | Message::Installed { .. }
            | Message::Confirmed { .. }
            | Message::Noted { .. }
            | Message::Stale
            | Message::Evict { .. } => {}
        }
    }

    fn follower(&mut self) -> Option<&mut Follower> {
        match &mut self.part {
            Part::Follower(follower) => Some(follower),
            Part::Primary(_) => None,
        }
    }

    /// What only predecessors of a committed head named goes.
    fn settle(&mut self, key: &SessionKey, fits: impl Fn(Stamp) -> bool, out: &mut Vec<ReplicaCommand>) {
        let Some(copy) = self.follower().and_then(|follower| follower.copies.get_mut(key)) else { return };
        if fits(copy.stamp()) && !copy.extra.is_empty() {
            out.push(release(std::mem::take(&mut copy.extra)));
        }
    }

    /// Whether the bytes are here that should be.
    fn holds(&self, key: &SessionKey) -> bool {
        let Part::Follower(follower) = &self.part else { return true };
        follower.copies.get(key).is_none_or(|copy| copy.holding || !copy.names(&self.settings.member))
    }

    fn prepare(&mut self, from: Member, sent: u64, prepare: Prepare, out: &mut Vec<ReplicaCommand>) {
        let Prepare { key, previous, stamp, record } = prepare;
        let Part::Follower(follower) = &self.part else { return };
        if follower.is_late(&key, sent) {
            return;
        }
        let copy = follower.copies.get(&key);
        if let Record::Forget(_) = &record {
            if copy.is_some_and(|copy| matches!(copy.head, Head::Ended(_))) {
                self.replace(&key, None, sent, false, out);
                self.save(vec![key], vec![record], Then::Nothing, out);
            }
            return;
        }
        let head = copy.map(Copy::stamp);
        if head == Some(stamp) {
            self.complete(&key, out);
            // What is still on its way to the disk is answered from there.
            if !self.saving.contains_key(&key) {
                let holding = self.holds(&key);
                self.say(&from, Message::Prepared { key, stamp, holding }, out);
            }
            return;
        }
        let follows = head == previous && !self.saving.contains_key(&key);
        if !follows || !self.has_parent(&record) {
            self.say(&from, Message::NeedWhole { key }, out);
            return;
        }
        let next = match &record {
            Record::Manifest(manifest, _) => Head::Live(Arc::clone(manifest)),
            Record::Tombstone { .. } => match record.grave() {
                Some(grave) => Head::Ended(grave),
                None => return,
            },
            Record::Forget(_) | Record::Drop(..) => return,
        };
        self.replace(&key, Some(next), sent, true, out);
        let holding = self.holds(&key);
        let answer = Message::Prepared { key: key.clone(), stamp, holding };
        self.save(vec![key], vec![record], Then::Say(from, answer), out);
    }

    /// A prefix of another session's transcript can be taken here only if that session is here as it was there.
    fn has_parent(&self, record: &Record) -> bool {
        parent(record).is_none_or(|(key, met)| self.head(key) == Some(met) && !self.saving.contains_key(key))
    }

    /// A copy that is not on disk and cannot be put there from here is not here.
    pub(super) fn forget_unsaved(&mut self, key: &SessionKey, out: &mut Vec<ReplicaCommand>) {
        self.replace(key, None, 0, false, out);
    }

    fn install(&mut self, from: Member, sent: u64, install: Install, out: &mut Vec<ReplicaCommand>) {
        let Install { key, content } = install;
        let head = content.head();
        if self.follower().is_none_or(|follower| follower.is_late(&key, sent)) {
            return;
        }
        if self.head(&key) == head && !self.saving.contains_key(&key) {
            if let Content::Live(manifest, _) = content
                && let Some(copy) = self.follower().and_then(|follower| follower.copies.get_mut(&key))
                && copy.bare
            {
                (copy.head, copy.bare) = (Head::Live(manifest), false);
            }
            self.complete(&key, out);
            let holding = self.holds(&key);
            self.say(&from, Message::Installed { key, head, holding }, out);
            return;
        }
        let Part::Follower(follower) = &self.part else { return };
        let mut records = Vec::new();
        match (follower.copies.get(&key).map(|copy| &copy.head), &content) {
            (Some(Head::Live(old)), Content::Live(new, _)) if old.birth == new.birth => {}
            (Some(Head::Live(old)), _) => records.push(Record::Drop(key.clone(), old.birth)),
            (Some(Head::Ended(_)), Content::Live(..) | Content::Absent) => {
                records.push(Record::Forget(key.clone()));
            }
            (Some(Head::Ended(_)), Content::Ended(_)) | (None, _) => {}
        }
        let next = match content {
            Content::Live(manifest, transcript) => {
                let whole = TranscriptDelta {
                    keep_tokens: keepwarm_types::Tokens::ZERO,
                    keep_messages: 0,
                    ..transcript
                };
                records.push(Record::Manifest(Arc::clone(&manifest), TranscriptChange::Delta(whole)));
                Some(Head::Live(manifest))
            }
            Content::Ended(grave) => {
                records.push(Record::tombstone(key.clone(), &grave));
                Some(Head::Ended(grave))
            }
            Content::Absent => None,
        };
        self.replace(&key, next, sent, false, out);
        let holding = self.holds(&key);
        let answer = Message::Installed { key: key.clone(), head, holding };
        self.save(vec![key], records, Then::Say(from, answer), out);
    }

    fn compare(&mut self, from: Member, sent: u64, compare: Compare, out: &mut Vec<ReplicaCommand>) {
        let Compare { id, span, heads } = compare;
        let Part::Follower(follower) = &self.part else { return };
        let listed: HashSet<_> = heads.iter().map(|(key, _)| key).collect();
        // What came after the question was asked is not what it is about.
        let asked = |key: &SessionKey| follower.copies.get(key).is_none_or(|copy| copy.heard <= sent);
        let extra = follower.within(&span).into_iter().filter(|key| !listed.contains(key) && asked(key));
        let extra: Vec<_> = extra.collect();
        let (mut differing, mut lacking) = (Vec::new(), Vec::new());
        for (key, stamp) in heads.iter().filter(|(key, _)| asked(key)) {
            // What is not on disk yet may never be: it is sent again.
            let same = follower.copies.get(key).is_some_and(|copy| copy.stamp() == *stamp && !copy.bare);
            if !same || self.saving.contains_key(key) {
                differing.push(key.clone());
            } else if !self.holds(key) {
                lacking.push(key.clone());
            }
        }
        let mut records = Vec::new();
        for key in &extra {
            match follower.copies.get(key).map(|copy| &copy.head) {
                Some(Head::Live(manifest)) => records.push(Record::Drop(key.clone(), manifest.birth)),
                Some(Head::Ended(_)) => records.push(Record::Forget(key.clone())),
                None => {}
            }
        }
        for key in &extra {
            self.replace(key, None, sent, false, out);
        }
        let answer = Message::Compared { id, differing, lacking };
        if records.is_empty() {
            self.say(&from, answer, out);
        } else {
            self.save(extra, records, Then::Say(from, answer), out);
        }
    }

    /// Puts another head in a copy's place. `settled`: the present head is committed, so what only earlier ones
    /// named goes; what the present one named stays until the next is committed too.
    fn replace(
        &mut self,
        key: &SessionKey,
        next: Option<Head>,
        sent: u64,
        settled: bool,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Some(follower) = self.follower() else { return };
        let mut had = Vec::new();
        if let Some(mut old) = follower.copies.remove(key) {
            if settled && !old.extra.is_empty() {
                out.push(release(std::mem::take(&mut old.extra)));
            }
            had.extend(old.held());
        }
        if next.is_none() {
            follower.dropped = follower.dropped.max(sent);
        }
        match next {
            None if had.is_empty() => {}
            None => out.push(release(had)),
            Some(head) => {
                let copy = Copy { head, holding: false, bare: false, extra: had, heard: sent };
                follower.copies.insert(key.clone(), copy);
                self.complete(key, out);
            }
        }
        self.reside(key, out);
    }

    /// Tells the pinned tier what the copy is to it now.
    fn reside(&self, key: &SessionKey, out: &mut Vec<ReplicaCommand>) {
        let Part::Follower(follower) = &self.part else { return };
        let copy = follower.copies.get(key);
        let live = copy.and_then(|copy| match &copy.head {
            Head::Live(manifest) => Some((manifest, copy.holding)),
            Head::Ended(_) => None,
        });
        let never = Timestamp(0);
        let residence = match live {
            Some((manifest, holding)) => Residence {
                key: key.clone(),
                birth: manifest.birth,
                bytes: if holding { manifest.stored_bytes() } else { Bytes::ZERO },
                stored: if holding { manifest.stored_bytes() } else { Bytes::ZERO },
                protected_until: manifest.protect.until(manifest.last_used_at),
                expires_at: manifest.expires_at(manifest.last_used_at),
                leased: false,
                last_used_at: manifest.last_used_at,
            },
            None => Residence {
                key: key.clone(),
                birth: Birth::from_random(0),
                bytes: Bytes::ZERO,
                stored: Bytes::ZERO,
                protected_until: never,
                expires_at: never,
                leased: false,
                last_used_at: never,
            },
        };
        out.push(ReplicaCommand::Shard(Command::Reside(residence)));
    }

    /// Takes the bytes of a head that should be here and are: from what was here before, from what came, from what
    /// the session was forked from.
    pub(super) fn complete(&mut self, key: &SessionKey, out: &mut Vec<ReplicaCommand>) {
        let Part::Follower(follower) = &self.part else { return };
        let Some(copy) = follower.copies.get(key) else { return };
        let Head::Live(manifest) = &copy.head else { return };
        if copy.holding || copy.bare || !manifest.holders.contains(&self.settings.member) {
            return;
        }
        let had: HashSet<_> = copy.extra.iter().copied().collect();
        let parent = manifest
            .parent
            .as_ref()
            .and_then(|parent| follower.copies.get(&SessionKey::new(key.tenant.clone(), parent.id)));
        let parents: HashSet<_> = parent.into_iter().flat_map(Copy::held).collect();
        let mut shared = Vec::new();
        for block in manifest.instances() {
            let instance = block.instance;
            if had.contains(&instance) || self.inbox.contains_key(&(key.clone(), instance)) {
                continue;
            }
            if !parents.contains(&instance) {
                return;
            }
            shared.push(instance);
        }
        let named: HashSet<_> = manifest.instances().map(|block| block.instance).collect();
        // One name is enough for what came though it was here.
        let came = manifest.instances().map(|block| block.instance);
        let twice = came
            .filter(|instance| had.contains(instance) && self.inbox.contains_key(&(key.clone(), *instance)));
        let twice: Vec<_> = twice.collect();
        if !twice.is_empty() {
            out.push(release(twice));
        }
        for instance in &named {
            self.inbox.remove(&(key.clone(), *instance));
        }
        if !shared.is_empty() {
            out.push(retain(shared));
        }
        if let Some(copy) = self.follower().and_then(|follower| follower.copies.get_mut(key)) {
            copy.holding = true;
            copy.extra.retain(|instance| !named.contains(instance));
        }
        self.reside(key, out);
    }

    /// Out of the set: the manifests stay for a return, the bytes count for nothing and go. The same process may return
    /// before there is a newer manifest: it is no holder then, whatever this one said.
    pub(super) fn let_go(&mut self, out: &mut Vec<ReplicaCommand>) {
        let mut gone: Vec<_> =
            std::mem::take(&mut self.inbox).into_keys().map(|(_, instance)| instance).collect();
        let mut left = Vec::new();
        let me = self.settings.member.clone();
        if let Some(follower) = self.follower() {
            for (key, copy) in &mut follower.copies {
                if copy.holding {
                    left.push(key.clone());
                    // The others may name it as a holder still: that is compared as if it had just started.
                    copy.bare = true;
                }
                gone.extend(copy.held());
                copy.holding = false;
                copy.extra = Vec::new();
                if let Head::Live(manifest) = &mut copy.head
                    && manifest.holders.contains(&me)
                {
                    Arc::make_mut(manifest).leave(&me);
                }
            }
        }
        left.iter().for_each(|key| self.reside(key, out));
        if !gone.is_empty() {
            out.push(release(gone));
        }
    }
}
