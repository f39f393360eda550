//! Who may be a peer: certificate, hello and answer, on the side that dials and on the side that is dialled.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use keepwarm_types::NodeName;
use keepwarm_wire::{Frame, Hello, HelloAnswer, Version, encode_frame};
use quinn::{Connection, ConnectionError, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Semaphore, mpsc};

use super::connection::{self, read_frame};
use super::endpoint::{self, BULK_STREAMS_MAX, RELAY_STREAMS_MAX, Window};
use super::{DIAL_DEADLINE, QUEUE_MAX, Shared, Up};
use crate::link::PeerId;

/// Connections that are saying hello at once.
const HELLOS_MAX: usize = 256;
/// A process that was heard of within this is there: twenty heartbeats.
const FRESH: Duration = Duration::from_secs(1);
/// Codes of a connection's end: refused; replaced by a later one.
const REFUSED: VarInt = VarInt::from_u32(2);
const REPLACED: VarInt = VarInt::from_u32(3);
/// QUIC's codes for TLS alerts begin here; then the alert's own number.
const ALERTS: u64 = 0x100;
/// TLS: a signature that its key did not make (an authority of the same name and another key), unknown authority, expired certificate, no certificate, no protocol in common.
const BAD_SIGNATURE: u64 = ALERTS + 51;
const UNKNOWN_AUTHORITY: u64 = ALERTS + 48;
const EXPIRED: u64 = ALERTS + 45;
const NO_CERTIFICATE: u64 = ALERTS + 116;
const NO_PROTOCOL: u64 = ALERTS + 120;

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
            let welcomed = tokio::time::timeout(DIAL_DEADLINE, welcome(&shared, incoming)).await;
            drop(permit);
            match welcomed {
                Ok(Ok(Some(up))) => {
                    let _ = connection::run(&shared, up).await;
                }
                Ok(Ok(None)) => {}
                Ok(Err(why)) => tracing::warn!(%from, %why, "a connection was refused"),
                Err(_) => tracing::warn!(%from, "a connection did not say hello in time"),
            }
        });
    }
}

/// Why a connection ended, and what to do where it is known.
pub(super) fn explained(error: &ConnectionError) -> String {
    let code = match error {
        ConnectionError::TransportError(error) => u64::from(error.code),
        ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
        _ => 0,
    };
    let whose =
        if matches!(error, ConnectionError::ConnectionClosed(_)) { "this node's" } else { "the peer's" };
    match code {
        UNKNOWN_AUTHORITY | BAD_SIGNATURE => {
            format!(
                "{whose} certificate is of an authority that is not trusted: compare the ca.pem of both ({error})"
            )
        }
        EXPIRED => format!("{whose} certificate has expired: renew it with `keepwarm cert node` ({error})"),
        NO_CERTIFICATE => format!("{whose} side shows no certificate: set [tls] on both ({error})"),
        NO_PROTOCOL => format!("the other side does not speak keepwarm's protocol ({error})"),
        _ => error.to_string(),
    }
}

/// What went wrong on a connection: the reason of its end where it has ended, else the error.
fn because(connection: &Connection, error: impl Display) -> String {
    connection.close_reason().map_or_else(|| error.to_string(), |reason| explained(&reason))
}

fn hello(shared: &Shared) -> Hello {
    let settings = &shared.settings;
    let PeerId { node, incarnation } = settings.local.clone();
    let (cluster, cluster_id, versions) = (settings.cluster.clone(), settings.cluster_id, settings.versions);
    Hello { cluster, cluster_id, node, incarnation, versions }
}

/// The node that a connection's certificate names; none where peers are who they say.
fn named(shared: &Shared, connection: &Connection) -> Result<Option<NodeName>, String> {
    if shared.tls.loopback_only() {
        return Ok(None);
    }
    let identity = connection.peer_identity().ok_or("it has shown no certificate")?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| "its certificate is none")?;
    shared.tls.named(chain.first().ok_or("it has shown no certificate")?).map(Some)
}

/// Compares what a peer says with what its certificate says and with what is known: who it is, and what is spoken with it.
fn check(shared: &Shared, connection: &Connection, said: &Hello) -> Result<(PeerId, Version), String> {
    let settings = &shared.settings;
    let version = settings.versions.common(said.versions).map_err(|error| error.to_string())?;
    if said.cluster_id != settings.cluster_id || said.cluster != settings.cluster {
        return Err(format!(
            "it is of cluster '{}' ({:032x}), not of '{}' ({:032x}): compare the bootstrap files",
            said.cluster, said.cluster_id, settings.cluster, settings.cluster_id
        ));
    }
    if let Some(named) = named(shared, connection)?
        && named != said.node
    {
        return Err(format!("it says it is node '{}', and its certificate '{named}'", said.node));
    }
    let id = PeerId { node: said.node.clone(), incarnation: said.incarnation };
    let peers = shared.peers();
    let Some(peer) = peers.get(&id.node) else {
        return Err(format!("node '{}' is not in the spec", id.node));
    };
    if peer.latest > id.incarnation {
        return Err(format!(
            "a later start of node '{}' has been connected ({} after {}): stop the earlier process",
            id.node, peer.latest.0, id.incarnation.0
        ));
    }
    if let Some(up) = &peer.up
        && up.id == id
        && up.connection.remote_address() != connection.remote_address()
        && peer.counts.heard().is_some_and(|heard| heard.elapsed() < FRESH)
    {
        return Err(format!(
            "node '{}' is connected from {}: two processes have its name and incarnation, stop one",
            id.node,
            up.connection.remote_address()
        ));
    }
    Ok((id, version))
}

async fn send_frame(
    connection: &Connection,
    send: &mut quinn::SendStream,
    frame: &Frame,
) -> Result<(), String> {
    let bytes = encode_frame(frame).map_err(|error| error.to_string())?;
    send.write_chunk(bytes).await.map_err(|error| because(connection, error))?;
    let _ = send.finish();
    Ok(())
}

/// Answers one who dialled: a peer that is up, or none where it only showed itself.
async fn welcome(shared: &Shared, incoming: quinn::Incoming) -> Result<Option<Up>, String> {
    let connection = incoming.await.map_err(|error| explained(&error))?;
    let result = answer(shared, &connection).await;
    if let Err(why) = &result {
        connection.close(REFUSED, b"refused");
        if let Ok(Some(node)) = named(shared, &connection) {
            shared.not_up(&node, format!("it dialled and was refused: {why}"));
        }
    }
    result
}

async fn answer(shared: &Shared, connection: &Connection) -> Result<Option<Up>, String> {
    let (mut send, mut receive) = connection.accept_bi().await.map_err(|error| explained(&error))?;
    let frame = read_frame(&mut receive).await.map_err(|error| because(connection, error))?;
    let said = Hello::read(&frame, shared.settings.versions).map_err(|error| error.to_string());
    let checked = said.and_then(|said| check(shared, connection, &said));
    let answer = match &checked {
        Ok((id, _)) if id.node < shared.settings.local.node => HelloAnswer::Accepted(hello(shared)),
        Ok(_) => HelloAnswer::WillDial,
        Err(why) => HelloAnswer::Refused(why.clone()),
    };
    let accepted = matches!(answer, HelloAnswer::Accepted(_));
    // Up before it is told: what it sends at once is a peer's. Where telling fails, the connection ends.
    let welcome = checked.as_ref().ok().filter(|_| accepted);
    let up = welcome.map(|(id, version)| established(shared, connection, id.clone(), *version));
    let told = send_frame(connection, &mut send, &answer.frame()).await;
    if let Some(up) = up {
        // Its end is told by whoever serves it.
        return Ok(Some(up));
    }
    told?;
    let _ = tokio::time::timeout(DIAL_DEADLINE, send.stopped()).await;
    let (id, _) = checked?;
    connection.close(REFUSED, b"the other side dials");
    shown(shared, &id);
    Ok(None)
}

/// A peer that this node dials has shown itself: an earlier start of it is gone, and it is dialled now.
fn shown(shared: &Shared, id: &PeerId) {
    if let Some(peer) = shared.peers().get_mut(&id.node) {
        if let Some(up) = &peer.up
            && up.id.incarnation < id.incarnation
        {
            up.connection.close(REPLACED, b"replaced by a later start");
        }
        peer.latest = peer.latest.max(id.incarnation);
        peer.wake.notify_one();
    }
}

/// Dials a peer and says hello: the peer, up, or none where the peer dials itself now.
pub(super) async fn dial(shared: &Shared, node: &NodeName, address: &str) -> Result<Option<Up>, String> {
    let found = tokio::net::lookup_host(address).await.map_err(|error| format!("{address}: {error}"))?;
    let here = shared.settings.listen;
    let fits = |to: &SocketAddr| to.is_ipv4() == here.is_ipv4();
    let to = found
        .into_iter()
        .find(fits)
        .ok_or_else(|| format!("{address} has no address of this node's kind ({here})"))?;
    if shared.tls.loopback_only() && !to.ip().is_loopback() {
        return Err(format!("{to} is beyond loopback: name certificates in [tls]"));
    }
    let config = endpoint::client(shared.path, &shared.tls).map_err(|error| error.to_string())?;
    let connecting =
        shared.endpoint.connect_with(config, to, "keepwarm").map_err(|error| error.to_string())?;
    let connection = connecting.await.map_err(|error| explained(&error))?;
    let greeted = greet(shared, &connection, node, address).await;
    if !matches!(greeted, Ok(Some(_))) {
        connection.close(REFUSED, b"no peer");
    }
    greeted
}

async fn greet(
    shared: &Shared,
    connection: &Connection,
    node: &NodeName,
    address: &str,
) -> Result<Option<Up>, String> {
    if let Some(named) = named(shared, connection)?
        && named != *node
    {
        return Err(format!("at {address} is node '{named}', by its certificate: correct the spec"));
    }
    let (mut send, mut receive) = connection.open_bi().await.map_err(|error| explained(&error))?;
    send_frame(connection, &mut send, &hello(shared).frame()).await?;
    let answer = read_frame(&mut receive).await.map_err(|error| because(connection, error))?;
    let said =
        match HelloAnswer::read(&answer, shared.settings.versions).map_err(|error| error.to_string())? {
            HelloAnswer::Accepted(said) => said,
            HelloAnswer::WillDial => return Ok(None),
            HelloAnswer::Refused(why) => return Err(format!("it refuses this node: {why}")),
        };
    let (id, version) = check(shared, connection, &said)?;
    if id.node != *node {
        return Err(format!("node '{}' answers at {address}: correct the spec", id.node));
    }
    Ok(Some(established(shared, connection, id, version)))
}

/// The peer is up on this connection; an earlier one of it ends.
fn established(shared: &Shared, connection: &Connection, id: PeerId, version: Version) -> Up {
    let (queue, frames) = mpsc::channel(QUEUE_MAX);
    let up = Up {
        id: id.clone(),
        version,
        connection: connection.clone(),
        queue,
        window: Window::new(connection.clone()),
        bulk: Arc::new(Semaphore::new(BULK_STREAMS_MAX)),
        relays: Arc::new(Semaphore::new(RELAY_STREAMS_MAX)),
    };
    let mut counts = Arc::default();
    if let Some(peer) = shared.peers().get_mut(&id.node) {
        if let Some(before) = peer.up.replace(up.clone()) {
            before.connection.close(REPLACED, b"replaced by a later connection");
        }
        peer.latest = peer.latest.max(id.incarnation);
        peer.counts.hear();
        peer.reason = None;
        counts = Arc::clone(&peer.counts);
    }
    connection::begin(connection, frames, counts);
    up
}
