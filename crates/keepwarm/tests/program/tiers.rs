//! From pinned memory to peers and back: three nodes, one of which owns more sessions than fit into its memory.

use std::time::{Duration, Instant};

use keepwarm_client::{
    Client, ClientError, Form, Layout, NewSession, PartBody, PartLayout, Placement, Protect, Session, State,
    WriteOptions,
};
use keepwarm_tests::chaos::cluster::Cluster;
use keepwarm_types::{Outcome, Source, Tier};
use uuid::Uuid;

/// Bytes of each session. Each node of the cluster has 64 MiB of pinned memory.
pub(super) const SESSION_BYTES: usize = 4 << 20;
/// Sessions of one owner: 72 MiB, where 64 MiB are pinned, of which clients may fill 95 %; with their second copies all nodes
/// together have 144 of 192 MiB full.
const SESSIONS: usize = 18;
pub(super) const PART: &str = "state";
pub(super) const OWNER: &str = "n1";
/// How long shards may take to find another owner: an entry of the registry each, on a busy machine.
pub(super) const MOVED_WITHIN: Duration = Duration::from_secs(60);
/// Between two looks at the map.
pub(super) const LOOK: Duration = Duration::from_millis(50);

/// Bytes that no other session has.
pub(super) fn bytes(id: Uuid) -> Vec<u8> {
    let word = id.as_u128().to_le_bytes();
    word.iter().copied().cycle().take(SESSION_BYTES).collect()
}

pub(super) fn new(id: Uuid) -> NewSession {
    let parts =
        vec![PartLayout { name: PART.to_owned(), form: Form::Bytes { block_bytes: None }, cold: None }];
    let layout = Layout { model: "m".to_owned(), fingerprint: "f".to_owned(), parts };
    let mut session = NewSession::new(layout);
    (session.id, session.protect_s) = (id, Some(Protect::Seconds(3600.0)));
    session
}

/// Ids whose shards one node owns.
pub(super) async fn owned(client: &Client) -> Vec<Uuid> {
    let deadline = Instant::now() + MOVED_WITHIN;
    let map = loop {
        let map = client.shards().await.expect("any node knows the map");
        // The first sets come a moment after the nodes are ready.
        if !map.shards.is_empty() && map.shards.iter().all(|shard| shard.replicas.len() == 3) {
            break map;
        }
        assert!(Instant::now() < deadline, "not every shard has its three replicas");
        tokio::time::sleep(LOOK).await;
    };
    let owns = map.shards.iter().any(|shard| shard.replicas[0] == OWNER);
    assert!(owns, "{OWNER} owns nothing");
    let ids = std::iter::repeat_with(Uuid::now_v7).filter(|id| map.owner(*id) == Some(OWNER));
    ids.take(SESSIONS).collect()
}

fn held_by_owner(session: &Session) -> bool {
    session.holders.iter().any(|holder| holder == OWNER)
}

//= GUARANTEES.md#G6
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protected_sessions_beyond_their_owners_memory_move_to_peers_and_come_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = env!("CARGO_BIN_EXE_keepwarm");
    let cluster = Cluster::start(program.as_ref(), folder.path(), 3).await.expect("the cluster starts");
    let client = Client::new(&cluster.nodes[0].url).expect("its address");
    let ids = owned(&client).await;
    for id in &ids {
        client.create(&new(*id)).await.expect("a session");
        let body = PartBody::from(bytes(*id));
        let written = client.put_part(*id, PART, body, &WriteOptions::default()).await;
        written.expect("there is room in the cluster, though not at its owner");
    }
    let mut away = Vec::new();
    let deadline = Instant::now() + MOVED_WITHIN;
    for id in &ids {
        // A second copy that found no room in time is made afterwards.
        let session = loop {
            let session = client.session(*id).await.expect("it is there");
            assert_eq!((session.state, session.owner.as_str()), (State::Warm, OWNER), "{session:?}");
            if session.holders.len() == 2 {
                break session;
            }
            assert!(Instant::now() < deadline, "two copies: {session:?}");
            tokio::time::sleep(LOOK).await;
        };
        if !held_by_owner(&session) {
            assert_eq!((session.tiers.pinned, session.tiers.peer), (0, SESSION_BYTES as u64));
            away.push(*id);
        }
    }
    assert!(away.len() >= 3, "the owner has room for 15: {} of {} are with peers", away.len(), ids.len());
    // Whoever is read comes back, and others make room for it, over and over; where there is none yet, the owner says so.
    for id in ids.iter().chain(&ids) {
        let deadline = Instant::now() + MOVED_WITHIN;
        let read = loop {
            match client.part(*id, PART).await {
                Ok(part) => break part.bytes().await.expect("whole"),
                Err(ClientError::Refused(problem)) if problem.status == 503 => {
                    assert!(Instant::now() < deadline, "no room comes: {problem:?}");
                }
                Err(error) => panic!("{id}: {error}"),
            }
            tokio::time::sleep(LOOK).await;
        };
        assert!(read == bytes(*id), "{id} has other bytes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_was_demoted_to_peers_runs_from_there() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = env!("CARGO_BIN_EXE_keepwarm");
    let cluster = Cluster::start(program.as_ref(), folder.path(), 3).await.expect("the cluster starts");
    let client = Client::new(&cluster.nodes[0].url).expect("its address");
    let id = owned(&client).await[0];
    client.create(&new(id)).await.expect("a session");
    let body = PartBody::from(bytes(id));
    client.put_part(id, PART, body, &WriteOptions::default()).await.expect("written");
    let activate = async || client.activate(id, &Placement::default(), None).await.expect("there is a GPU");
    let first = activate().await;
    assert_eq!(first.source, Source::Pinned);
    let leased = client.demote(id, Tier::Peer).await.expect("an answer");
    assert_eq!(leased.outcome, Outcome::Rejected, "it is leased: {leased:?}");
    client.release(id, first.lease.id).await.expect("released");
    let demoted = client.demote(id, Tier::Peer).await.expect("an answer");
    assert_eq!(demoted.outcome, Outcome::Accepted, "{demoted:?}");
    let session = client.session(id).await.expect("it is there");
    assert!(!held_by_owner(&session), "{session:?}");
    assert_eq!((session.tiers.hbm, session.tiers.pinned), (0, 0), "{session:?}");
    assert_eq!(session.tiers.peer, SESSION_BYTES as u64);
    let second = activate().await;
    assert_eq!((second.source, second.bytes_moved), (Source::Peer, SESSION_BYTES as u64));
    client.release(id, second.lease.id).await.expect("released");
    let moves = client.explain(id).await.expect("its moves").moves;
    let moves: Vec<_> = moves.iter().map(|step| (step.from.as_str(), step.to.as_str())).collect();
    assert!(moves.iter().any(|(from, to)| *from == "pinned" && to.starts_with("peer:")), "{moves:?}");
    assert!(moves.iter().any(|(from, to)| from.starts_with("peer:") && *to == "pinned"), "{moves:?}");
    let back = client.prefetch(id, Tier::Pinned).await.expect("an answer");
    assert_eq!(back.outcome, Outcome::Accepted);
    assert!(held_by_owner(&client.session(id).await.expect("it is there")));
}

/// The first node's GPU, on a driver that softcuda plays, fails at its first copy.
fn broken_gpu(folder: &std::path::Path) -> Vec<(String, Vec<(String, String)>)> {
    let built = softcuda::layout::beside_this_program().expect("softcuda is built with the tests");
    softcuda::layout::lay_out(&built, folder).expect("a copy of it");
    let pairs = [
        ("LD_LIBRARY_PATH", folder.display().to_string()),
        ("SOFTCUDA_DEVICES", "gpus=1,memory=64MiB,uuids=process".to_owned()),
        ("SOFTCUDA_FAULTS", "cuMemcpyHtoDAsync_v2 sticky 719".to_owned()),
    ];
    vec![(OWNER.to_owned(), pairs.map(|(key, value)| (key.to_owned(), value)).to_vec())]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_a_node_whose_gpu_fails_run_on_another_node() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = env!("CARGO_BIN_EXE_keepwarm");
    let cuda =
        |_: &std::path::Path, file: String| file.replacen("device = \"host\"", "device = \"cuda:0\"", 1);
    let environment = broken_gpu(folder.path());
    let cluster = Cluster::start_changed(program.as_ref(), folder.path(), 3, cuda, environment).await;
    let cluster = cluster.expect("the cluster starts");
    let client = Client::new(&cluster.nodes[0].url).expect("its address");
    let id = owned(&client).await[0];
    client.create(&new(id)).await.expect("a session");
    let body = PartBody::from(bytes(id));
    client.put_part(id, PART, body, &WriteOptions::default()).await.expect("written");
    let deadline = Instant::now() + MOVED_WITHIN;
    // The owner's GPU copies nothing: who asks is refused there until another node owns the session.
    let there = loop {
        match client.activate(id, &Placement::default(), None).await {
            Ok(there) => break there,
            Err(error) => assert!(Instant::now() < deadline, "no node runs it: {error}"),
        }
        tokio::time::sleep(LOOK).await;
    };
    assert_ne!(there.home.node, OWNER);
    client.release(id, there.lease.id).await.expect("released");
    let leads = async || {
        let map = client.shards().await.expect("any node knows the map");
        map.shards.iter().filter(|shard| shard.replicas.first().is_some_and(|node| node == OWNER)).count()
    };
    while leads().await > 0 {
        assert!(Instant::now() < deadline, "a node that can run nothing still owns shards");
        tokio::time::sleep(LOOK).await;
    }
    let read = client.part(id, PART).await.expect("warm").bytes().await.expect("whole");
    assert!(read == bytes(id), "{id} has other bytes");
    let session = client.create(&new(Uuid::now_v7())).await.expect("any node takes it");
    assert_ne!(session.owner, OWNER);
}
