//! Where sessions run, on three processes: where there is room for them, and where they are asked to.

use std::path::Path;
use std::time::Instant;

use keepwarm_client::{Client, PartBody, Placement, WriteOptions};
use keepwarm_tests::chaos::cluster::Cluster;
use keepwarm_tests::send;
use keepwarm_types::{Outcome, Source};
use serde_json::{Value, json};
use uuid::Uuid;

use super::tiers::{LOOK, MOVED_WITHIN, OWNER, PART, SESSION_BYTES, bytes, new, owned};

async fn written(client: &Client, id: Uuid) {
    client.create(&new(id)).await.expect("a session");
    let body = PartBody::from(bytes(id));
    client.put_part(id, PART, body, &WriteOptions::default()).await.expect("written");
    assert_eq!(client.session(id).await.expect("it is there").owner, OWNER);
}

/// A session has the bytes that were written to one of that name.
async fn reads(client: &Client, id: Uuid, of: Uuid) {
    let read = client.part(id, PART).await.expect("warm").bytes().await.expect("whole");
    assert!(read == bytes(of), "{id} has other bytes");
}

/// A call without the client's library: one request to one node, which nothing repeats.
async fn post(cluster: &Cluster, node: usize, path: &str, body: Value) -> keepwarm_tests::Answer {
    let url = format!("{}/v1/sessions/{path}", cluster.nodes[node].url);
    send(reqwest::Client::new().post(url).json(&body)).await
}

/// The same, again where a busy machine was too slow for it.
async fn done(cluster: &Cluster, node: usize, path: &str, body: Value) -> keepwarm_tests::Answer {
    let deadline = Instant::now() + MOVED_WITHIN;
    loop {
        let answer = post(cluster, node, path, body.clone()).await;
        assert!(!answer.headers.contains_key("keepwarm-moving"), "that is between nodes");
        if answer.status != 503 {
            return answer;
        }
        assert!(Instant::now() < deadline, "{}", answer.json());
        tokio::time::sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_with_an_id_of_its_clients_runs_where_room_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = env!("CARGO_BIN_EXE_keepwarm");
    // The owner's GPU is smaller than a session; the others have 16 MiB.
    let small = |_: &Path, file: String| file.replacen("memory = \"16MiB\"", "memory = \"2MiB\"", 1);
    let cluster = Cluster::start_changed(program.as_ref(), folder.path(), 3, small, Vec::new()).await;
    let cluster = cluster.expect("the cluster starts");
    let client = Client::new(&cluster.nodes[0].url).expect("its address");
    let ids = owned(&client).await;
    let (first, shard) = (ids[0], client.shards().await.expect("the map").shard_of(ids[0]));
    let map = client.shards().await.expect("the map");
    let second = *ids.iter().find(|id| map.shard_of(**id) != shard).expect("the owner has several shards");
    for id in [first, second] {
        written(&client, id).await;
    }
    // Asked at its owner, which answers for another node.
    let there = done(&cluster, 0, &format!("{first}/activate"), json!({})).await;
    let answer = there.json();
    assert_eq!(there.status, 200, "{answer}");
    let home = answer["home"]["node"].as_str().expect("a node").to_owned();
    assert_ne!(home, OWNER);
    assert_eq!(there.headers["keepwarm-owner"], home.as_str());
    assert_eq!(there.headers["keepwarm-relayed-by"], OWNER);
    assert_eq!(client.session(first).await.expect("it is there").owner, home);
    reads(&client, first, first).await;
    // What somebody wants to run here and nowhere else says why it cannot; its shard stays.
    let here = post(&cluster, 0, &format!("{second}/activate"), json!({"node": OWNER})).await;
    assert_eq!((here.status, here.json()["code"].as_str()), (507, Some("no_capacity")), "{}", here.json());
    assert_eq!(client.session(second).await.expect("it is there").owner, OWNER);
    // By the library, which goes straight to the owner and then after it.
    let there = client.activate(second, &Placement::default(), None).await.expect("there is room");
    assert_ne!(there.home.node, OWNER);
    assert_ne!(there.source, Source::None);
    assert_eq!(there.bytes_moved, SESSION_BYTES as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_moves_to_the_node_that_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = env!("CARGO_BIN_EXE_keepwarm");
    let cluster = Cluster::start(program.as_ref(), folder.path(), 3).await.expect("the cluster starts");
    let client = Client::new(&cluster.nodes[0].url).expect("its address");
    let id = owned(&client).await[0];
    written(&client, id).await;
    let unknown = post(&cluster, 0, &format!("{id}/migrate"), json!({"node": "n9"})).await;
    assert_eq!((unknown.status, unknown.json()["code"].as_str()), (404, Some("unknown_node")));
    // A fork lies in its parent's shard: it would move along, and whoever runs it would lose its lease.
    let fork = client.fork(id, &keepwarm_client::Fork::default()).await.expect("a fork").1.id;
    let lease = client.activate(fork, &Placement::default(), None).await.expect("there is room").lease;
    let held = post(&cluster, 0, &format!("{id}/migrate"), json!({"node": "n2"})).await;
    assert_eq!(held.status, 503, "{}", held.json());
    let why = held.json()["detail"].as_str().expect("a reason").to_owned();
    assert!(why.contains("other sessions of its shard are leased (1)"), "{why}");
    client.release(fork, lease.id).await.expect("the lease is still in force");

    let moved = done(&cluster, 0, &format!("{id}/migrate"), json!({"node": "n2"})).await;
    let answer = moved.json();
    assert_eq!((moved.status, answer["outcome"].as_str()), (200, Some("accepted")), "{answer}");
    let session = client.session(id).await.expect("it is there");
    assert_eq!((session.owner.as_str(), session.home.expect("a home").node.as_str()), ("n2", "n2"));
    let there = client.activate(id, &Placement::default(), None).await.expect("it is there");
    assert_eq!((there.home.node.as_str(), there.source), ("n2", Source::Hbm), "its bytes came with it");
    client.release(id, there.lease.id).await.expect("released");
    reads(&client, id, id).await;
    reads(&client, fork, id).await;
    // Asked through a node that is neither: it relays to the one, and then to the other.
    let moved = done(&cluster, 2, &format!("{id}/migrate"), json!({"node": OWNER})).await;
    assert_eq!((moved.status, moved.json()["outcome"].as_str()), (200, Some("accepted")), "{}", moved.json());
    assert_eq!(moved.headers["keepwarm-owner"], OWNER);
    // Elsewhere for a run, by the library.
    let wish = Placement { node: Some("n3".to_owned()), gpu: None };
    let there = client.activate(id, &wish, None).await.expect("it goes there");
    assert_eq!(there.home.node, "n3");
    assert_eq!(there.verdict.outcome, Outcome::Accepted);
}
