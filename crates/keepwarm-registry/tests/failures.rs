//! What fails beside a whole process: a disk, a link, a spec.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod net;

use std::time::{Duration, Instant};

use keepwarm_catalog::RaftLog;
use keepwarm_core::registry::{Entry, NodeStatus, Registry, Response};
use keepwarm_registry::{
    Bootstrap, ProposeError, RegistryHandle, RegistryNode, SettingsError, Standing, StartError,
};
use keepwarm_wire::Versions;
use net::{Cluster, LONG, disk, name, on_disk, registration, seen};
use uuid::Uuid;

/// An entry of some size, so that a small disk is soon full.
fn large(n: u64) -> Entry {
    let mut registration = registration(1, disk(1));
    registration.node = format!("filler{}", n % 4).parse().unwrap();
    registration.http = "x".repeat(64 << 10);
    registration.stores = false;
    Entry::Register { registration, at: keepwarm_types::Timestamp(n) }
}

async fn failed(handle: &RegistryHandle) -> String {
    let mut standing = handle.standing();
    let is = |standing: &Standing| matches!(standing, Standing::Failed { .. });
    let found = tokio::time::timeout(LONG, standing.wait_for(is)).await.expect("not failed in time").unwrap();
    match &*found {
        Standing::Failed { why } => why.clone(),
        other => panic!("{other:?}"),
    }
}

/// Three nodes, the second with a small disk.
async fn with_a_small_disk() -> Cluster {
    let cluster = Cluster::new(3, 3);
    cluster.start(1, disk(1), true, RaftLog::ephemeral().unwrap()).await;
    cluster.start(2, disk(2), false, RaftLog::limited(4 << 20).unwrap()).await;
    cluster.start(3, disk(3), false, RaftLog::ephemeral().unwrap()).await;
    cluster
}

async fn fill(cluster: &Cluster, through: u16, small: &RegistryHandle) {
    let until = Instant::now() + LONG;
    for n in 0.. {
        assert!(Instant::now() < until, "the disk is never full");
        if matches!(*small.standing().borrow(), Standing::Failed { .. }) {
            return;
        }
        // Some fail while another leader is elected.
        let _ = cluster.handle(through).propose(large(n), Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_disk_is_full_steps_out_and_the_others_go_on() {
    let cluster = with_a_small_disk().await;
    let small = cluster.handle(2);
    fill(&cluster, 1, &small).await;
    let why = failed(&small).await;
    assert!(why.contains("free space"), "{why}");
    assert!(cluster.handle(1).propose(large(1), LONG).await.is_ok());
    let answer = small.propose(large(2), LONG).await;
    assert!(matches!(answer, Err(ProposeError::Unavailable(_))), "at once: {answer:?}");
    let read = small.confirm(LONG).await;
    assert!(matches!(read, Err(ProposeError::Unavailable(_))), "{read:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_is_full_is_followed_by_another() {
    let cluster = with_a_small_disk().await;
    let small = cluster.handle(2);
    // Make it lead: the others cannot while they are cut off.
    let until = Instant::now() + LONG;
    while cluster.leader().await != 2 {
        assert!(Instant::now() < until, "it never leads");
        let leader = cluster.leader().await;
        cluster.net.isolate(&name(leader), &cluster.nodes);
        while cluster.handle(4 - leader).leader() == Some(name(leader)) && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cluster.leader().await;
        cluster.net.heal();
    }
    fill(&cluster, 1, &small).await;
    assert!(failed(&small).await.contains("free space"));
    let until = Instant::now() + LONG;
    while cluster.handle(1).propose(large(1), Duration::from_millis(500)).await.is_err() {
        assert!(Instant::now() < until, "nobody follows");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_is_declared_failed_by_two_and_registers_anew() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    cluster.register_all().await;
    let reporting = cluster.report_health();
    let victim = cluster.leader().await % 3 + 1;
    let cut = Instant::now();
    cluster.net.isolate(&name(victim), &cluster.nodes);
    let status = move |registry: &Registry| registry.node(&name(victim)).map(|node| node.status);
    let down = |registry: &Registry| status(registry) == Some(NodeStatus::Down);
    let leader = cluster.leader().await;
    let registry = seen(&cluster.handle(leader), down).await;
    println!("a follower that is cut off is down after {:?}", cut.elapsed());
    let old = registry.node(&name(victim)).unwrap().incarnation;
    assert_ne!(status(&cluster.handle(victim).watch().borrow()), Some(NodeStatus::Down), "it cannot know");
    cluster.net.heal();
    seen(&cluster.handle(victim), down).await;
    assert!(cluster.register(victim).await > old);
    seen(&cluster.handle(leader), |registry| status(registry) == Some(NodeStatus::Up)).await;
    reporting.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_no_spec_is_taken() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    let spec = |version| Entry::Spec { version, hash: [1; 32] };
    assert_eq!(cluster.handle(1).propose(spec(1), LONG).await, Ok(Response::Done));
    let leader = cluster.leader().await;
    for n in (1..=3).filter(|n| *n != leader) {
        cluster.kill(n).await;
    }
    let answer = cluster.handle(leader).propose(spec(2), Duration::from_millis(500)).await;
    assert_eq!(answer, Err(ProposeError::Unknown));
    assert_eq!(cluster.handle(leader).watch().borrow().spec().0, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_another_cluster_and_a_foreign_bootstrap_file_are_refused() {
    let cluster = Cluster::new(3, 3);
    let folder = tempfile::tempdir().unwrap();
    let (log, disk) = on_disk(folder.path());
    let mut settings = cluster.settings(1, disk, false);
    let handle = RegistryNode::start(settings.clone(), log.clone(), cluster.net.link(name(1))).await.unwrap();
    handle.shutdown().await;
    let (log, disk) = on_disk(folder.path());
    settings.cluster_id = 7;
    let other = RegistryNode::start(settings.clone(), log.clone(), cluster.net.link(name(1))).await;
    assert!(matches!(other, Err(StartError::OtherCluster { expected: 7, .. })));
    let mut settings = cluster.settings(1, disk, false);
    settings.bootstrap = Bootstrap::Allowed { cluster_id: 8 };
    let other = RegistryNode::start(settings, log, cluster.net.link(name(1))).await;
    assert!(matches!(other, Err(StartError::Settings(SettingsError::Bootstrap { found: 8, .. }))));
}

#[tokio::test]
async fn specs_that_cannot_have_a_majority_are_refused() {
    async fn refused(cluster: &Cluster, n: u16) -> SettingsError {
        let settings = cluster.settings(n, Uuid::nil(), false);
        let log = RaftLog::ephemeral().unwrap();
        match RegistryNode::start(settings, log, cluster.net.link(name(n))).await {
            Err(StartError::Settings(error)) => error,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("started"),
        }
    }
    for voters in [0, 2, 4] {
        assert_eq!(refused(&Cluster::new(voters, 4), 1).await, SettingsError::Voters(voters.into()));
    }
    assert_eq!(refused(&Cluster::new(1, 4), 1).await, SettingsError::OneVoter(name(1), 4));
    assert_eq!(refused(&Cluster::new(3, 2), 1).await, SettingsError::Unknown(name(3)));
    assert_eq!(refused(&Cluster::new(3, 3), 9).await, SettingsError::Stranger(name(9)));
    let mut twice = Cluster::new(3, 3);
    twice.voters[2] = name(1);
    assert_eq!(refused(&twice, 1).await, SettingsError::Twice(name(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_other_clusters_are_not_answered() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    let handle = cluster.handle(1);
    let version = Versions::ALL.common(Versions::ALL).unwrap();
    for request in [&b""[..], b"nonsense", &[0xff; 4096]] {
        let answer = handle.handle(&name(2), version, request.to_vec().into()).await;
        assert!(!answer.is_empty(), "a refusal is an answer");
    }
    let stranger = handle.handle(&name(99), version, bytes::Bytes::new()).await;
    assert!(String::from_utf8_lossy(&stranger).contains("no node of this cluster"), "{stranger:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_alone_does_not_hear_another_leads_nothing_with_it_until_it_does() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    cluster.register_all().await;
    let reporting = cluster.report_health();
    let leader = cluster.leader().await;
    let (accuser, accused) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    let leads = move |registry: &Registry| {
        registry
            .shards()
            .filter(|shard| registry.set(*shard).is_some_and(|set| set.replicas[0].node == name(accuser)))
            .count()
    };
    seen(&cluster.handle(leader), |registry| leads(registry) > 10).await;
    cluster.net.cut(&name(accused), &name(accuser));
    let registry = seen(&cluster.handle(leader), |registry| leads(registry) == 0).await;
    let up = |n: u16| registry.node(&name(n)).unwrap().status == NodeStatus::Up;
    assert!(up(accuser) && up(accused), "nobody has failed");
    cluster.net.heal();
    seen(&cluster.handle(leader), |registry| leads(registry) > 10).await;
    reporting.abort();
}
