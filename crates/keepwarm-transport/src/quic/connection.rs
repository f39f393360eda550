//! One connection after its hello: frames, calls and streams until it ends.
//!
//! Each side sends two streams of its own beside those that calls open: one with a heartbeat every 50 ms, which
//! nothing ever waits behind, and one with the frames, in order.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use keepwarm_wire::{Frame, HEADER_BYTES, Version, decode_header, encode_frame};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::endpoint::Window;
use super::hello::explained;
use super::{Shared, Up};
use crate::link::{Class, Incoming, LinkError, PeerId, Responder, closed};
use crate::stream::{ByteStream, Counts, Kept};

/// How often a peer shows that it is there.
const HEARTBEAT: Duration = Duration::from_millis(50);
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
/// Code of a connection that ended because the peer did not keep to the protocol.
const BROKEN: VarInt = VarInt::from_u32(4);

/// Begins to send heartbeats and frames.
pub(super) fn begin(connection: &Connection, frames: mpsc::Receiver<Frame>, counts: Arc<Counts>) {
    tokio::spawn(write_frames(connection.clone(), frames, counts));
    tokio::spawn(beat(connection.clone()));
}

/// Serves a connection until it ends, and says why it did. Whoever waits for the peer to be dialled is woken then.
pub(super) async fn run(shared: &Arc<Shared>, up: Up) -> String {
    let known = shared
        .peers()
        .get(&up.id.node)
        .map(|peer| (Arc::clone(&peer.turn), Arc::clone(&peer.counts), Arc::clone(&peer.wake)));
    let Some((turn, counts, wake)) = known else { return "not a peer any more".to_owned() };
    let Up { id, version, connection, window, .. } = up;
    let _turn = turn.lock_owned().await;
    let _ = shared.incoming.send(Incoming::Up(id.clone(), version)).await;
    let streams = Streams { shared: Arc::clone(shared), id: id.clone(), version, counts, window };
    let mut tasks = JoinSet::new();
    tasks.spawn(accept_streams(streams.clone(), connection.clone()));
    tasks.spawn(accept_one_way(streams, connection.clone()));
    let why = explained(&connection.closed().await);
    tasks.shutdown().await;
    if let Some(peer) = shared.peers().get_mut(&id.node) {
        let mine = |up: &mut Up| up.connection.stable_id() == connection.stable_id();
        if peer.up.take_if(mine).is_some() {
            peer.reason = Some(why.clone());
        }
    }
    let _ = shared.incoming.send(Incoming::Down(id, why.clone())).await;
    wake.notify_one();
    why
}

/// What the tasks of one connection share.
#[derive(Clone)]
struct Streams {
    shared: Arc<Shared>,
    id: PeerId,
    version: Version,
    counts: Arc<Counts>,
    window: Arc<Window>,
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

async fn write_frames(connection: Connection, mut frames: mpsc::Receiver<Frame>, counts: Arc<Counts>) {
    let Ok(mut send) = connection.open_uni().await else { return };
    let _ = send.set_priority(priority(Class::Ownership));
    if send.write_all(&[FRAMES]).await.is_err() {
        return;
    }
    while let Some(frame) = frames.recv().await {
        // Its length was looked at before it was queued.
        let Ok(bytes) = encode_frame(&frame) else { continue };
        let length = bytes.len();
        if send.write_chunk(bytes).await.is_err() {
            return;
        }
        counts.sent(Class::Ownership, length);
    }
    let _ = send.finish();
}

async fn accept_one_way(streams: Streams, connection: Connection) {
    let mut tasks = JoinSet::new();
    while let Ok(mut receive) = connection.accept_uni().await {
        let (streams, connection) = (streams.clone(), connection.clone());
        tasks.spawn(async move {
            let mut first = [0];
            if receive.read_exact(&mut first).await.is_err() {
                return;
            }
            match first[0] {
                HEARTBEATS => hear(&streams.counts, receive).await,
                FRAMES => take_frames(&streams, &connection, receive).await,
                other => {
                    tracing::warn!(node = %streams.id.node, kind = other, "a stream of an unknown kind");
                    connection.close(BROKEN, b"a one-way stream of an unknown kind");
                }
            }
        });
        while tasks.try_join_next().is_some() {}
    }
}

async fn hear(counts: &Counts, mut receive: RecvStream) {
    let mut beats = [0; 64];
    loop {
        counts.hear();
        match receive.read(&mut beats).await {
            Ok(Some(_)) => {}
            _ => return,
        }
    }
}

pub(super) async fn read_frame(receive: &mut RecvStream) -> Result<Frame, LinkError> {
    let mut head = [0; HEADER_BYTES];
    receive.read_exact(&mut head).await.map_err(closed)?;
    let header = decode_header(&head).map_err(closed)?;
    let mut payload = BytesMut::zeroed(header.length());
    receive.read_exact(&mut payload).await.map_err(closed)?;
    header.frame(payload.freeze()).map_err(closed)
}

async fn take_frames(streams: &Streams, connection: &Connection, mut receive: RecvStream) {
    loop {
        match read_frame(&mut receive).await {
            Ok(frame) => {
                streams.counts.received(Class::Ownership, HEADER_BYTES + frame.payload.len());
                let frame = Incoming::Frame(streams.id.clone(), frame);
                if streams.shared.incoming.send(frame).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                // In order or not at all: what follows cannot be trusted to be what was meant.
                if connection.close_reason().is_none() {
                    tracing::warn!(node = %streams.id.node, %error, "the stream of frames broke");
                    connection.close(BROKEN, format!("the stream of frames broke: {error}").as_bytes());
                }
                return;
            }
        }
    }
}

async fn accept_streams(streams: Streams, connection: Connection) {
    let mut tasks = JoinSet::new();
    // QUIC itself bounds how many a peer has open.
    while let Ok((send, receive)) = connection.accept_bi().await {
        let streams = streams.clone();
        tasks.spawn(async move {
            let opening = opened(&streams, send, receive);
            match tokio::time::timeout(OPENING_DEADLINE, opening).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(node = %streams.id.node, %error, "a stream broke off"),
                Err(_) => {
                    tracing::warn!(node = %streams.id.node, "a stream did not say in time what it is for");
                }
            }
        });
        while tasks.try_join_next().is_some() {}
    }
}

/// Reads what a stream is for, and hands it on.
async fn opened(streams: &Streams, send: SendStream, receive: RecvStream) -> Result<(), LinkError> {
    let counts = Arc::clone(&streams.counts);
    let mut stream = ByteStream::over_quic(send, receive, counts, Class::Rebalance, streams.version);
    let mut first = [0; 2];
    stream.read_exact(&mut first).await?;
    let class = Class::from_number(first[1]).ok_or_else(|| closed("a stream of an unknown class"))?;
    stream.rank(class, priority(class));
    let header = stream.read_frame().await?;
    let from = streams.id.clone();
    match first[0] {
        CALL => {
            let (to, answered) = oneshot::channel();
            let answer = Responder { to, version: streams.version };
            let call = Incoming::Call { from, class, request: header, answer };
            streams.shared.incoming.send(call).await.map_err(|_| closed("the node stops"))?;
            tokio::spawn(answer_call(stream, answered));
            Ok(())
        }
        STREAM => {
            stream.keep(Some(Arc::new(streams.window.share())));
            let opened = Incoming::Stream { from, class, header, stream };
            streams.shared.incoming.send(opened).await.map_err(|_| closed("the node stops"))
        }
        other => Err(closed(format!("a stream of an unknown kind {other}"))),
    }
}

/// Sends the answer once there is one; stops where the caller does not want it any more.
async fn answer_call(mut stream: ByteStream, answered: oneshot::Receiver<Frame>) {
    let answer = tokio::select! {
        answer = tokio::time::timeout(ANSWER_DEADLINE, answered) => answer,
        () = stream.delivered() => return,
    };
    // Without an answer the stream is dropped, which its caller sees as an error.
    if let Ok(Ok(answer)) = answer
        && stream.write_frame(&answer).await.is_ok()
    {
        stream.finish();
    }
}

/// Opens a call or a stream.
pub(super) async fn open(
    up: &Up,
    counts: Arc<Counts>,
    class: Class,
    kind: u8,
    header: &Frame,
    kept: Kept,
) -> Result<ByteStream, LinkError> {
    let frame = encode_frame(header).map_err(closed)?;
    let (send, receive) = up.connection.open_bi().await.map_err(closed)?;
    let _ = send.set_priority(priority(class));
    let mut first = BytesMut::with_capacity(2 + frame.len());
    first.put_slice(&[kind, class.number()]);
    first.put_slice(&frame);
    let mut stream = ByteStream::over_quic(send, receive, counts, class, up.version);
    stream.keep(kept);
    stream.write_chunk(first.freeze()).await?;
    Ok(stream)
}

/// quinn sends what has a higher priority first.
const fn priority(class: Class) -> i32 {
    100 - class.number() as i32 * 10
}
