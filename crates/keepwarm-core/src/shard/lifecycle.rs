//! Beginning, reading, cutting, forking, cooling and ending sessions.

use std::ops::Bound;
use std::sync::Arc;

use keepwarm_types::{
    Birth, Bytes, ColdReason, InstanceId, PlacementSeq, Revision, SessionId, SessionKey, TenantName,
    Timestamp, Tokens,
};
use uuid::Uuid;

use super::change::Change;
use super::command::{Command, Record, TranscriptChange};
use super::cut::{cut_to_bytes, cut_to_tokens};
use super::entry::{After, End, Pending};
use super::event::{Create, Cut, Fork, ListQuery, Precondition, RequestId};
use super::refusal::Refusal;
use super::state::{BRANCHES_MAX, Handled, Shard, session};
use super::view::{Answer, ReadGrant};
use super::write::{check, mismatch, remembered};
use crate::session::{Form, LABEL_BYTES_MAX, LABELS_MAX, Labels, Manifest, Parent, PartState, Stamp, State};

/// Sessions that one listing looks at in search of labels, before it gives the page back short.
const LIST_LOOKS_MAX: usize = 10_000;

impl Shard {
    pub(super) fn create(
        &mut self,
        now: Timestamp,
        id: RequestId,
        key: &SessionKey,
        create: Create,
        out: &mut Vec<Command>,
    ) -> Handled {
        assert_eq!(
            self.settings.count.shard_of(key.id),
            self.settings.shard,
            "the shell sends a session to its own shard"
        );
        if let Some(grave) = self.tombstones.get(key) {
            if !grave.expired {
                return Err(Refusal::Deleted { birth: grave.birth });
            }
            self.forget(key, out);
        }
        if let Ok(entry) = self.live(key) {
            let manifest = entry.manifest()?;
            if manifest.layout.hash() != create.layout.hash() {
                return Err(Refusal::LayoutMismatch);
            }
            if manifest.protect != create.protect || manifest.ttl != create.ttl {
                return Err(Refusal::Conflict(
                    "the session exists with another protect_s or ttl_s".to_owned(),
                ));
            }
            return Ok(Some(session(entry.view(now)?, false, false)));
        }
        check_labels(&create.labels)?;
        let parts = create.layout.parts().iter().map(|_| PartState::default()).collect();
        let manifest = Manifest {
            key: key.clone(),
            birth: create.birth,
            layout: create.layout,
            protect: create.protect,
            ttl: create.ttl,
            labels: create.labels,
            stamp: Stamp::default(),
            revision: Revision(0),
            placement_seq: PlacementSeq(0),
            length_tokens: Tokens::ZERO,
            parts,
            transcript_tokens: Tokens::ZERO,
            transcript_messages: 0,
            transcript_revision: Revision(0),
            parent: None,
            branches: Vec::new(),
            state: State::Warm,
            holders: Arc::clone(&self.holders),
            writes: Vec::new(),
            created_at: now,
            last_used_at: now,
        };
        let after = After::Session { new: true, clipped: false };
        self.begin(id, manifest, TranscriptChange::Keep, after, out);
        Ok(None)
    }

    fn begin(
        &mut self,
        id: RequestId,
        manifest: Manifest,
        transcript: TranscriptChange,
        after: After,
        out: &mut Vec<Command>,
    ) {
        let undo = manifest.instances().map(|block| block.instance).collect();
        let key = manifest.key.clone();
        let change = Change {
            request: Some(id),
            next: Arc::new(manifest),
            transcript,
            released: Vec::new(),
            undo,
            after,
        };
        self.prepare(&key, change, out);
    }

    pub(super) fn list(&self, now: Timestamp, tenant: &TenantName, query: &ListQuery) -> Answer {
        let lowest = SessionKey::new(tenant.clone(), lowest_id());
        let from = match query.after {
            Some(after) => Bound::Excluded(SessionKey::new(tenant.clone(), after)),
            None => Bound::Included(lowest),
        };
        let page = self
            .sessions
            .range((from, Bound::Unbounded))
            .take_while(|(key, _)| key.tenant == *tenant)
            .take(LIST_LOOKS_MAX)
            .filter_map(|(_, entry)| entry.view(now).ok())
            .filter(|view| {
                query.labels.iter().all(|(name, value)| view.manifest.labels.get(name) == Some(value))
            })
            .take(query.limit)
            .collect();
        Answer::Page(page)
    }

    pub(super) fn read(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        part: Option<&str>,
        out: &mut Vec<Command>,
    ) -> Handled {
        let manifest = Arc::clone(self.live(key)?.manifest()?);
        let index = match part {
            Some(name) => {
                Some(manifest.layout.part_index(name).ok_or_else(|| Refusal::UnknownPart(name.to_owned()))?)
            }
            None => None,
        };
        if let State::Cold(reason) = manifest.state {
            return Err(Refusal::Cold { reason });
        }
        if let (Some(index), Some(name)) = (index, part)
            && manifest.parts[index].length == Bytes::ZERO
        {
            return Err(Refusal::UnwrittenPart(name.to_owned()));
        }
        self.touch(now, key, out);
        Ok(Some(Answer::Read(Box::new(ReadGrant { manifest, part: index }))))
    }

    pub(super) fn truncate(
        &mut self,
        now: Timestamp,
        id: RequestId,
        key: &SessionKey,
        cut: Cut,
        precondition: Precondition,
        out: &mut Vec<Command>,
    ) -> Handled {
        let entry = self.live(key)?;
        let manifest = Arc::clone(entry.manifest()?);
        let asked = match cut {
            Cut::Tokens(tokens) => tokens.0 << 1,
            Cut::Bytes(bytes) => (bytes.0 << 1) | 1,
        };
        if remembered(&manifest, &precondition, asked)?.is_some() {
            return Ok(Some(session(entry.view(now)?, false, false)));
        }
        check(entry, now, &precondition)?;
        let mut next = Manifest::clone(&manifest);
        let clipped = match cut {
            Cut::Tokens(tokens) => {
                let longest = manifest.length_tokens.max(manifest.transcript_tokens);
                if tokens > longest {
                    let reason = format!("{tokens} tokens are more than the {longest} there are");
                    return Err(Refusal::InvalidField { field: "length_tokens".to_owned(), reason });
                }
                let kept = cut_to_tokens(&mut next, tokens);
                next.transcript_tokens = next.transcript_tokens.min(tokens);
                kept < tokens.min(manifest.length_tokens)
            }
            Cut::Bytes(bytes) => {
                let [part] = manifest.layout.parts() else { return Err(only_bytes()) };
                let Form::Bytes { block_bytes } = part.form else { return Err(only_bytes()) };
                if bytes > next.parts[0].length {
                    let reason =
                        format!("{} bytes are more than the {} there are", bytes.0, next.parts[0].length.0);
                    return Err(Refusal::InvalidField { field: "length_bytes".to_owned(), reason });
                }
                cut_to_bytes(&mut next.parts[0], block_bytes, bytes) < bytes
            }
        };
        let transcript = self.cut_transcript(&manifest, &mut next);
        let released = self.superseded(&manifest, &mut next);
        self.seal(now, &mut next, precondition, asked, Bytes::ZERO);
        if transcript != TranscriptChange::Keep {
            next.transcript_revision = next.revision;
        }
        out.push(Command::Invalidate(key.clone(), next.birth));
        let after = After::Session { new: false, clipped };
        self.prepare(
            key,
            Change { request: Some(id), next: Arc::new(next), transcript, released, undo: Vec::new(), after },
            out,
        );
        Ok(None)
    }

    /// The transcript follows a cut: its tokens to the length, its messages are told apart by the catalog.
    fn cut_transcript(&self, manifest: &Manifest, next: &mut Manifest) -> TranscriptChange {
        if next.transcript_tokens == manifest.transcript_tokens {
            return TranscriptChange::Keep;
        }
        TranscriptChange::CutTokens(next.transcript_tokens)
    }

    pub(super) fn fork(
        &mut self,
        now: Timestamp,
        id: RequestId,
        key: &SessionKey,
        fork: Fork,
        out: &mut Vec<Command>,
    ) -> Handled {
        let entry = self.live(key)?;
        let manifest = Arc::clone(entry.manifest()?);
        let child_key = SessionKey::new(key.tenant.clone(), fork.child);
        if self.settings.count.shard_of(fork.child) != self.settings.shard {
            let reason =
                "the id lies in another shard than the parent: leave it out, or choose one in the same shard"
                    .to_owned();
            return Err(Refusal::InvalidField { field: "id".to_owned(), reason });
        }
        if self.sessions.contains_key(&child_key) || self.tombstones.contains_key(&child_key) {
            return Err(Refusal::Conflict(format!("the id {} is taken", fork.child)));
        }
        if let Some(labels) = &fork.labels {
            check_labels(labels)?;
        }
        let longest = manifest.length_tokens.max(manifest.transcript_tokens);
        let length = fork.length.unwrap_or(longest);
        if length > longest {
            let reason = format!("{length} tokens are more than the {longest} there are");
            return Err(Refusal::InvalidField { field: "length_tokens".to_owned(), reason });
        }
        let mut child = Manifest::clone(&manifest);
        let kept = cut_to_tokens(&mut child, length);
        let clipped = kept < length.min(manifest.length_tokens);
        child.key = child_key;
        child.birth = fork.birth;
        child.revision = Revision(0);
        child.placement_seq = PlacementSeq(0);
        child.parent =
            Some(Box::new(Parent { id: key.id, birth: manifest.birth, revision: manifest.revision, length }));
        child.branches = Vec::new();
        child.writes = Vec::new();
        child.labels = fork.labels.unwrap_or_else(|| manifest.labels.clone());
        child.created_at = now;
        child.last_used_at = now;
        child.transcript_tokens = manifest.transcript_tokens.min(length);
        child.transcript_revision = Revision(0);
        let messages = fork.keep_messages.unwrap_or(u32::MAX).min(manifest.transcript_messages);
        child.transcript_messages = messages;
        let transcript = if manifest.transcript_tokens.0 > 0 {
            let tokens = child.transcript_tokens;
            TranscriptChange::CopyFrom {
                parent: key.clone(),
                birth: manifest.birth,
                stamp: manifest.stamp,
                tokens,
                messages,
            }
        } else {
            TranscriptChange::Keep
        };
        let shared: Vec<InstanceId> = child.instances().map(|block| block.instance).collect();
        if !shared.is_empty() {
            out.push(Command::Retain(shared));
        }
        self.lend(key, child.key.clone());
        self.begin(id, child, transcript, After::Forked { branch: fork.branch, clipped }, out);
        self.touch(now, key, out);
        Ok(None)
    }

    /// Lists a branch with its parent; beyond the bound the oldest that is idle ends.
    pub(super) fn add_branch(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        child: SessionId,
        out: &mut Vec<Command>,
    ) {
        let alive = |id: &SessionId| self.sessions.contains_key(&SessionKey::new(key.tenant.clone(), *id));
        let Some(manifest) = self.sessions.get(key).and_then(|entry| entry.manifest.as_ref()) else { return };
        let mut next = Manifest::clone(manifest);
        next.branches.retain(alive);
        next.branches.push(child);
        let oldest = if next.branches.len() > BRANCHES_MAX { Some(next.branches.remove(0)) } else { None };
        next.placement_seq = next.placement_seq.next();
        let next = Arc::new(next);
        let change = Change {
            request: None,
            next,
            transcript: TranscriptChange::Keep,
            released: Vec::new(),
            undo: Vec::new(),
            after: After::Quiet,
        };
        self.prepare(key, change, out);
        if let Some(oldest) = oldest {
            let oldest = SessionKey::new(key.tenant.clone(), oldest);
            if self.sessions.get(&oldest).is_some_and(|entry| entry.lease(now).is_none() && !entry.busy()) {
                // It is alive and idle, so ending it cannot be refused.
                let _ = self.delete(now, None, &oldest, End::Deleted, out);
            }
        }
    }

    /// The only copy is damaged. Nothing to do where the session does not name the block any more; refused where another
    /// node has come to hold the bytes while this waited for its turn.
    pub(super) fn condemn(
        &mut self,
        now: Timestamp,
        id: RequestId,
        key: &SessionKey,
        birth: Birth,
        damaged: InstanceId,
        out: &mut Vec<Command>,
    ) -> Handled {
        let manifest = self.live(key)?.manifest()?;
        if !manifest.instances().any(|block| block.instance == damaged) {
            return Ok(Some(Answer::Done));
        }
        if manifest.holders.iter().any(|holder| *holder != self.settings.member) {
            return Err(mismatch(manifest));
        }
        self.go_cold(now, id, key, birth, ColdReason::Corrupt, true, out)
    }

    pub(super) fn go_cold(
        &mut self,
        now: Timestamp,
        id: RequestId,
        key: &SessionKey,
        birth: Birth,
        reason: ColdReason,
        force: bool,
        out: &mut Vec<Command>,
    ) -> Handled {
        let entry = self.live(key)?;
        let manifest = Arc::clone(entry.manifest()?);
        if manifest.birth != birth {
            return Err(mismatch(&manifest));
        }
        if matches!(manifest.state, State::Cold(_)) || manifest.stored_bytes() == Bytes::ZERO {
            return Ok(Some(Answer::Done));
        }
        if !force {
            if let Some(lease) = entry.lease(now) {
                return Err(Refusal::Leased { expires_at: lease.expires_at });
            }
            if manifest.protect.until(entry.last_used) > now {
                return Err(Refusal::Conflict("the session's bytes are protected".to_owned()));
            }
        }
        let mut next = Manifest::clone(&manifest);
        next.go_cold(reason);
        next.placement_seq = next.placement_seq.next();
        let released = self.named_here(&manifest);
        let change = Change {
            request: Some(id),
            next: Arc::new(next),
            transcript: TranscriptChange::Keep,
            released,
            undo: Vec::new(),
            after: After::Cold,
        };
        self.prepare(key, change, out);
        Ok(None)
    }

    /// Ends a session, its lease and its staged bytes first.
    pub(super) fn delete(
        &mut self,
        now: Timestamp,
        id: Option<RequestId>,
        key: &SessionKey,
        end: End,
        out: &mut Vec<Command>,
    ) -> Result<(), Refusal> {
        let manifest = Arc::clone(self.live(key)?.manifest()?);
        let mut released = self.named_here(&manifest);
        let work = self.entry(key)?.work();
        work.lease = None;
        let staged: Vec<_> =
            work.stages.drain(..).flat_map(|stage| stage.brought).map(|(_, instance)| instance).collect();
        released.extend(&staged);
        let stamp = self.next_stamp();
        let record = Record::Tombstone {
            key: key.clone(),
            birth: manifest.birth,
            revision: manifest.revision,
            at: now,
            expired: end == End::Expired,
            stamp,
        };
        let pending = Pending {
            ticket: super::command::Ticket(0),
            request: id,
            next: None,
            released,
            undo: staged,
            after: After::Ended(end, stamp, now),
            in_doubt: None,
        };
        self.persist(key, pending, vec![record], out);
        Ok(())
    }
}

fn only_bytes() -> Refusal {
    let reason =
        "only a session whose one part is of form 'bytes' is cut by bytes: use length_tokens".to_owned();
    Refusal::InvalidField { field: "length_bytes".to_owned(), reason }
}

fn lowest_id() -> SessionId {
    let lowest = Uuid::from_u128(0x4000_8000_0000_0000_0000);
    SessionId::new(lowest).expect("a UUID with the version bits of 4 is a session id")
}

fn check_labels(labels: &Labels) -> Result<(), Refusal> {
    let invalid = |reason| Err(Refusal::InvalidField { field: "labels".to_owned(), reason });
    if labels.len() > LABELS_MAX {
        return invalid(format!("{} labels are more than {LABELS_MAX}", labels.len()));
    }
    match labels.iter().find(|(name, value)| {
        name.is_empty() || name.len() > LABEL_BYTES_MAX || value.len() > LABEL_BYTES_MAX
    }) {
        Some((name, _)) => {
            let shown: String = name.chars().take(32).collect();
            invalid(format!(
                "label '{shown}': names have 1 to {LABEL_BYTES_MAX} bytes, values at most {LABEL_BYTES_MAX}"
            ))
        }
        None => Ok(()),
    }
}
