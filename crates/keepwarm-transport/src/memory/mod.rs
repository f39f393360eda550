//! Links in memory: what the QUIC form must look like from outside, without sockets, certificates or luck.
//!
//! A [`Network`] joins the nodes of one process. Tests cut it, slow it, and crash nodes. As over QUIC, a cut loses
//! nothing until silence has lasted long enough for the link to count as broken.

mod transport;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use keepwarm_types::NodeName;
use keepwarm_wire::{Frame, Version, Versions};
use tokio::sync::{mpsc, watch};

use self::transport::MemoryTransport;
use crate::link::{Class, Incoming, PeerId, Transport};
use crate::pipe::Pipe;
use crate::quic::{IDLE, INCOMING_MAX, QUEUE_MAX};
use crate::stream::Counts;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a node knows of a peer.
#[derive(Debug)]
struct Known {
    address: String,
    reason: Option<String>,
    counts: Arc<Counts>,
    /// Events of one session end before those of the next begin.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// One process of a node.
#[derive(Debug)]
struct Member {
    id: PeerId,
    versions: Versions,
    incoming: mpsc::Sender<Incoming>,
    known: Mutex<BTreeMap<NodeName, Known>>,
    gone: Mutex<Option<String>>,
}

/// A link between two processes, from its making to its end.
#[derive(Debug)]
struct Session {
    /// The one with the lower name, and the other.
    ends: [Arc<Member>; 2],
    version: Version,
    queues: [mpsc::Sender<(tokio::time::Instant, Frame)>; 2],
    /// Each with the end that reads it.
    pipes: Mutex<Vec<(usize, Pipe)>>,
    /// Why it is over.
    over: watch::Sender<Option<String>>,
}

#[derive(Debug, Default)]
struct State {
    members: BTreeMap<NodeName, Arc<Member>>,
    sessions: BTreeMap<(NodeName, NodeName), Arc<Session>>,
    cuts: BTreeSet<(NodeName, NodeName)>,
    delay: Duration,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    changes: watch::Sender<u64>,
    silence: Duration,
}

/// A network of nodes in this process, and what goes wrong in it.
#[derive(Debug, Clone)]
pub struct Network(Arc<Inner>);

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

impl Network {
    /// A network on which nothing is wrong; a link breaks after as long a silence as over QUIC.
    #[must_use]
    pub fn new() -> Self {
        Self::with_silence(IDLE)
    }

    /// A network whose links break after `silence`.
    #[must_use]
    pub fn with_silence(silence: Duration) -> Self {
        Self(Arc::new(Inner { state: Mutex::default(), changes: watch::Sender::new(0), silence }))
    }

    /// A process joins. One of an earlier incarnation is replaced at once; beside a later one it stays alone. Must be
    /// called in a tokio runtime.
    #[must_use]
    pub fn join(&self, id: PeerId) -> (Arc<dyn Transport>, mpsc::Receiver<Incoming>) {
        self.join_speaking(id, Versions::ALL)
    }

    /// [`Network::join`] of a process that speaks these versions.
    #[must_use]
    pub fn join_speaking(
        &self,
        id: PeerId,
        versions: Versions,
    ) -> (Arc<dyn Transport>, mpsc::Receiver<Incoming>) {
        let (incoming, receiver) = mpsc::channel(INCOMING_MAX);
        let (known, gone) = (Mutex::default(), Mutex::default());
        let member = Arc::new(Member { id: id.clone(), versions, incoming, known, gone });
        {
            let mut state = locked(&self.0.state);
            let later = state.members.get(&id.node).map(|other| other.id.incarnation);
            if later.is_some_and(|later| later > id.incarnation) {
                *locked(&member.gone) = Some(later_start(&id.node));
            } else {
                if let Some(before) = state.members.insert(id.node.clone(), Arc::clone(&member)) {
                    *locked(&before.gone) = Some(later_start(&id.node));
                }
                state.end_of(&id.node, "replaced by a later start");
            }
        }
        self.0.changed();
        (Arc::new(MemoryTransport { member, inner: Arc::clone(&self.0) }), receiver)
    }

    /// Nothing arrives any more that `from` sends to `to`.
    pub fn cut_one_way(&self, from: &NodeName, to: &NodeName) {
        locked(&self.0.state).cuts.insert((from.clone(), to.clone()));
        self.0.changed();
    }

    /// Nothing arrives any more between two nodes.
    pub fn cut(&self, a: &NodeName, b: &NodeName) {
        locked(&self.0.state).cuts.extend([(a.clone(), b.clone()), (b.clone(), a.clone())]);
        self.0.changed();
    }

    /// Everything arrives again between two nodes.
    pub fn heal(&self, a: &NodeName, b: &NodeName) {
        locked(&self.0.state)
            .cuts
            .retain(|cut| *cut != (a.clone(), b.clone()) && *cut != (b.clone(), a.clone()));
        self.0.changed();
    }

    /// Everything takes this long to arrive.
    pub fn delay(&self, delay: Duration) {
        locked(&self.0.state).delay = delay;
        self.0.changed();
    }

    /// The node's process is gone without a word; its peers notice by its silence, or when it joins again.
    pub fn crash(&self, node: &NodeName) {
        if let Some(member) = locked(&self.0.state).members.remove(node) {
            *locked(&member.gone) = Some("it crashed".to_owned());
        }
        self.0.changed();
    }
}

fn later_start(node: &NodeName) -> String {
    format!("a later start of node '{node}' is connected: two processes have this name; stop this one")
}

impl State {
    fn end_of(&mut self, node: &NodeName, why: &str) {
        let of = |pair: &(NodeName, NodeName)| pair.0 == *node || pair.1 == *node;
        let ended: Vec<_> = self.sessions.keys().filter(|pair| of(pair)).cloned().collect();
        for pair in ended {
            self.end(&pair, why);
        }
    }

    fn end(&mut self, pair: &(NodeName, NodeName), why: &str) {
        let Some(session) = self.sessions.remove(pair) else { return };
        for (end, other) in [(0, 1), (1, 0)] {
            let other = &session.ends[other].id.node;
            if let Some(known) = locked(&session.ends[end].known).get_mut(other) {
                known.reason = Some(why.to_owned());
            }
        }
        for (_, pipe) in &*locked(&session.pipes) {
            pipe.fail(why);
        }
        session.over.send_replace(Some(why.to_owned()));
    }

    fn passes(&self, from: &Member, to: &Member) -> bool {
        !self.cuts.contains(&(from.id.node.clone(), to.id.node.clone()))
            && locked(&from.gone).is_none()
            && locked(&to.gone).is_none()
    }

    /// Pairs that list each other, reach each other, and have no session.
    fn unlinked(&self) -> Vec<[Arc<Member>; 2]> {
        let mut pairs = Vec::new();
        for (low, a) in &self.members {
            for node in locked(&a.known).keys().filter(|node| *node > low) {
                let Some(b) = self.members.get(node) else { continue };
                let both = self.passes(a, b) && self.passes(b, a) && locked(&b.known).contains_key(low);
                if both && !self.sessions.contains_key(&(low.clone(), node.clone())) {
                    pairs.push([Arc::clone(a), Arc::clone(b)]);
                }
            }
        }
        pairs
    }
}

impl Inner {
    /// Brings sessions and pipes in line with what the network is now.
    fn changed(self: &Arc<Self>) {
        let mut state = locked(&self.state);
        for ends in state.unlinked() {
            let pair = (ends[0].id.node.clone(), ends[1].id.node.clone());
            if let Some(version) = greet(&ends) {
                state.sessions.insert(pair, self.link(ends, version));
            }
        }
        for session in state.sessions.values() {
            for (reader, pipe) in &*locked(&session.pipes) {
                let (to, from) = (&session.ends[*reader], &session.ends[1 - reader]);
                pipe.shape(!state.passes(from, to), state.delay);
            }
        }
        drop(state);
        self.changes.send_modify(|change| *change += 1);
    }

    fn link(self: &Arc<Self>, ends: [Arc<Member>; 2], version: Version) -> Arc<Session> {
        let (to_first, first) = mpsc::channel(QUEUE_MAX);
        let (to_second, second) = mpsc::channel(QUEUE_MAX);
        for (end, other) in [(0, 1), (1, 0)] {
            if let Some(known) = locked(&ends[end].known).get_mut(&ends[other].id.node) {
                known.reason = None;
                known.counts.hear();
            }
        }
        let session = Arc::new(Session {
            ends,
            version,
            queues: [to_first, to_second],
            pipes: Mutex::default(),
            over: watch::Sender::new(None),
        });
        for (end, queue) in [(0, first), (1, second)] {
            tokio::spawn(deliver(Arc::clone(self), Arc::clone(&session), end, queue));
        }
        tokio::spawn(watch_silence(Arc::clone(self), Arc::clone(&session)));
        session
    }

    /// Waits until what `from` sends reaches `to`.
    async fn passage(&self, from: &Member, to: &Member) {
        let mut changes = self.changes.subscribe();
        loop {
            changes.mark_unchanged();
            if locked(&self.state).passes(from, to) {
                return;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Waits as long as everything takes, and then for the way to be free.
    async fn travel(&self, from: &Member, to: &Member) {
        let delay = locked(&self.state).delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        self.passage(from, to).await;
    }
}

/// What two ends speak; where they are too far apart each is told why.
fn greet(ends: &[Arc<Member>; 2]) -> Option<Version> {
    let mut spoken = None;
    for (end, other) in [(0, 1), (1, 0)] {
        match ends[end].versions.common(ends[other].versions) {
            Ok(version) => spoken = Some(version),
            Err(why) => {
                if let Some(known) = locked(&ends[end].known).get_mut(&ends[other].id.node) {
                    known.reason = Some(why.to_string());
                }
            }
        }
    }
    spoken
}

/// Hands one end of a session what comes to it: that the other is up, its frames, that it is down.
async fn deliver(
    inner: Arc<Inner>,
    session: Arc<Session>,
    end: usize,
    mut queue: mpsc::Receiver<(tokio::time::Instant, Frame)>,
) {
    let (to, from) = (&session.ends[end], &session.ends[1 - end]);
    let heard = locked(&to.known)
        .get(&from.id.node)
        .map(|known| (Arc::clone(&known.turn), Arc::clone(&known.counts)));
    let Some((turn, counts)) = heard else { return };
    let _turn = turn.lock().await;
    if to.incoming.send(Incoming::Up(from.id.clone(), session.version)).await.is_err() {
        return;
    }
    let frames = async {
        while let Some((at, frame)) = queue.recv().await {
            tokio::time::sleep_until(at).await;
            inner.passage(from, to).await;
            counts.received(Class::Ownership, frame.payload.len());
            if to.incoming.send(Incoming::Frame(from.id.clone(), frame)).await.is_err() {
                return;
            }
        }
    };
    let mut over = session.over.subscribe();
    let why = tokio::select! {
        why = ended(&mut over) => why,
        () = frames => ended(&mut over).await,
    };
    let _ = to.incoming.send(Incoming::Down(from.id.clone(), why)).await;
}

async fn ended(over: &mut watch::Receiver<Option<String>>) -> String {
    over.wait_for(Option::is_some).await.ok().and_then(|why| why.clone()).unwrap_or_default()
}

/// Ends a session after a silence in either direction: QUIC needs both to know that its peer is there.
async fn watch_silence(inner: Arc<Inner>, session: Arc<Session>) {
    let [a, b] = &session.ends;
    let mut changes = inner.changes.subscribe();
    let mut over = session.over.subscribe();
    let watching = async {
        loop {
            changes.mark_unchanged();
            let silent = {
                let state = locked(&inner.state);
                !state.passes(a, b) || !state.passes(b, a)
            };
            if !silent {
                if changes.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let healed = async {
                inner.passage(a, b).await;
                inner.passage(b, a).await;
            };
            if tokio::time::timeout(inner.silence, healed).await.is_err() {
                let pair = (a.id.node.clone(), b.id.node.clone());
                let mut state = locked(&inner.state);
                let mine = state.sessions.get(&pair).is_some_and(|now| Arc::ptr_eq(now, &session));
                if mine {
                    state.end(&pair, "timed out");
                }
                return;
            }
        }
    };
    tokio::select! {
        () = watching => {}
        _ = ended(&mut over) => {}
    }
}
