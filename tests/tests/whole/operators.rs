//! What operators see over HTTP: the cluster, its shards, nodes and GPUs, and events as they happen.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use keepwarm_config::TenantConfig;
use keepwarm_tests::{DEADLINE, Server, Setup, bytes_layout, send};
use keepwarm_types::Bytes;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A session with `length` bytes in it, and its path.
async fn written(server: &Server, length: usize) -> String {
    let path = server.session(&bytes_layout()).await;
    assert_eq!(server.put(&format!("{path}/parts/b"), vec![7; length]).await.status, 200);
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_and_its_shards_count_what_is_made() {
    let server = Server::start(None, Setup::default()).await;
    let cluster = server.get("/v1/cluster").await.json();
    assert_eq!(
        (cluster["shards"].as_u64(), cluster["registry_leader"].as_str()),
        (Some(64), Some("n1")),
        "{cluster}"
    );
    assert_eq!(
        (&cluster["under_replicated_shards"], &cluster["under_replicated_sessions"]),
        (&json!(0), &json!(0))
    );
    assert!(cluster["spec"]["version"].is_u64() && cluster["spec"]["hash"].is_string(), "{cluster}");
    let nodes = cluster["nodes"].as_array().unwrap();
    assert_eq!(
        (nodes.len(), nodes[0]["name"].as_str(), nodes[0]["status"].as_str()),
        (1, Some("n1"), Some("up"))
    );
    let node = &nodes[0];
    assert_eq!((node["gpus"].as_array().unwrap().len(), node["safe_to_stop"].as_bool()), (2, Some(true)));
    assert_eq!(node["pinned"]["arena"]["used_bytes"], 0);
    for _ in 0..10 {
        written(&server, 70_000).await;
    }
    let node = server.get("/v1/cluster").await.json()["nodes"][0].clone();
    let (used, reserved) =
        (&node["pinned"]["arena"]["used_bytes"], &node["pinned"]["arena"]["reserved_bytes"]);
    assert!(used.as_u64() >= Some(700_000) && used.as_u64() <= reserved.as_u64(), "{node}");
    assert_eq!(node["pinned"]["sessions"], 10, "{node}");
    assert_eq!(node["safe_to_stop"], false, "their only copy is here");
    assert!(node["reason"].as_str().unwrap().contains("10 sessions"), "{node}");
    let shards = server.get("/v1/cluster/shards").await.json()["shards"].as_array().unwrap().clone();
    assert_eq!(shards.len(), 64);
    for (n, shard) in shards.iter().enumerate() {
        assert_eq!((&shard["shard"], &shard["replicas"]), (&json!(n), &json!(["n1"])), "{shard}");
        assert!(shard["generation"].is_u64() && shard["learner"].is_null(), "{shard}");
    }
    assert_eq!(shards.iter().map(|shard| shard["sessions"].as_u64().unwrap()).sum::<u64>(), 10);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpus_figures_move_with_its_sessions() {
    let server = Server::start(None, Setup::default()).await;
    let path = written(&server, 1 << 20).await;
    let gpus =
        async |server: &Server| server.get("/v1/gpus").await.json()["gpus"].as_array().unwrap().clone();
    let before = gpus(&server).await;
    for (n, gpu) in before.iter().enumerate() {
        assert_eq!((&gpu["gpu"], &gpu["state"], &gpu["reason"]), (&json!(n), &json!("up"), &Value::Null));
        assert_eq!((&gpu["leases"], &gpu["sessions"]), (&json!(0), &json!(0)), "{gpu}");
        let streams =
            gpu["scratch"].as_array().unwrap().iter().map(|pools| pools["stream"].as_str().unwrap());
        let expected: &[&str] = if gpu["device"] == "host" { &[] } else { &["in", "out", "links"] };
        assert_eq!(streams.collect::<Vec<_>>(), expected, "{gpu}");
    }
    let used = |gpu: &Value| gpu["arena"]["used_bytes"].as_u64().unwrap();
    let active = server.post(&format!("{path}/activate"), &json!({"gpu": 1})).await;
    assert_eq!(active.status, 200, "{:?}", active.json());
    let one = async |server: &Server, leases: u64| gpus(server).await[1]["leases"] == leases;
    server.until("the lease is counted", async |server| one(server, 1).await).await;
    let during = gpus(&server).await;
    assert!(used(&during[1]) >= used(&before[1]) + (1 << 20), "{during:?}");
    assert_eq!((&during[1]["sessions"], used(&during[0])), (&json!(1), used(&before[0])), "{during:?}");
    let lease = active.json()["lease"]["id"].clone();
    assert_eq!(server.post(&format!("{path}/release"), &json!({"lease": lease})).await.status, 200);
    server.until("the lease is gone", async |server| one(server, 0).await).await;
    let node = server.get("/v1/nodes/n1").await.json();
    assert_eq!(
        (node["name"].as_str(), node["gpus"][1]["sessions"].as_u64()),
        (Some("n1"), Some(1)),
        "{node}"
    );
    assert_eq!(node["under_replicated_sessions"], 0);
    let unknown = server.get("/v1/nodes/n9").await;
    assert_eq!((unknown.status, unknown.code().as_str()), (404, "unknown_node"), "{:?}", unknown.json());
    server.stop().await;
}

/// Reads server-sent events up to a move of the session; gives the sessions of all moves.
async fn moves_until(stream: &mut Response, text: &mut String, session: &str) -> Vec<String> {
    let read = async {
        loop {
            let whole = text.rfind("\n\n").map_or("", |end| &text[..end]);
            let data = whole.split("\n\n").filter(|event| event.contains("event: move"));
            let data = data.flat_map(str::lines).filter_map(|line| line.strip_prefix("data: "));
            let parsed = data.map(|data| serde_json::from_str::<Value>(data).unwrap());
            let seen: Vec<String> =
                parsed.filter_map(|event| event["session"].as_str().map(str::to_owned)).collect();
            if seen.iter().any(|seen| seen == session) {
                return seen;
            }
            text.push_str(std::str::from_utf8(&stream.chunk().await.unwrap().expect("it goes on")).unwrap());
        }
    };
    tokio::time::timeout(DEADLINE, read).await.expect("the move is told")
}

//= GUARANTEES.md#G4
#[tokio::test(flavor = "multi_thread")]
async fn events_are_told_to_the_sessions_tenant_and_to_admins() {
    let tenant = |name: &str| TenantConfig {
        name: name.parse().unwrap(),
        token_sha256: Sha256::digest(format!("token-{name}")).into(),
        admin: name == "a",
        share: 1.0,
        sessions_max: 10,
        forever_bytes_max: Bytes(0),
    };
    let server =
        Server::start(None, Setup { tenants: ["a", "b", "c"].map(tenant).to_vec(), ..Setup::default() })
            .await;
    let ask = |name: &str, method: Method, path: &str| {
        server.request(method, path).bearer_auth(format!("token-{name}"))
    };
    let listen = async |name: &str| ask(name, Method::GET, "/v1/events").send().await.unwrap();
    let (mut admin, mut b) = (listen("a").await, listen("b").await);
    assert_eq!(admin.headers()["content-type"], "text/event-stream");
    let moved = async |name: &str| {
        let made =
            send(ask(name, Method::POST, "/v1/sessions").json(&json!({"layout": bytes_layout()}))).await;
        let id = made.json()["id"].as_str().unwrap().to_owned();
        let path = format!("/v1/sessions/{id}");
        let put = ask(name, Method::PUT, &format!("{path}/parts/b")).body(vec![1; 1000]);
        assert_eq!(send(put).await.status, 200);
        let active = send(ask(name, Method::POST, &format!("{path}/activate")).json(&json!({}))).await;
        assert_eq!(active.status, 200, "{:?}", active.json());
        id
    };
    let (mut admins, mut bs) = (String::new(), String::new());
    let of_c = moved("c").await;
    moves_until(&mut admin, &mut admins, &of_c).await;
    // What b is told last comes after what it must not be told.
    let of_b = moved("b").await;
    let seen = moves_until(&mut admin, &mut admins, &of_b).await;
    assert!(seen.contains(&of_c) && seen.contains(&of_b), "an admin sees both: {seen:?}");
    assert!(!moves_until(&mut b, &mut bs, &of_b).await.contains(&of_c));
    assert!(!bs.contains(&of_c), "not a word of another tenant's session: {bs}");
    drop((admin, b));
    server.stop().await;
}
