//! One connection: hello, then frames, calls and streams until it ends.
//!
//! Each side sends two streams of its own beside those that calls open: one with a heartbeat every 50 ms, which
//! nothing ever waits behind, and one with the frames, in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use keepwarm_types::NodeName;
use keepwarm_wire::{Frame, Hello, HelloAnswer, encode_frame};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use super::{DIAL_DEADLINE, QUEUE_MAX, STREAMS_MAX, Shared, Up};
use crate::link::{ByteStream, Class, Counts, Incoming, LinkError, PeerId, Responder, closed, read_frame};

/// How often a peer shows that it is there.
const HEARTBEAT: Duration = Duration::from_millis(50);
/// A connection over which nothing was heard for so long is given up and made anew: its peer may have been started
/// again, and knows nothing of it. Longer than a suspicion, so that a slow peer is not cut off for being suspected.
const SILENCE_MAX: Duration = Duration::from_millis(700);
/// First byte of a stream of heartbeats, and of one of frames.
const HEARTBEATS: u8 = 1;
const FRAMES: u8 = 2;
/// First byte of a call, and of a stream of bytes; the class is the second.
pub(super) const CALL: u8 = 3;
pub(super) const STREAM: u8 = 4;
/// How long a peer may take from opening a stream to its first frame.
const OPENING_DEADLINE: Duration = Duration::from_secs(10);
/// How long a call's answer is waited for here; its caller has a deadline of its own.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// Connections that are saying hello at once.
const HELLOS_MAX: usize = 256;

/// Takes connections until the endpoint closes.
pub(super) async fn accept(shared: Arc<Shared>) {
    let hellos = Arc::new(Semaphore::new(HELLOS_MAX));
    while let Some(incoming) = shared.endpoint.accept().await {
        let Ok(permit) = Arc::clone(&hellos).try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let from = incoming.remote_address();
            let up = match tokio::time::timeout(DIAL_DEADLINE, welcome(&shared, incoming)).await {
                Ok(Ok(up)) => up,
                Ok(Err(why)) => {
                    tracing::warn!(%from, %why, "a connection was refused");
                    return;
                }
                Err(_) => {
                    tracing::debug!(%from, "a connection did not say hello in time");
                    return;
                }
            };
            drop(permit);
            run(&shared, up).await;
        });
    }
}

fn hello(shared: &Shared) -> Hello {
    let settings = &shared.settings;
    let PeerId { node, incarnation } = settings.local.clone();
    Hello::new(settings.cluster.clone(), settings.cluster_id, node, incarnation)
}

/// Compares what a peer says with what its certificate says and with what is known.
fn check(shared: &Shared, connection: &Connection, said: &Hello) -> Result<PeerId, String> {
    let settings = &shared.settings;
    if said.cluster_id != settings.cluster_id || said.cluster != settings.cluster {
        return Err(format!(
            "it is of cluster '{}' ({:032x}), not of '{}' ({:032x}): compare the bootstrap files",
            said.cluster, said.cluster_id, settings.cluster, settings.cluster_id
        ));
    }
    if !shared.tls.loopback_only() {
        let identity = connection.peer_identity().ok_or("it has shown no certificate")?;
        let chain =
            identity.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| "its certificate is none")?;
        let named = shared.tls.named(chain.first().ok_or("it has shown no certificate")?)?;
        if named != said.node {
            return Err(format!("it says it is node '{}', and its certificate '{named}'", said.node));
        }
    }
    let id = PeerId { node: said.node.clone(), incarnation: said.incarnation };
    let peers = shared.peers();
    let Some(peer) = peers.get(&id.node) else {
        return Err(format!("node '{}' is not in the spec", id.node));
    };
    if let Some(up) = &peer.up
        && up.id.incarnation > id.incarnation
    {
        return Err(format!(
            "a later start of node '{}' is connected: two processes have this name",
            id.node
        ));
    }
    Ok(id)
}

async fn welcome(shared: &Shared, incoming: quinn::Incoming) -> Result<Up, String> {
    let connection = incoming.await.map_err(|error| error.to_string())?;
    let (mut send, mut receive) = connection.accept_bi().await.map_err(|error| error.to_string())?;
    let frame = read_frame(&mut receive).await.map_err(|error| error.to_string())?;
    let checked = Hello::read(&frame).map_err(|error| error.to_string()).and_then(|said| {
        let id = check(shared, &connection, &said)?;
        if id.node >= shared.settings.local.node {
            return Err("the node with the lower name dials".to_owned());
        }
        Ok(id)
    });
    let answer = match &checked {
        Ok(_) => HelloAnswer::Accepted(hello(shared)),
        Err(why) => HelloAnswer::Refused(why.clone()),
    };
    let bytes = encode_frame(&answer.frame()).map_err(|error| error.to_string())?;
    send.write_chunk(bytes).await.map_err(|error| error.to_string())?;
    let _ = send.finish();
    match checked {
        Ok(id) => Ok(established(shared, connection, id)),
        Err(why) => {
            // The reason is delivered before the connection goes.
            let _ = tokio::time::timeout(DIAL_DEADLINE, send.stopped()).await;
            connection.close(VarInt::from_u32(2), b"refused");
            Err(why)
        }
    }
}

/// Dials a peer and says hello.
pub(super) async fn dial(shared: &Shared, node: &NodeName, address: &str) -> Result<Up, String> {
    let found = tokio::net::lookup_host(address).await.map_err(|error| format!("{address}: {error}"))?;
    let here = shared.settings.listen;
    let fits = |to: &SocketAddr| to.is_ipv4() == here.is_ipv4();
    let to = found
        .into_iter()
        .find(fits)
        .ok_or_else(|| format!("{address} has no address of this node's kind"))?;
    if shared.tls.loopback_only() && !to.ip().is_loopback() {
        return Err(format!("{to} is beyond loopback: name certificates in [tls]"));
    }
    let config = shared.client_config(to)?;
    let connecting =
        shared.endpoint.connect_with(config, to, "keepwarm").map_err(|error| error.to_string())?;
    let connection = connecting.await.map_err(|error| error.to_string())?;
    let (mut send, mut receive) = connection.open_bi().await.map_err(|error| error.to_string())?;
    let bytes = encode_frame(&hello(shared).frame()).map_err(|error| error.to_string())?;
    send.write_chunk(bytes).await.map_err(|error| error.to_string())?;
    let _ = send.finish();
    let answer = read_frame(&mut receive).await.map_err(|error| error.to_string())?;
    let said = match HelloAnswer::read(&answer).map_err(|error| error.to_string())? {
        HelloAnswer::Accepted(said) => said,
        HelloAnswer::Refused(why) => return Err(format!("it refuses this node: {why}")),
    };
    let id = check(shared, &connection, &said)?;
    if id.node != *node {
        connection.close(VarInt::from_u32(2), b"refused");
        return Err(format!("node '{}' answers at {address}", id.node));
    }
    Ok(established(shared, connection, id))
}

/// The peer is up on this connection; an earlier one of it ends.
fn established(shared: &Shared, connection: Connection, id: PeerId) -> Up {
    let (queue, frames) = mpsc::channel(QUEUE_MAX);
    let up = Up { id: id.clone(), connection: connection.clone(), queue };
    if let Some(peer) = shared.peers().get_mut(&id.node) {
        if let Some(before) = peer.up.replace(up.clone()) {
            before.connection.close(VarInt::from_u32(3), b"replaced");
        }
        (peer.reason, peer.heard) = (None, Some(Instant::now()));
    }
    tokio::spawn(write_frames(connection.clone(), frames));
    tokio::spawn(beat(connection));
    up
}

/// Serves a connection until it ends, and says why it did.
pub(super) async fn run(shared: &Arc<Shared>, up: Up) -> String {
    let Up { id, connection, .. } = up;
    let _ = shared.incoming.send(Incoming::Up(id.clone())).await;
    let counts = shared.peers().get(&id.node).map(|peer| Arc::clone(&peer.counts)).unwrap_or_default();
    let mut tasks = JoinSet::new();
    tasks.spawn(accept_streams(Arc::clone(shared), connection.clone(), id.clone(), counts));
    tasks.spawn(accept_one_way(Arc::clone(shared), connection.clone(), id.clone()));
    let why = tokio::select! {
        why = connection.closed() => why.to_string(),
        () = silence(shared, &id) => {
            connection.close(VarInt::from_u32(6), b"silent");
            format!("nothing was heard of it for {} ms", SILENCE_MAX.as_millis())
        }
    };
    tasks.shutdown().await;
    let last = {
        let mut peers = shared.peers();
        let peer = peers.get_mut(&id.node);
        peer.is_some_and(|peer| {
            let mine = |up: &Up| up.connection.stable_id() == connection.stable_id();
            let last = peer.up.take_if(|up| mine(up)).is_some();
            if last {
                peer.reason = Some(why.clone());
            }
            last
        })
    };
    if last {
        let _ = shared.incoming.send(Incoming::Down(id, why.clone())).await;
    }
    why
}

/// Resolves once nothing was heard of a peer for too long.
async fn silence(shared: &Shared, id: &PeerId) {
    let mut ticks = tokio::time::interval(HEARTBEAT);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let heard = shared.peers().get(&id.node).and_then(|peer| peer.heard);
        if heard.is_none_or(|heard| heard.elapsed() > SILENCE_MAX) {
            return;
        }
    }
}

async fn beat(connection: Connection) {
    let Ok(mut send) = connection.open_uni().await else { return };
    let _ = send.set_priority(priority(Class::Liveness));
    let mut ticks = tokio::time::interval(HEARTBEAT);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if send.write_all(&[HEARTBEATS]).await.is_err() {
            return;
        }
    }
}

async fn write_frames(connection: Connection, mut frames: mpsc::Receiver<Frame>) {
    let Ok(mut send) = connection.open_uni().await else { return };
    let _ = send.set_priority(priority(Class::Ownership));
    if send.write_all(&[FRAMES]).await.is_err() {
        return;
    }
    while let Some(frame) = frames.recv().await {
        let bytes = match encode_frame(&frame) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::error!(%error, "a frame is not sent");
                continue;
            }
        };
        if send.write_chunk(bytes).await.is_err() {
            return;
        }
    }
    let _ = send.finish();
}

async fn accept_one_way(shared: Arc<Shared>, connection: Connection, id: PeerId) {
    let mut tasks = JoinSet::new();
    while let Ok(mut receive) = connection.accept_uni().await {
        let (shared, id, connection) = (Arc::clone(&shared), id.clone(), connection.clone());
        tasks.spawn(async move {
            let mut first = [0];
            if receive.read_exact(&mut first).await.is_err() {
                return;
            }
            match first[0] {
                HEARTBEATS => hear(&shared, &id, receive).await,
                FRAMES => take_frames(&shared, &id, &connection, receive).await,
                other => {
                    tracing::warn!(node = %id.node, kind = other, "a stream of an unknown kind");
                    connection.close(VarInt::from_u32(4), b"an unknown stream");
                }
            }
        });
        while tasks.try_join_next().is_some() {}
    }
}

async fn hear(shared: &Shared, id: &PeerId, mut receive: RecvStream) {
    let mut beats = [0; 64];
    loop {
        if let Some(peer) = shared.peers().get_mut(&id.node) {
            peer.heard = Some(Instant::now());
        }
        match receive.read(&mut beats).await {
            Ok(Some(_)) => {}
            _ => return,
        }
    }
}

async fn take_frames(shared: &Shared, id: &PeerId, connection: &Connection, mut receive: RecvStream) {
    loop {
        match read_frame(&mut receive).await {
            Ok(frame) => {
                if shared.incoming.send(Incoming::Frame(id.clone(), frame)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                // In order or not at all: what follows cannot be trusted to be what was meant.
                tracing::debug!(node = %id.node, %error, "the stream of frames ended");
                connection.close(VarInt::from_u32(4), b"the stream of frames broke");
                return;
            }
        }
    }
}

async fn accept_streams(shared: Arc<Shared>, connection: Connection, id: PeerId, counts: Arc<Counts>) {
    let limit = Arc::new(Semaphore::new(STREAMS_MAX as usize));
    while let Ok((send, receive)) = connection.accept_bi().await {
        let Ok(permit) = Arc::clone(&limit).acquire_owned().await else { return };
        let (shared, id, counts) = (Arc::clone(&shared), id.clone(), Arc::clone(&counts));
        tokio::spawn(async move {
            let opening = tokio::time::timeout(OPENING_DEADLINE, opened(&shared, &id, send, receive, counts));
            match opening.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(node = %id.node, %error, "a stream broke off"),
                Err(_) => tracing::debug!(node = %id.node, "a stream did not say in time what it is for"),
            }
            drop(permit);
        });
    }
}

/// Reads what a stream is for, and hands it on.
async fn opened(
    shared: &Shared,
    id: &PeerId,
    send: SendStream,
    mut receive: RecvStream,
    counts: Arc<Counts>,
) -> Result<(), LinkError> {
    let mut first = [0; 2];
    receive.read_exact(&mut first).await.map_err(closed)?;
    let class = Class::from_number(first[1]).ok_or_else(|| closed("a stream of an unknown class"))?;
    let _ = send.set_priority(priority(class));
    let header = read_frame(&mut receive).await?;
    let mut stream = ByteStream::new(send, receive, counts, class);
    let from = id.clone();
    match first[0] {
        CALL => {
            let (answer, answered) = oneshot::channel();
            let call = Incoming::Call { from, class, request: header, answer: Responder(answer) };
            shared.incoming.send(call).await.map_err(|_| closed("the node stops"))?;
            tokio::spawn(async move {
                // Without an answer the stream is dropped, which its caller sees as an error.
                if let Ok(Ok(answer)) = tokio::time::timeout(ANSWER_DEADLINE, answered).await
                    && stream.write_frame(&answer).await.is_ok()
                {
                    stream.finish();
                }
            });
            Ok(())
        }
        STREAM => {
            let opened = Incoming::Stream { from, class, header, stream };
            shared.incoming.send(opened).await.map_err(|_| closed("the node stops"))
        }
        other => Err(closed(format!("a stream of an unknown kind {other}"))),
    }
}

/// Opens a call or a stream.
pub(super) async fn open(
    up: &Up,
    counts: Arc<Counts>,
    class: Class,
    kind: u8,
    header: &Frame,
) -> Result<ByteStream, LinkError> {
    let (send, receive) = up.connection.open_bi().await.map_err(closed)?;
    let _ = send.set_priority(priority(class));
    let mut first = BytesMut::new();
    first.put_slice(&[kind, class.number()]);
    first.put_slice(&encode_frame(header).map_err(closed)?);
    let mut stream = ByteStream::new(send, receive, counts, class);
    stream.write_chunk(first.freeze()).await?;
    Ok(stream)
}

/// quinn sends what has a higher priority first.
const fn priority(class: Class) -> i32 {
    100 - class.number() as i32 * 10
}
