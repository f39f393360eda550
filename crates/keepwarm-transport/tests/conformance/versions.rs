//! Peers of different versions: what two of them speak, and a cluster that goes from one version to the next.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use keepwarm_core::registry::{Member, ReplicaSet};
use keepwarm_core::replica::{Envelope, Message};
use keepwarm_core::session::BlockRef;
use keepwarm_transport::{ByteStream, Class, Frame, Incoming, LinkError, PeerId, Transport};
use keepwarm_types::{
    Birth, BlockChecksum, Generation, Incarnation, InstanceId, SessionId, SessionKey, ShardId,
};
use keepwarm_wire::blocks::{BlocksAnswer, BlocksHeader, Direction};
use keepwarm_wire::{EncodeError, LayoutCache, Version, Versions, envelope};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Form, Node, PATIENCE, frame, id, name, soon, until};

/// Blocks of a stream, and bytes of each.
const BLOCKS: u64 = 3;
const BLOCK_BYTES: u32 = 32 << 10;
/// What passes between each two nodes in each step of a roll-out.
const ENOUGH: u64 = 10;

const fn range(oldest: u16, newest: u16) -> Versions {
    Versions { oldest, newest }
}

/// A header of blocks, the same each time.
fn header(direction: Direction) -> BlocksHeader {
    let session: SessionId = "11112222-3333-4444-8555-000000000001".parse().unwrap();
    let block =
        |n| BlockRef { instance: InstanceId(n), checksum: BlockChecksum([n, n]), length: BLOCK_BYTES };
    BlocksHeader {
        shard: ShardId(1),
        generation: Generation(1),
        key: SessionKey::new("acme".parse().unwrap(), session),
        birth: Birth::from_random(1),
        blocks: (0..BLOCKS).map(block).collect(),
        direction,
    }
}

/// The version that a frame says it has.
fn said(frame: &Frame) -> u16 {
    u16::from_le_bytes([frame.payload[0], frame.payload[1]])
}

/// Two processes that know each other.
fn pair(form: &mut impl Form, start: u64, ranges: [Versions; 2]) -> [Node; 2] {
    let joined = [("a", ranges[0]), ("b", ranges[1])].map(|(n, range)| form.join_speaking(n, start, range));
    let all: Vec<_> = joined.iter().map(|(node, address)| (node.name(), address.clone())).collect();
    joined.map(|(node, _)| {
        node.links.set_peers(all.clone());
        node
    })
}

pub(crate) async fn two_peers_speak_the_lower_of_their_newest(mut form: impl Form) {
    let cases = [(range(1, 1), range(1, 2), 1), (range(1, 2), range(1, 2), 2), (range(1, 2), range(2, 3), 2)];
    let turned = cases.map(|(mine, theirs, spoken)| (theirs, mine, spoken));
    for (start, (mine, theirs, spoken)) in (1..).zip(cases.into_iter().chain(turned)) {
        let [mut a, mut b] = pair(&mut form, start, [mine, theirs]);
        for (node, peer) in [(&mut a, "b"), (&mut b, "a")] {
            let version = node.up_speaking(peer).await.1;
            assert_eq!(version.number(), spoken, "{mine} and {theirs}");
            assert_eq!(node.links.version(&name(peer)), Some(version));
            assert_eq!(node.links.peers()[0].version, Some(version));
        }
        let version = a.links.version(&name("b")).unwrap();

        let asking = {
            let links = Arc::clone(&a.links);
            tokio::spawn(
                async move { links.call(&name("b"), Class::Ownership, frame(1, "ping"), PATIENCE).await },
            )
        };
        let answer = b.call().await.2;
        assert_eq!(answer.version(), version);
        answer.send(frame(2, "pong"));
        assert_eq!(soon("an answer", asking).await.unwrap(), Ok(frame(2, "pong")));

        // What the link's version cannot say is not sent, and what it can is read.
        let spare = header(Direction::Spare);
        let sayable = match spare.encode(version) {
            Ok(_) => spare,
            Err(error) => {
                assert!(matches!(error, EncodeError::Unsayable { since: 2, .. }) && spoken == 1, "{error}");
                header(Direction::Push)
            }
        };
        let opened = a.links.open(&name("b"), Class::Checkpoint, sayable.encode(version).unwrap());
        let opened = opened.await.unwrap();
        let (_, came, stream) = b.stream().await;
        assert_eq!((opened.version(), stream.version()), (version, version));
        assert_eq!((said(&came), BlocksHeader::decode(&came)), (spoken, Ok(sayable)));
        form.crash(a);
        form.crash(b);
    }
}

pub(crate) async fn peers_that_are_too_far_apart_are_told_both_ranges(mut form: impl Form) {
    let ranges = [range(1, 1), range(2, 3)];
    for (start, ranges) in [(1, ranges), (2, [ranges[1], ranges[0]])] {
        let nodes = pair(&mut form, start, ranges);
        for (node, other) in nodes.iter().zip(["b", "a"]) {
            let why = || node.links.peers()[0].reason.clone().unwrap_or_default();
            until("both ranges are named", || why().contains("1 to 1") && why().contains("2 to 3")).await;
            let status = &node.links.peers()[0];
            assert!(status.up.is_none() && status.version.is_none(), "{status:?}");
            assert_eq!(node.links.version(&name(other)), None);
            assert_eq!(
                node.links.send(&name(other), frame(1, "")),
                Err(LinkError::NotConnected(name(other)))
            );
        }
        for node in nodes {
            form.crash(node);
        }
    }
}

/// Between which two nodes.
type Way = (String, String);

/// What has passed, and what should not have happened.
#[derive(Default)]
struct Seen {
    /// Frames and streams that arrived whole, by way and version.
    passed: BTreeMap<(Way, u16), (u64, u64)>,
    /// The node that may be down now: its links may break, and no others.
    restarting: Option<&'static str>,
    wrong: Vec<String>,
}

#[derive(Clone, Default)]
struct Traffic(Arc<Mutex<Seen>>);

impl Traffic {
    fn seen<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }

    fn wrong(&self, what: String) {
        self.seen(|seen| seen.wrong.push(what));
    }

    /// A link broke; none may but those of a node that restarts.
    fn broke(&self, way: &Way, why: &dyn std::fmt::Display) {
        self.seen(|seen| {
            if seen.restarting.is_none_or(|down| way.0 != down && way.1 != down) {
                seen.wrong.push(format!("{way:?} broke: {why}"));
            }
        });
    }

    /// Takes all that comes to one process.
    async fn take(self, me: String, mut incoming: mpsc::Receiver<Incoming>) {
        let (layouts, mut last) = (LayoutCache::new(), BTreeMap::new());
        let mut streams = JoinSet::new();
        while let Some(event) = incoming.recv().await {
            match event {
                Incoming::Up(peer, _) => drop(last.remove(peer.node.as_str())),
                Incoming::Down(peer, why) => self.broke(&(peer.node.to_string(), me.clone()), &why),
                Incoming::Frame(peer, frame) => {
                    let came = envelope::decode(&frame, &layouts).map(|envelope| envelope.sent);
                    let before = last.get(peer.node.as_str()).copied();
                    match came {
                        Ok(sent) if before.is_none_or(|before: u64| sent == before + 1) => {
                            last.insert(peer.node.to_string(), sent);
                            let way = (peer.node.to_string(), me.clone());
                            self.seen(|seen| seen.passed.entry((way, said(&frame))).or_default().0 += 1);
                        }
                        other => self.wrong(format!("{} to {me}: {other:?} after {before:?}", peer.node)),
                    }
                }
                Incoming::Stream { from, header, stream, .. } => {
                    streams.spawn(self.clone().receive((from.node.to_string(), me.clone()), header, stream));
                }
                Incoming::Call { .. } => self.wrong("nobody calls here".to_owned()),
            }
            while streams.try_join_next().is_some() {}
        }
    }

    async fn receive(self, way: Way, came: Frame, mut stream: ByteStream) {
        let header = match BlocksHeader::decode(&came) {
            Ok(header) if said(&came) <= stream.version().number() => header,
            other => return self.wrong(format!("{way:?}: {other:?} on {}", stream.version())),
        };
        match take_blocks(&header, &mut stream).await {
            Ok(true) => {
                self.seen(|seen| seen.passed.entry((way, said(&came))).or_default().1 += 1);
            }
            Ok(false) => self.wrong(format!("{way:?}: a block has other bytes")),
            Err(error) => self.broke(&way, &error),
        }
    }

    /// Sends frames and blocks to one peer for as long as it runs, in whatever version the link has.
    async fn send(self, links: Arc<dyn Transport>, to: &'static str) {
        let way = (links.local().node.to_string(), to.to_owned());
        let mut sent = 0;
        loop {
            until("a link", || links.version(&name(to)).is_some()).await;
            let Some(version) = links.version(&name(to)) else { continue };
            let message = envelope::encode(&message(links.local(), to, sent), version).unwrap();
            match links.send(&name(to), message) {
                Ok(()) => sent += 1,
                Err(error) => self.broke(&way, &error),
            }
            match send_blocks(&*links, to, version).await {
                Ok(BlocksAnswer::Taken) => {}
                Ok(other) => self.wrong(format!("{way:?}: {other:?}")),
                Err(error) => self.broke(&way, &error),
            }
        }
    }

    /// Waits until enough has passed from now on on all these ways, each in its version.
    async fn flows(&self, ways: &[(Way, u16)]) {
        let passed = |way| self.seen(|seen| seen.passed.get(way).copied().unwrap_or_default());
        let before: Vec<_> = ways.iter().map(passed).collect();
        let enough = |(way, before): (_, &(u64, u64))| {
            let (frames, streams) = passed(way);
            frames >= before.0 + ENOUGH && streams >= before.1 + ENOUGH
        };
        let all = || {
            self.seen(|seen| assert!(seen.wrong.is_empty(), "{:?}", seen.wrong));
            ways.iter().zip(&before).all(enough)
        };
        until(&format!("traffic on {ways:?}"), all).await;
    }
}

fn message(from: &PeerId, to: &str, sent: u64) -> Envelope {
    let set = ReplicaSet { generation: Generation(1), replicas: Vec::new(), learner: None, lost_at: None };
    Envelope {
        shard: ShardId(1),
        from: Member { node: from.node.clone(), incarnation: from.incarnation },
        to: Member { node: name(to), incarnation: Incarnation(1) },
        set: Arc::new(set),
        sent,
        message: Message::Confirm { round: sent },
    }
}

/// A block's bytes.
fn bytes(block: InstanceId) -> Bytes {
    vec![0x40 + u8::try_from(block.0).unwrap(); BLOCK_BYTES as usize].into()
}

async fn send_blocks(links: &dyn Transport, to: &str, version: Version) -> Result<BlocksAnswer, LinkError> {
    // Version 2's own word where it is known.
    let spare = header(Direction::Spare).encode(version);
    let first = spare.or_else(|_| header(Direction::Push).encode(version)).unwrap();
    let mut stream = links.open(&name(to), Class::Checkpoint, first).await?;
    for block in header(Direction::Push).blocks {
        stream.write_chunk(bytes(block.instance)).await?;
    }
    stream.finish();
    let answer = stream.read_frame().await?;
    if said(&answer) != stream.version().number() {
        return Err(LinkError::Closed(format!("an answer in version {}", said(&answer))));
    }
    BlocksAnswer::decode(&answer).map_err(|error| LinkError::Closed(error.to_string()))
}

/// Whether all blocks came whole.
async fn take_blocks(header: &BlocksHeader, stream: &mut ByteStream) -> Result<bool, LinkError> {
    for block in &header.blocks {
        let (wanted, mut at) = (bytes(block.instance), 0);
        while at < wanted.len() {
            let chunk = stream.read_chunk(wanted.len() - at).await?;
            let chunk = chunk.ok_or_else(|| LinkError::Closed("the blocks ended early".to_owned()))?;
            if chunk != wanted[at..at + chunk.len()] {
                return Ok(false);
            }
            at += chunk.len();
        }
    }
    stream.write_frame(&BlocksAnswer::Taken.encode(stream.version()).unwrap()).await?;
    stream.finish();
    Ok(true)
}

/// A process, its address, and what it does beside.
struct Running {
    node: Node,
    address: String,
    newest: u16,
    _tasks: JoinSet<()>,
}

const NODES: [&str; 3] = ["a", "b", "c"];

fn start(
    form: &mut impl Form,
    traffic: &Traffic,
    which: &'static str,
    start: u64,
    spoken: Versions,
) -> Running {
    let (mut node, address) = form.join_speaking(which, start, spoken);
    let incoming = std::mem::replace(&mut node.incoming, mpsc::channel(1).1);
    let mut tasks = JoinSet::new();
    tasks.spawn(traffic.clone().take(which.to_owned(), incoming));
    for to in NODES.into_iter().filter(|to| *to != which) {
        tasks.spawn(traffic.clone().send(Arc::clone(&node.links), to));
    }
    Running { node, address, newest: spoken.newest, _tasks: tasks }
}

fn introduce(running: &BTreeMap<&'static str, Running>) {
    let all: Vec<_> = running.iter().map(|(node, it)| (name(node), it.address.clone())).collect();
    for it in running.values() {
        it.node.links.set_peers(all.clone());
    }
}

/// All ways between running nodes, each with the version that it should have.
fn ways(running: &BTreeMap<&'static str, Running>) -> Vec<(Way, u16)> {
    let from = |(from, a): (&&'static str, &Running)| {
        let (from, newest) = (*from, a.newest);
        let others = running.iter().filter(move |(to, _)| **to != from);
        others
            .map(move |(to, b)| ((from.to_owned(), (*to).to_owned()), newest.min(b.newest)))
            .collect::<Vec<_>>()
    };
    running.iter().flat_map(from).collect()
}

pub(crate) async fn a_rolling_restart_takes_up_a_new_version_while_all_else_flows(mut form: impl Form) {
    let traffic = Traffic::default();
    let mut running: BTreeMap<_, _> =
        NODES.map(|node| (node, start(&mut form, &traffic, node, 1, range(1, 1)))).into();
    introduce(&running);
    traffic.flows(&ways(&running)).await;

    // The middle name first: it dials one of the others and is dialled by the other.
    for restarts in ["b", "a", "c"] {
        traffic.seen(|seen| seen.restarting = Some(restarts));
        form.crash(running.remove(restarts).unwrap().node);
        traffic.flows(&ways(&running)).await;
        running.insert(restarts, start(&mut form, &traffic, restarts, 2, range(1, 2)));
        introduce(&running);
        traffic.flows(&ways(&running)).await;
        traffic.seen(|seen| seen.restarting = None);
    }

    assert!(ways(&running).iter().all(|(_, version)| *version == 2));
    for (node, it) in &running {
        for other in NODES.iter().filter(|other| *other != node) {
            assert_eq!(it.node.links.version(&name(other)).map(Version::number), Some(2));
        }
        assert_eq!(it.node.links.local(), &id(node, 2));
    }
    traffic.seen(|seen| {
        let spoke = |number| seen.passed.keys().filter(|(_, version)| *version == number).count();
        assert_eq!((spoke(1), spoke(2)), (6, 6), "both versions were spoken between all: {:?}", seen.passed);
        assert!(seen.wrong.is_empty(), "{:?}", seen.wrong);
    });
}
