//! Comparing heads and installing what differs: at take-over, before the first answer about a session, and to fill
//! a learner.

use std::collections::BTreeMap;
use std::sync::Arc;

use keepwarm_types::{SessionKey, Timestamp};

use super::event::ReplicaCommand;
use super::message::{Compare, Content, Install, Message, Span};
use super::office::{Office, WAITING_MAX};
use super::state::{Part, RESEND, Replica, release};
use crate::registry::{Change, Member};
use crate::session::{Stamp, TranscriptDelta};
use crate::shard::{RETRY_AFTER, Refusal, Request};

/// Heads in one comparison: 256 of some 60 bytes are 16 KiB, a few packets.
const HEADS_MAX: usize = 256;
/// Sessions on their way to one replica at once.
const INSTALLS_MAX: usize = 64;

/// Another member of the set, as the primary knows it.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    pub(super) member: Member,
    pub(super) learner: bool,
    /// When it came into the set, or this office began.
    pub(super) joined: Timestamp,
    /// The sweep came so far; all keys up to it are settled, but for those in `installs`.
    pub(super) cursor: Option<SessionKey>,
    /// The sweep came to its end.
    pub(super) done: bool,
    /// Sessions that were sent whole, and when.
    pub(super) installs: BTreeMap<SessionKey, Timestamp>,
    /// The last round that it confirmed.
    pub(super) confirmed: u64,
    /// Committed heads that it did not note yet, and when it was told last.
    pub(super) notices: BTreeMap<SessionKey, (Stamp, Option<Timestamp>)>,
    /// Whether it noted that all heads of earlier offices are settled, and when it was told last.
    pub(super) settled_noted: bool,
    pub(super) settled_told: Option<Timestamp>,
}

impl Peer {
    pub(super) const fn new(member: Member, joined: Timestamp) -> Self {
        Self {
            member,
            learner: false,
            joined,
            cursor: None,
            done: false,
            installs: BTreeMap::new(),
            confirmed: 0,
            notices: BTreeMap::new(),
            settled_noted: false,
            settled_told: None,
        }
    }

    /// Has all of what was there when it joined.
    pub(super) fn filled(&self) -> bool {
        self.done && self.installs.is_empty()
    }

    fn settled(&self, key: &SessionKey) -> bool {
        let swept = self.done || self.cursor.as_ref().is_some_and(|cursor| key <= cursor);
        swept && !self.installs.contains_key(key)
    }
}

/// A comparison that is not answered yet.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) peer: Member,
    span: Span,
    at: Timestamp,
}

impl Office {
    pub(super) fn is_settled(&self, key: &SessionKey) -> bool {
        self.swept || self.settled.contains(key) || self.secondaries().all(|peer| peer.settled(key))
    }

    /// Heads within a span, at most [`HEADS_MAX`]; and the key that they reach to, if there are more.
    fn heads(&self, after: Option<&SessionKey>) -> (Vec<(SessionKey, Stamp)>, Option<SessionKey>) {
        // A change that was sent has its head in the catalogs already, and its session may be new.
        let mut heads: BTreeMap<&SessionKey, Stamp> = BTreeMap::new();
        let limit = HEADS_MAX + 1;
        let live = self.shard.sessions_after(after).take(limit);
        heads.extend(live.map(|(key, manifest)| (key, manifest.stamp)));
        let graves = self.shard.graves_after(after).take(limit);
        heads.extend(graves.map(|(key, grave)| (key, grave.stamp)));
        for change in self.changes.values().filter(|change| change.sent) {
            if after.is_none_or(|after| change.key > *after)
                && let Some(stamp) = change.record.stamp()
            {
                heads.insert(&change.key, stamp);
            }
        }
        let more = heads.len() > HEADS_MAX;
        let page: Vec<_> =
            heads.into_iter().take(HEADS_MAX).map(|(key, stamp)| (key.clone(), stamp)).collect();
        let through = if more { page.last().map(|(key, _)| key.clone()) } else { None };
        (page, through)
    }
}

impl Replica {
    /// Asks each peer that is not filled for the next stretch.
    pub(super) fn sweep(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let mut questions = Vec::new();
        for peer in office.peers.iter().filter(|peer| !peer.done && peer.installs.len() < INSTALLS_MAX) {
            let sweeping =
                |asked: &Asked| asked.peer == peer.member && matches!(asked.span, Span::Between { .. });
            if !office.asked.values().any(sweeping) {
                let (heads, through) = office.heads(peer.cursor.as_ref());
                let span = Span::Between { after: peer.cursor.clone(), through };
                questions.push((peer.member.clone(), span, heads));
            }
        }
        for (peer, span, heads) in questions {
            self.ask_heads(now, &peer, span, heads, out);
        }
    }

    fn ask_heads(
        &mut self,
        now: Timestamp,
        peer: &Member,
        span: Span,
        heads: Vec<(SessionKey, Stamp)>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        office.questions += 1;
        let id = office.questions;
        office.asked.insert(id, Asked { peer: peer.clone(), span: span.clone(), at: now });
        self.say(peer, Message::Compare(Compare { id, span, heads }), out);
    }

    /// Whether a request must wait until this session is settled; if so it is kept.
    //= GUARANTEES.md#G11
    pub(super) fn unsettled(
        &mut self,
        now: Timestamp,
        key: &SessionKey,
        request: Request,
        out: &mut Vec<ReplicaCommand>,
    ) -> Option<Request> {
        let saving = self.saving.contains_key(key);
        let Part::Primary(office) = &mut self.part else { return Some(request) };
        if !saving && office.is_settled(key) {
            return Some(request);
        }
        let (_, waiting) = office.unsettled.entry(key.clone()).or_insert_with(|| (now, Default::default()));
        if waiting.len() >= WAITING_MAX {
            let refusal = Refusal::Overloaded { what: "requests for this session", retry_after: RETRY_AFTER };
            out.push(ReplicaCommand::Reply(request.id, Err(refusal)));
            return None;
        }
        waiting.push_back(request);
        if waiting.len() == 1 {
            let head = office.head(key);
            let heads: Vec<_> = head.map(|stamp| (key.clone(), stamp)).into_iter().collect();
            let peers: Vec<_> = office
                .secondaries()
                .filter(|peer| !peer.settled(key) && !peer.installs.contains_key(key))
                .map(|peer| peer.member.clone())
                .collect();
            for peer in peers {
                self.ask_heads(now, &peer, Span::One(key.clone()), heads.clone(), out);
            }
        }
        None
    }

    pub(super) fn compared(
        &mut self,
        now: Timestamp,
        from: &Member,
        id: u64,
        differing: Vec<SessionKey>,
        lacking: Vec<SessionKey>,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        if office.asked.get(&id).is_none_or(|asked| asked.peer != *from) {
            return;
        }
        let Some(Asked { span, .. }) = office.asked.remove(&id) else { return };
        let Some(peer) = office.peer(from) else { return };
        let one = match span {
            Span::Between { through: None, .. } => {
                peer.done = true;
                None
            }
            Span::Between { through, .. } => {
                peer.cursor = through;
                None
            }
            Span::One(key) => Some(key),
        };
        for key in differing {
            self.install_at(now, from, &key, out);
        }
        for key in lacking {
            self.lacks(now, from, &key, out);
        }
        if let Some(key) = one {
            self.one_settled(&key);
        }
        self.sweep(now, out);
        self.touched(now, out);
    }

    /// A session that somebody waits for is settled once each secondary has answered for it.
    fn one_settled(&mut self, key: &SessionKey) {
        let Part::Primary(office) = &mut self.part else { return };
        let asked = |peer: &Peer| {
            let one = |asked: &Asked| asked.peer == peer.member && asked.span == Span::One(key.clone());
            office.asked.values().any(one)
        };
        let open = office.secondaries().any(|peer| peer.installs.contains_key(key) || asked(peer));
        if !open && office.unsettled.contains_key(key) {
            office.settled.insert(key.clone());
        }
    }

    /// Sends a session whole: as the change makes it that is on its way, if any. So what is sent later never takes back what
    /// was sent before, and an acknowledgement stands whatever comes late or twice.
    //= GUARANTEES.md#G10
    pub(super) fn install_at(
        &mut self,
        now: Timestamp,
        to: &Member,
        key: &SessionKey,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        let Some(peer) = office.peer(to) else { return };
        peer.installs.insert(key.clone(), now);
        if let Some(ticket) = office.changing.get(key)
            && let Some(change) = office.changes.get_mut(ticket)
        {
            change.given |= change.sent;
        }
        let whole = |content| Message::Install(Box::new(Install { key: key.clone(), content }));
        let pending = office.changing.get(key).and_then(|ticket| office.changes.get(ticket));
        let pending = pending.filter(|change| change.sent);
        if let Some(grave) = pending.and_then(|change| change.record.grave()) {
            // The catalog may not have what was before any more.
            return self.say(to, whole(Content::Ended(grave)), out);
        }
        let pending = pending.and_then(|change| change.manifest().cloned());
        match pending.or_else(|| office.shard.committed(key).cloned()) {
            None => {
                let content = office.shard.grave(key).map_or(Content::Absent, |grave| Content::Ended(*grave));
                self.say(to, whole(content), out);
            }
            Some(manifest) => {
                let content = Content::Live(Arc::clone(&manifest), TranscriptDelta::default());
                let envelope = self.envelope(to, whole(content));
                if manifest.transcript_tokens.0 == 0 && manifest.transcript_messages == 0 {
                    out.push(ReplicaCommand::Send(envelope));
                } else {
                    // Its transcript is in the own catalog, or will be: then it is sent again.
                    out.push(ReplicaCommand::SendWhole(envelope));
                }
            }
        }
    }

    /// The own catalog has a change: who is to have its session whole can be sent it now.
    pub(super) fn install_saved(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &self.part else { return };
        let waits = office.peers.iter().filter(|peer| peer.installs.contains_key(key));
        let waiting: Vec<_> = waits.map(|peer| peer.member.clone()).collect();
        for member in waiting {
            self.install_at(now, &member, key, out);
        }
    }

    /// A session that is here, but not on this node's disk, and that cannot be put there any more, was never acknowledged:
    /// it goes, here and wherever else it came to.
    pub(super) fn never_was(&mut self, now: Timestamp, key: &SessionKey, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let mut commands = Vec::new();
        if !office.shard.never_was(now, key, &mut commands) {
            return;
        }
        out.extend(commands.into_iter().map(ReplicaCommand::Shard));
        // Nobody is answered that it is not there before it is nowhere.
        office.swept = false;
        office.settled.remove(key);
        let peers: Vec<_> = office.peers.iter().map(|peer| peer.member.clone()).collect();
        for peer in peers {
            self.install_at(now, &peer, key, out);
        }
    }

    pub(super) fn installed(
        &mut self,
        now: Timestamp,
        from: &Member,
        key: &SessionKey,
        head: Option<Stamp>,
        holding: bool,
        out: &mut Vec<ReplicaCommand>,
    ) {
        let Part::Primary(office) = &mut self.part else { return };
        let sent = office.changing.get(key).copied();
        let sent = sent.filter(|ticket| office.changes.get(ticket).is_some_and(|change| change.sent));
        let target = office.head(key);
        let committed = office.committed_head(key);
        let Some(peer) = office.peer(from) else { return };
        if peer.installs.remove(key).is_none() && sent.is_none() {
            return;
        }
        match sent {
            // The session whole is the change that it waits for.
            Some(ticket) if head == target => self.prepared_at(now, from, ticket, holding, out),
            Some(ticket) => self.send_change(now, ticket, Some(from), out),
            None if head == committed => {
                if let Some(head) = head {
                    peer.notices.insert(key.clone(), (head, None));
                }
                if !holding {
                    self.lacks(now, from, key, out);
                }
            }
            None => self.install_at(now, from, key, out),
        }
        self.one_settled(key);
        self.sweep(now, out);
        self.touched(now, out);
    }

    /// Takes up whatever waited for what has been settled since.
    pub(super) fn touched(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        if !office.swept && office.secondaries().all(Peer::filled) {
            office.swept = true;
            office.settled.clear();
            let stale: Vec<_> = std::mem::take(&mut office.stale).into_values().flatten().collect();
            if !stale.is_empty() {
                out.push(release(stale));
            }
        }
        self.tell_settled(now, out);
        let saving = &self.saving;
        let Part::Primary(office) = &mut self.part else { return };
        let ready: Vec<_> = office
            .unsettled
            .keys()
            .filter(|key| !saving.contains_key(*key) && office.is_settled(key))
            .cloned()
            .collect();
        for key in ready {
            let Part::Primary(office) = &mut self.part else { return };
            let Some((_, requests)) = office.unsettled.remove(&key) else { continue };
            for request in requests {
                self.request(now, request, out);
            }
        }
        self.promote_learner(now, out);
    }

    /// Tells who has all heads that those of earlier offices are settled, until it says that it heard.
    fn tell_settled(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        if !office.swept {
            return;
        }
        let before = office.began;
        let mut to = Vec::new();
        for peer in office.peers.iter_mut().filter(|peer| peer.filled() && !peer.settled_noted) {
            if peer.settled_told.is_none_or(|at| now.since(at) >= RESEND) {
                peer.settled_told = Some(now);
                to.push(peer.member.clone());
            }
        }
        for peer in to {
            self.say(&peer, Message::Settled { before }, out);
        }
    }

    /// A learner that has every manifest becomes a replica; it had to have each change since it came.
    fn promote_learner(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let ready = office.peers.iter().any(|peer| peer.learner && peer.filled());
        if ready && office.swept && office.proposed.is_none() {
            office.propose(now, false);
            out.push(ReplicaCommand::Propose(Change::Promote));
        }
    }

    /// Sends again what was not answered for [`RESEND`], or, to a member whose link is new, all that it did not answer.
    pub(super) fn resend(&mut self, now: Timestamp, to: Option<&Member>, out: &mut Vec<ReplicaCommand>) {
        let Part::Primary(office) = &mut self.part else { return };
        let due = |at: Timestamp, member: &Member| match to {
            Some(to) => to == member,
            None => now.since(at) >= RESEND,
        };
        let again: Vec<_> = office
            .asked
            .extract_if(.., |_, asked| due(asked.at, &asked.peer))
            .map(|(_, asked)| asked)
            .collect();
        let ones = again.into_iter().filter_map(|asked| match asked.span {
            Span::One(key) => Some((asked.peer, key)),
            // The sweep asks anew, for what is there now.
            Span::Between { .. } => None,
        });
        let ones: Vec<_> = ones.map(|(peer, key)| (peer, office.head(&key), key)).collect();
        let installs: Vec<_> = office
            .peers
            .iter()
            .flat_map(|peer| peer.installs.iter().map(move |(key, at)| (peer, key, *at)))
            .filter(|(peer, _, at)| due(*at, &peer.member))
            .map(|(peer, key, _)| (peer.member.clone(), key.clone()))
            .collect();
        let changes: Vec<_> = office
            .changes
            .iter()
            .filter(|(_, change)| change.sent && (to.is_some() || now.since(change.at) >= RESEND))
            .map(|(ticket, _)| *ticket)
            .collect();
        for (peer, head, key) in ones {
            let heads = head.map(|stamp| (key.clone(), stamp)).into_iter().collect();
            self.ask_heads(now, &peer, Span::One(key), heads, out);
        }
        for (peer, key) in installs {
            self.install_at(now, &peer, &key, out);
        }
        for ticket in changes {
            self.send_change(now, ticket, to, out);
        }
        self.sweep(now, out);
    }

    /// Whoever waited too long for a session to be settled or fetched is refused.
    pub(super) fn give_up_waiting(&mut self, now: Timestamp, out: &mut Vec<ReplicaCommand>) {
        let deadline = self.settings.write_deadline;
        let Part::Primary(office) = &mut self.part else { return };
        let late = |since: Timestamp| now.since(since) >= deadline;
        let unsettled = office.unsettled.extract_if(.., |_, (since, _)| late(*since));
        let why = "its copies did not answer";
        let mut refused: Vec<_> =
            unsettled.flat_map(|(_, (_, waiting))| waiting).map(|r| (r.id, why)).collect();
        let unfetched = office.unfetched.extract_if(.., |_, (since, _)| late(*since));
        let why = "the session's bytes could not be fetched from their holder";
        refused.extend(unfetched.flat_map(|(_, (_, waiting))| waiting).map(|r| (r.id, why)));
        for (id, why) in refused {
            out.push(ReplicaCommand::Reply(id, Err(Refusal::Moving(why))));
        }
    }
}
