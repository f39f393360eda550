//! A node's end of a network in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use keepwarm_types::{Incarnation, NodeName};
use keepwarm_wire::{Frame, Version, encode_frame};
use tokio::sync::{mpsc, oneshot};

use super::{Inner, Known, Member, Session, ended, locked};
use crate::link::{Class, Incoming, LinkError, PeerId, PeerStatus, Responder, Transport, closed};
use crate::pipe::Pipe;
use crate::stream::{ByteStream, Counts};

/// Pipes of a session above which those that nobody uses any more are forgotten.
const PIPES_SWEPT_AT: usize = 64;

/// A node's end of a [`super::Network`].
#[derive(Debug)]
pub(super) struct MemoryTransport {
    pub(super) member: Arc<Member>,
    pub(super) inner: Arc<Inner>,
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
            let (to, answered) = oneshot::channel();
            let (from, answer) = (self.member.id.clone(), Responder { to, version: way.session.version });
            let call = Incoming::Call { from, class, request, answer };
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

    fn version(&self, peer: &NodeName) -> Option<Version> {
        self.way(peer).ok().map(|way| way.session.version)
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
            let (counts, version) = (Arc::clone(&way.counts), way.session.version);
            let stream = ByteStream::in_memory(mine.clone(), theirs.clone(), counts, class, version);
            let (inner, member) = (Arc::clone(&self.inner), Arc::clone(&self.member));
            tokio::spawn(async move {
                let there = Arc::clone(way.there());
                let counts = way.their_counts(&member.id.node);
                let stream = ByteStream::in_memory(theirs, mine, counts, class, version);
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
        let up = |node: &NodeName| {
            let way = self.way(node).ok()?;
            Some((node.clone(), (way.there().id.incarnation, way.session.version)))
        };
        let ups: BTreeMap<NodeName, (Incarnation, Version)> = nodes.iter().filter_map(up).collect();
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
                up: up.map(|(incarnation, _)| incarnation),
                version: up.map(|(_, version)| version),
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
