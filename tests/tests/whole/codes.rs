//! The rarer codes over HTTP. `lost` needs a cluster; `internal` and `outcome_unknown` need a broken disk or a bug,
//! which the simulation and the catalog's tests bring about below HTTP.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use keepwarm_tests::{Answer, Server, Setup, bytes_layout, send};
use keepwarm_types::{SessionId, SessionKey};
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn is(answer: &Answer, status: u16, code: &str) {
    assert_eq!((answer.status, answer.code().as_str()), (status, code), "{:?}", answer.json());
}

fn key(path: &str) -> SessionKey {
    let id: SessionId = path.rsplit('/').next().unwrap().parse().unwrap();
    SessionKey::new("default".parse().unwrap(), id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_expires_after_its_ttl() {
    let server = Server::start(None, Setup::default()).await;
    let made = server.post("/v1/sessions", &json!({"layout": bytes_layout(), "ttl_s": 0.05})).await;
    assert_eq!(made.status, 201, "{:?}", made.json());
    let path = made.header("location").unwrap().to_owned();
    server.until("the session expires", async |server| server.get(&path).await.status == 410).await;
    is(&server.get(&path).await, 410, "expired");
    is(&server.put(&format!("{path}/parts/b"), vec![1]).await, 410, "expired");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_session_is_cold_until_it_is_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(Some(folder.path()), Setup::default()).await;
    let path = server.session(&bytes_layout()).await;
    let part = format!("{path}/parts/b");
    let write = async |server: &Server| {
        let id = "6f0b9d0e-5f0e-4f0b-8f5e-3f8f0b9d0e5f";
        let put = server.request(Method::PUT, &part).header("keepwarm-write-id", id).body(vec![7; 1000]);
        send(put).await.json()
    };
    let written = write(&server).await;
    assert_eq!(
        (&written["durability"], &written["holders"]),
        (&json!("full"), &json!(["n1"])),
        "{written:?}"
    );
    server.stop().await;
    let server = Server::start(Some(folder.path()), Setup::default()).await;
    // The same write again is told what it made, and that no copy of the bytes is left.
    let again = write(&server).await;
    assert_eq!(again["revision"], written["revision"], "{again:?}");
    assert_eq!((&again["durability"], &again["holders"]), (&json!("degraded"), &json!([])), "{again:?}");
    let session = server.get(&path).await.json();
    assert_eq!(
        (session["state"].as_str(), session["cold_reason"].as_str()),
        (Some("cold"), Some("restarted"))
    );
    is(&server.get(&part).await, 410, "cold");
    is(&server.patch(&format!("{part}?offset=1000"), vec![8]).await, 410, "cold");
    assert_eq!(server.put(&part, vec![9; 10]).await.status, 200);
    assert_eq!(server.get(&part).await.body, vec![9; 10]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_and_oversized_requests_are_told_apart() {
    let server = Server::start(None, Setup::default()).await;
    let path = server.session(&bytes_layout()).await;
    let part = format!("{path}/parts/b");
    let stale = server.request(Method::PUT, &part).header("if-match", "\"0123456789-7\"").body(vec![1]);
    is(&send(stale).await, 412, "revision_mismatch");
    let long = json!({"layout": bytes_layout(), "labels": {"a": "x".repeat(9 << 20)}});
    is(&server.post("/v1/sessions", &long).await, 413, "body_too_large");
    // Refused before a byte of it is sent.
    let mut stream = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).await.unwrap();
    let head = format!("PUT {part} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", (16u64 << 30) + 1);
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_on_one_branch_queue_up_to_a_limit() {
    let server = Server::start(None, Setup::default()).await;
    let body =
        json!({"model": "tiny", "max_tokens": 64, "messages": [{"role": "user", "content": "Hello."}]});
    let ask = |_| {
        let call = server.request(Method::POST, "/v1/chat/completions").header("x-session-id", "one");
        send(call.json(&body))
    };
    let answers = futures::future::join_all((0..64).map(ask)).await;
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status != 200).collect();
    assert!(!refused.is_empty() && refused.len() < 64, "{} of 64 were refused", refused.len());
    for answer in refused {
        is(answer, 429, "overloaded");
        assert!(answer.header("retry-after").is_some());
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_keeps_failing_is_unavailable_and_others_serve() {
    let server = Server::start(None, Setup::default()).await;
    let (path, mut other) = (server.session(&bytes_layout()).await, server.session(&bytes_layout()).await);
    let shard = |path: &str| key(path).id.uuid().as_u128() as u16 >> 10;
    while shard(&other) == shard(&path) {
        other = server.session(&bytes_layout()).await;
    }
    server
        .until("the shard stays down", async |server| {
            server.handle.panic_shard(&key(&path));
            server.get(&path).await.code() == "unavailable" && server.get(&path).await.status == 503
        })
        .await;
    assert_eq!(server.get(&other).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_says_that_it_drains() {
    let mut server = Server::start(None, Setup::default()).await;
    let path = server.session(&bytes_layout()).await;
    server.drain().await;
    let refused = server.put(&format!("{path}/parts/b"), vec![1]).await;
    is(&refused, 503, "draining");
    assert!(refused.header("retry-after").is_some());
    assert_eq!(server.get("/readyz").await.status, 503);
    assert_eq!(server.get("/healthz").await.status, 200);
    server.stop().await;
}
