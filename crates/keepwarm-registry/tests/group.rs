//! Groups of three and five in one process: electing, proposing, failing, coming back.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod net;

use std::time::{Duration, Instant};

use keepwarm_catalog::RaftLog;
use keepwarm_core::registry::{Entry, NodeStatus, Registry, Response};
use keepwarm_registry::{ProposeError, Standing};
use keepwarm_wire::Versions;
use net::{Cluster, LONG, disk, name, on_disk, registration, seen};
use uuid::Uuid;

fn spec(version: u64) -> Entry {
    Entry::Spec { version, hash: [version as u8; 32] }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_elect_propose_and_all_see_it() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    for n in 1..=3 {
        let answer = cluster.handle(n).propose(spec(n.into()), LONG).await;
        assert_eq!(answer, Ok(Response::Done), "from node {n}, whoever leads");
    }
    for n in 1..=3 {
        let handle = cluster.handle(n);
        handle.confirm(LONG).await.unwrap();
        assert_eq!(handle.watch().borrow().spec().0, 3, "confirmed at once on node {n}");
    }
    cluster.register_all().await;
    for n in 1..=3 {
        let full = |registry: &Registry| {
            registry.shards().all(|shard| registry.set(shard).is_some_and(|set| set.replicas.len() == 3))
        };
        seen(&cluster.handle(n), full).await.validate();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_is_followed_by_another_and_nothing_acknowledged_is_lost() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    cluster.handle(1).propose(spec(7), LONG).await.unwrap();
    let old = cluster.leader().await;
    cluster.kill(old).await;
    let new = cluster.leader().await;
    assert_ne!(old, new);
    let handle = cluster.handle(new);
    handle.confirm(LONG).await.unwrap();
    assert_eq!(handle.watch().borrow().spec().0, 7);
    assert_eq!(handle.propose(spec(8), LONG).await, Ok(Response::Done));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_never_claims_success() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    cluster.handle(1).propose(spec(1), LONG).await.unwrap();
    let old = cluster.leader().await;
    let handle = cluster.handle(old);
    cluster.net.isolate(&name(old), &cluster.nodes);
    let answer = handle.propose(spec(66), Duration::from_millis(700)).await;
    assert!(matches!(answer, Err(ProposeError::Unknown | ProposeError::Unavailable(_))), "{answer:?}");
    let read = handle.confirm(Duration::from_millis(300)).await;
    assert!(matches!(read, Err(ProposeError::Unavailable(_))), "{read:?}");
    let new = cluster.leader().await;
    assert_ne!(new, old);
    cluster.handle(new).propose(spec(2), LONG).await.unwrap();
    cluster.net.heal();
    let registry = seen(&handle, |registry| registry.spec().0 >= 2).await;
    assert_eq!(registry.spec().0, 2, "what the old leader took alone is gone");
    handle.confirm(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_from_disk_keeps_the_state_and_incarnations_rise() {
    let cluster = Cluster::new(3, 3);
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let start = async |n: u16| {
        let (log, disk) = on_disk(folders[usize::from(n) - 1].path());
        let handle = cluster.start(n, disk, n == 1, log).await;
        handle.register(registration(n, disk), LONG).await
    };
    let (a, b, c) = tokio::join!(start(1), start(2), start(3));
    let first = [a.unwrap(), b.unwrap(), c.unwrap()];
    cluster.handle(2).propose(spec(5), LONG).await.unwrap();
    for n in 1..=3 {
        cluster.kill(n).await;
    }
    let (a, b, c) = tokio::join!(start(1), start(2), start(3));
    let second = [a.unwrap(), b.unwrap(), c.unwrap()];
    assert!(second.iter().min() > first.iter().max(), "{first:?} {second:?}");
    for n in 1..=3 {
        cluster.handle(n).confirm(LONG).await.unwrap();
        assert_eq!(cluster.handle(n).watch().borrow().spec().0, 5);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_updated_node_by_node_and_goes_on_in_the_older_version_until_all_are_new() {
    let only = |number| Versions { oldest: number, newest: number };
    let cluster = Cluster::new(3, 3);
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let start = async |n: u16, versions| {
        cluster.net.speaks(&name(n), versions);
        let (log, disk) = on_disk(folders[usize::from(n) - 1].path());
        cluster.start(n, disk, n == 1, log).await;
    };
    for n in 1..=3 {
        start(n, only(1)).await;
    }
    cluster.handle(1).propose(spec(1), LONG).await.unwrap();
    let carried = cluster.net.carried();
    assert!(carried.keys().eq([&(1, 1)]), "{carried:?}");

    for (version, n) in [(2, 2), (4, 1), (6, 3)] {
        cluster.kill(n).await;
        let other = cluster.handle(n % 3 + 1);
        assert_eq!(other.propose(spec(version), LONG).await, Ok(Response::Done), "while {n} is away");
        start(n, Versions::ALL).await;
        let handle = cluster.handle(n);
        handle.confirm(LONG).await.unwrap();
        assert_eq!(handle.watch().borrow().spec().0, version, "node {n} has what it missed");
        cluster.net.carried();
        assert_eq!(handle.propose(spec(version + 1), LONG).await, Ok(Response::Done));
        other.confirm(LONG).await.unwrap();
    }
    for n in 1..=3 {
        cluster.handle(n).confirm(LONG).await.unwrap();
    }
    let carried = cluster.net.carried();
    assert!(carried.keys().eq([&(2, 2)]), "{carried:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_disk_under_a_known_name_joins_and_takes_the_old_ones_vote() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    cluster.handle(1).propose(spec(4), LONG).await.unwrap();
    cluster.kill(3).await;
    // The bootstrap file does not help an empty disk either: there is a cluster.
    let fresh = cluster.start(3, Uuid::from_u128(77), true, RaftLog::ephemeral().unwrap()).await;
    let mut standing = fresh.standing();
    tokio::time::timeout(LONG, standing.wait_for(|standing| *standing == Standing::Voter))
        .await
        .unwrap()
        .unwrap();
    fresh.confirm(LONG).await.unwrap();
    assert_eq!(fresh.watch().borrow().spec().0, 4, "the old cluster's, not a second one");
    // With its vote the cluster outlives another.
    let other = if cluster.leader().await == 2 { 2 } else { 1 };
    cluster.kill(other).await;
    assert_eq!(fresh.propose(spec(5), LONG).await, Ok(Response::Done));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_disk_does_not_vote_before_it_is_let_in() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    cluster.handle(1).propose(spec(4), LONG).await.unwrap();
    cluster.kill(2).await;
    cluster.kill(3).await;
    let fresh = cluster.start(3, Uuid::from_u128(78), true, RaftLog::ephemeral().unwrap()).await;
    // One old voter of three and an empty disk are no majority.
    let answer = fresh.propose(spec(9), Duration::from_secs(1)).await;
    assert!(answer.is_err(), "{answer:?}");
    assert_ne!(*fresh.standing().borrow(), Standing::Voter);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_founds_a_cluster_while_a_voter_is_missing() {
    let cluster = Cluster::new(3, 3);
    let first = cluster.start(1, disk(1), true, RaftLog::ephemeral().unwrap()).await;
    cluster.start(2, disk(2), false, RaftLog::ephemeral().unwrap()).await;
    let mut standing = first.standing();
    let waits = |standing: &Standing| matches!(standing, Standing::Waiting { why } if why.contains("n3"));
    tokio::time::timeout(LONG, standing.wait_for(waits)).await.unwrap().unwrap();
    assert!(first.propose(spec(1), Duration::from_millis(300)).await.is_err());
    cluster.start(3, disk(3), false, RaftLog::ephemeral().unwrap()).await;
    assert_eq!(first.propose(spec(1), LONG).await, Ok(Response::Done));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_is_a_cluster_of_its_own() {
    let cluster = Cluster::new(1, 1);
    let folder = tempfile::tempdir().unwrap();
    let (log, disk) = on_disk(folder.path());
    let handle = cluster.start(1, disk, false, log).await;
    let first = handle.register(registration(1, disk), LONG).await.unwrap();
    seen(&handle, |registry| registry.shards().all(|shard| registry.set(shard).is_some())).await;
    drop(handle);
    cluster.kill(1).await;
    let (log, disk) = on_disk(folder.path());
    let handle = cluster.start(1, disk, false, log).await;
    assert!(handle.register(registration(1, disk), LONG).await.unwrap() > first);
    handle.confirm(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asking_twice_registers_one_process_once() {
    let cluster = Cluster::new(3, 3);
    cluster.start_all().await;
    let process = registration(2, disk(2));
    let first = cluster.handle(2).register(process.clone(), LONG).await.unwrap();
    assert_eq!(cluster.handle(2).register(process, LONG).await, Ok(first));
    let next = cluster.handle(2).register(registration(2, disk(2)), LONG).await.unwrap();
    assert!(next > first, "another process is another incarnation");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_voters_outlive_two() {
    let cluster = Cluster::new(5, 5);
    cluster.start_all().await;
    cluster.handle(5).propose(spec(1), LONG).await.unwrap();
    for version in 2..=3 {
        let leader = cluster.leader().await;
        cluster.kill(leader).await;
        let next = cluster.leader().await;
        assert_eq!(cluster.handle(next).propose(spec(version), LONG).await, Ok(Response::Done));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_without_a_vote_follow_and_may_propose() {
    let cluster = Cluster::new(3, 6);
    cluster.start_all().await;
    cluster.register_all().await;
    let follower = cluster.handle(6);
    assert_eq!(*follower.standing().borrow(), Standing::Follower);
    assert_eq!(follower.propose(spec(3), LONG).await, Ok(Response::Done));
    let version = follower.confirm(LONG).await.unwrap();
    let leader = cluster.handle(cluster.leader().await);
    let there = seen(&leader, |registry| registry.version() >= version).await;
    let here = seen(&follower, |registry| registry.version() >= there.version()).await;
    assert_eq!(here.spec().0, 3);
    let full = |registry: &Registry| {
        registry.shards().all(|shard| registry.set(shard).is_some_and(|set| set.replicas.len() == 3))
    };
    let (here, there) = (seen(&follower, full).await, seen(&leader, full).await);
    for shard in here.shards() {
        assert_eq!(here.set(shard).unwrap().replicas.len(), there.set(shard).unwrap().replicas.len());
    }
    // Whoever it asked is gone: it asks another.
    let old = cluster.leader().await;
    cluster.kill(old).await;
    let new = cluster.leader().await;
    cluster.handle(new).propose(spec(4), LONG).await.unwrap();
    seen(&follower, |registry| registry.spec().0 == 4).await;
    assert_eq!(follower.propose(spec(5), LONG).await, Ok(Response::Done));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_and_owner_is_down_everywhere_soon() {
    let cluster = Cluster::new(3, 4);
    cluster.start_all().await;
    cluster.register_all().await;
    let reporting = cluster.report_health();
    let all = |registry: &Registry| {
        registry.shards().all(|shard| registry.set(shard).is_some_and(|set| set.replicas.len() == 3))
    };
    for n in 1..=4 {
        seen(&cluster.handle(n), all).await;
    }
    let victim = cluster.leader().await;
    let killed = Instant::now();
    cluster.kill(victim).await;
    let down = |registry: &Registry| {
        registry.node(&name(victim)).is_some_and(|node| node.status == NodeStatus::Down)
            && registry.shards().all(|shard| {
                registry.set(shard).unwrap().replicas.iter().all(|member| member.node != name(victim))
            })
    };
    for n in (1..=4).filter(|n| *n != victim) {
        seen(&cluster.handle(n), down).await;
    }
    println!("down everywhere after {:?}", killed.elapsed());
    reporting.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_one_grows_to_three_and_changes_its_voters() {
    let mut cluster = Cluster::new(1, 1);
    let folders: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let start = async |cluster: &Cluster, n: u16| {
        let (log, disk) = on_disk(folders[usize::from(n) - 1].path());
        cluster.start(n, disk, false, log).await
    };
    let votes = async |cluster: &Cluster, n: u16| {
        let mut standing = cluster.handle(n).standing();
        let found =
            tokio::time::timeout(LONG, standing.wait_for(|standing| *standing == Standing::Voter)).await;
        assert!(found.is_ok(), "{n} does not vote in time: {:?}", cluster.handle(n).standing().borrow());
    };
    assert_eq!(start(&cluster, 1).await.propose(spec(1), LONG).await, Ok(Response::Done));
    cluster.kill(1).await;
    (cluster.voters, cluster.nodes) = ((1..=3).map(name).collect(), (1..=4).map(name).collect());
    for n in 1..=4 {
        start(&cluster, n).await;
    }
    votes(&cluster, 2).await;
    votes(&cluster, 3).await;
    seen(&cluster.handle(4), |registry| registry.spec().0 == 1).await;
    // Node 4 shall vote instead of node 1: each is restarted with the new spec.
    cluster.voters = (2..=4).map(name).collect();
    for n in 1..=4 {
        cluster.kill(n).await;
        start(&cluster, n).await;
    }
    votes(&cluster, 4).await;
    cluster.kill(1).await;
    assert_eq!(cluster.handle(4).propose(spec(2), LONG).await, Ok(Response::Done));
    let leader = cluster.leader().await;
    cluster.kill(leader).await;
    let next = cluster.leader().await;
    assert_eq!(cluster.handle(next).propose(spec(3), LONG).await, Ok(Response::Done), "two of 2, 3 and 4");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_far_behind_is_sent_the_whole_state() {
    let cluster = Cluster::new(3, 3);
    let folder = tempfile::tempdir().unwrap();
    let (log, own) = on_disk(folder.path());
    cluster.start(1, disk(1), true, RaftLog::ephemeral().unwrap()).await;
    cluster.start(2, disk(2), false, RaftLog::ephemeral().unwrap()).await;
    cluster.start(3, own, false, log).await;
    cluster.handle(3).propose(spec(1), LONG).await.unwrap();
    cluster.kill(3).await;
    // More than a log keeps.
    let leader = cluster.handle(cluster.leader().await);
    for round in 0..80u64 {
        let asked = (1..=64).map(|n| leader.propose(spec(round * 64 + n), LONG));
        for answer in futures::future::join_all(asked).await {
            assert!(answer.is_ok(), "{answer:?}");
        }
    }
    let (log, own) = on_disk(folder.path());
    let late = cluster.start(3, own, false, log).await;
    seen(&late, |registry| registry.spec().0 == 80 * 64).await;
    late.confirm(LONG).await.unwrap();
    cluster.kill(3).await;
    let (log, own) = on_disk(folder.path());
    let again = cluster.start(3, own, false, log).await;
    seen(&again, |registry| registry.spec().0 == 80 * 64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_disk_that_comes_back_is_let_in_again() {
    let cluster = Cluster::new(3, 3);
    let folder = tempfile::tempdir().unwrap();
    let (log, old) = on_disk(folder.path());
    cluster.start(1, disk(1), true, RaftLog::ephemeral().unwrap()).await;
    cluster.start(2, disk(2), false, RaftLog::ephemeral().unwrap()).await;
    cluster.start(3, old, false, log).await;
    cluster.handle(3).propose(spec(1), LONG).await.unwrap();
    cluster.kill(3).await;
    let voter = |standing: &Standing| *standing == Standing::Voter;
    let fresh = cluster.start(3, Uuid::from_u128(79), false, RaftLog::ephemeral().unwrap()).await;
    tokio::time::timeout(LONG, fresh.standing().wait_for(voter)).await.unwrap().unwrap();
    fresh.propose(spec(2), LONG).await.unwrap();
    cluster.kill(3).await;
    let (log, old) = on_disk(folder.path());
    let back = cluster.start(3, old, false, log).await;
    seen(&back, |registry| registry.spec().0 == 2).await;
    let other = if cluster.leader().await == 1 { 2 } else { 1 };
    let until = Instant::now() + LONG;
    // It counts again once it is in the place of the other disk.
    while !matches!(*back.standing().borrow(), Standing::Voter) || back.leader().is_none() {
        assert!(Instant::now() < until, "{:?}", back.standing().borrow());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cluster.kill(other).await;
    // A leader that changes while it is asked leaves the outcome unknown; the same entry twice is as once.
    let mut done = back.propose(spec(3), LONG).await;
    while done == Err(ProposeError::Unknown) && Instant::now() < until {
        done = back.propose(spec(3), LONG).await;
    }
    assert_eq!(done, Ok(Response::Done));
}
