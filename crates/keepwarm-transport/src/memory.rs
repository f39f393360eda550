//! Links in memory: what the QUIC form must look like from outside, without sockets, certificates or luck.
//!
//! A [`Network`] joins the nodes of one process. Tests cut it, slow it, and crash nodes. As over QUIC, a cut loses
//! nothing until silence has lasted long enough for the link to count as broken.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use keepwarm_types::{Incarnation, NodeName};
use keepwarm_wire::{Frame, encode_frame};
use tokio::sync::{mpsc, oneshot, watch};

use crate::link::{Class, Incoming, LinkError, PeerId, PeerStatus, Responder, Transport, closed};
use crate::pipe::Pipe;
use crate::quic::{IDLE, INCOMING_MAX, QUEUE_MAX};
use crate::stream::{ByteStream, Counts};

/// Pipes of a session above which those that nobody uses any more are forgotten.
const PIPES_SWEPT_AT: usize = 64;

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
    incoming: mpsc::Sender<Incoming>,
    known: Mutex<BTreeMap<NodeName, Known>>,
    gone: Mutex<Option<String>>,
}

/// A link between two processes, from its making to its end.
#[derive(Debug)]
struct Session {
    /// The one with the lower name, and the other.
    ends: [Arc<Member>; 2],
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
        let (incoming, receiver) = mpsc::channel(INCOMING_MAX);
        let member =
            Arc::new(Member { id: id.clone(), incoming, known: Mutex::default(), gone: Mutex::default() });
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
            let session = self.link(ends);
            state.sessions.insert(pair, session);
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

    fn link(self: &Arc<Self>, ends: [Arc<Member>; 2]) -> Arc<Session> {
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
    if to.incoming.send(Incoming::Up(from.id.clone())).await.is_err() {
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

/// A node's end of a [`Network`].
#[derive(Debug)]
struct MemoryTransport {
    member: Arc<Member>,
    inner: Arc<Inner>,
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        self.close();
    }
}

/// A way to a peer that is up.
struct Way {
    session: Arc<Session>,
    /// The end that the peer is.
    end: usize,
    counts: Arc<Counts>,
}

impl Way {
    fn there(&self) -> &Arc<Member> {
        &self.session.ends[self.end]
    }

    /// What the peer counts this node's bytes in.
    fn their_counts(&self, me: &NodeName) -> Arc<Counts> {
        locked(&self.there().known).get(me).map(|known| Arc::clone(&known.counts)).unwrap_or_default()
    }
}

impl MemoryTransport {
    fn way(&self, node: &NodeName) -> Result<Way, LinkError> {
        let me = &self.member.id.node;
        let pair = if me < node { (me.clone(), node.clone()) } else { (node.clone(), me.clone()) };
        let end = usize::from(me < node);
        let state = locked(&self.inner.state);
        let session = state.sessions.get(&pair).filter(|now| Arc::ptr_eq(&now.ends[1 - end], &self.member));
        let not = || LinkError::NotConnected(node.clone());
        let session = Arc::clone(session.filter(|_| locked(&self.member.gone).is_none()).ok_or_else(not)?);
        let counts = locked(&self.member.known).get(node).map(|known| Arc::clone(&known.counts));
        Ok(Way { session, end, counts: counts.ok_or_else(not)? })
    }

    async fn ask(&self, way: Way, class: Class, request: Frame) -> Result<Frame, LinkError> {
        let there = Arc::clone(way.there());
        let theirs = way.their_counts(&self.member.id.node);
        encode_frame(&request).map_err(closed)?;
        let bytes = request.payload.len();
        let work = async {
            way.counts.sent(class, bytes);
            self.inner.travel(&self.member, &there).await;
            theirs.received(class, bytes);
            let (answer, answered) = oneshot::channel();
            let from = self.member.id.clone();
            let call = Incoming::Call { from, class, request, answer: Responder(answer) };
            there.incoming.send(call).await.map_err(|_| closed("the node stops"))?;
            let answer = answered.await.map_err(|_| closed("the call was not answered"))?;
            encode_frame(&answer).map_err(closed)?;
            theirs.sent(class, answer.payload.len());
            self.inner.travel(&there, &self.member).await;
            way.counts.received(class, answer.payload.len());
            Ok(answer)
        };
        let mut over = way.session.over.subscribe();
        tokio::select! {
            done = work => done,
            why = ended(&mut over) => Err(closed(why)),
        }
    }
}

impl Transport for MemoryTransport {
    fn local(&self) -> &PeerId {
        &self.member.id
    }

    fn send(&self, to: &NodeName, frame: Frame) -> Result<(), LinkError> {
        encode_frame(&frame).map_err(closed)?;
        let way = self.way(to)?;
        let (delay, bytes) = (locked(&self.inner.state).delay, frame.payload.len());
        way.session.queues[way.end].try_send((tokio::time::Instant::now() + delay, frame)).map_err(
            |error| match error {
                mpsc::error::TrySendError::Full(_) => LinkError::Full(to.clone()),
                mpsc::error::TrySendError::Closed(_) => LinkError::NotConnected(to.clone()),
            },
        )?;
        way.counts.sent(Class::Ownership, bytes);
        Ok(())
    }

    fn call(
        &self,
        to: &NodeName,
        class: Class,
        request: Frame,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Frame, LinkError>> {
        let (to, way) = (to.clone(), self.way(to));
        Box::pin(async move {
            match tokio::time::timeout(deadline, self.ask(way?, class, request)).await {
                Ok(done) => done,
                Err(_) => Err(LinkError::Deadline(to)),
            }
        })
    }

    fn open(
        &self,
        to: &NodeName,
        class: Class,
        header: Frame,
    ) -> BoxFuture<'_, Result<ByteStream, LinkError>> {
        let way = self.way(to);
        Box::pin(async move {
            let way = way?;
            let (mine, theirs) = (Pipe::default(), Pipe::default());
            {
                let state = locked(&self.inner.state);
                let mut pipes = locked(&way.session.pipes);
                if pipes.len() >= PIPES_SWEPT_AT {
                    pipes.retain(|(_, pipe)| !pipe.abandoned());
                }
                for (end, pipe) in [(1 - way.end, &mine), (way.end, &theirs)] {
                    let (to, from) = (&way.session.ends[end], &way.session.ends[1 - end]);
                    pipe.shape(!state.passes(from, to), state.delay);
                    pipes.push((end, pipe.clone()));
                }
            }
            let counts = Arc::clone(&way.counts);
            let stream = ByteStream::in_memory(mine.clone(), theirs.clone(), counts, class, None);
            let (inner, member) = (Arc::clone(&self.inner), Arc::clone(&self.member));
            tokio::spawn(async move {
                let there = Arc::clone(way.there());
                let counts = way.their_counts(&member.id.node);
                let stream = ByteStream::in_memory(theirs, mine, counts, class, None);
                let arrive = async {
                    inner.travel(&member, &there).await;
                    let opened = Incoming::Stream { from: member.id.clone(), class, header, stream };
                    let _ = there.incoming.send(opened).await;
                };
                let mut over = way.session.over.subscribe();
                tokio::select! {
                    () = arrive => {}
                    _ = ended(&mut over) => {}
                }
            });
            Ok(stream)
        })
    }

    fn set_peers(&self, peers: Vec<(NodeName, String)>) {
        let me = &self.member.id.node;
        let wanted: BTreeMap<_, _> = peers.into_iter().filter(|(node, _)| node != me).collect();
        {
            let mut state = locked(&self.inner.state);
            let known = locked(&self.member.known);
            let stays = |node: &NodeName, known: &Known| wanted.get(node) == Some(&known.address);
            let gone: Vec<_> = known.iter().filter(|(n, k)| !stays(n, k)).map(|(n, _)| n.clone()).collect();
            drop(known);
            for node in gone {
                let pair = if *me < node { (me.clone(), node.clone()) } else { (node.clone(), me.clone()) };
                state.end(&pair, "not a peer any more");
                locked(&self.member.known).remove(&node);
            }
            let mut known = locked(&self.member.known);
            for (node, address) in wanted {
                known.entry(node).or_insert_with(|| Known {
                    address,
                    reason: Some("it was not reached yet".to_owned()),
                    counts: Arc::default(),
                    turn: Arc::default(),
                });
            }
        }
        self.inner.changed();
    }

    fn peers(&self) -> Vec<PeerStatus> {
        // The state's lock is taken before a member's, never after.
        let nodes: Vec<_> = locked(&self.member.known).keys().cloned().collect();
        let ups: BTreeMap<NodeName, Incarnation> = nodes
            .iter()
            .filter_map(|node| Some((node.clone(), self.way(node).ok()?.there().id.incarnation)))
            .collect();
        let (delay, silent) = {
            let state = locked(&self.inner.state);
            let silent = |node: &&NodeName| {
                state.members.get(*node).is_none_or(|there| !state.passes(there, &self.member))
            };
            (state.delay, nodes.iter().filter(silent).cloned().collect::<BTreeSet<_>>())
        };
        let gone = locked(&self.member.gone).clone();
        let known = locked(&self.member.known);
        let status = |(node, known): (&NodeName, &Known)| {
            let up = ups.get(node).copied();
            // Heartbeats are not played: while nothing is wrong, one would have just come.
            if up.is_some() && !silent.contains(node) {
                known.counts.hear();
            }
            PeerStatus {
                node: node.clone(),
                address: known.address.clone(),
                up,
                reason: up.is_none().then(|| gone.clone().or_else(|| known.reason.clone())).flatten(),
                rtt: up.map(|_| delay * 2),
                last_heard: known.counts.heard(),
                bytes: known.counts.bytes(),
            }
        };
        known.iter().map(status).collect()
    }

    fn disconnect(&self, node: &NodeName) {
        let me = &self.member.id.node;
        let pair = if me < node { (me.clone(), node.clone()) } else { (node.clone(), me.clone()) };
        if self.way(node).is_ok() {
            locked(&self.inner.state).end(&pair, "taken for gone");
        }
        self.inner.changed();
    }

    fn close(&self) {
        let node = &self.member.id.node;
        {
            let mut state = locked(&self.inner.state);
            if state.members.get(node).is_some_and(|now| Arc::ptr_eq(now, &self.member)) {
                state.members.remove(node);
                state.end_of(node, "the node stops");
            }
            *locked(&self.member.gone) = Some("the node stops".to_owned());
        }
        self.inner.changed();
    }
}
