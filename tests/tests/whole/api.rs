//! The HTTP contract on a real node: routes, codes, headers, bytes, two tenants, torn bodies.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use keepwarm_tests::{DEADLINE, Server, Setup, bytes_layout, paged_layout, send};
use keepwarm_types::Bytes;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use twox_hash::XxHash3_128;

async fn server() -> Server {
    Server::start(None, Setup::default()).await
}

fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 31 + seed * 101) as u8).collect()
}

fn repr_digest(bytes: &[u8]) -> String {
    format!("xxh3-128=:{}:", STANDARD.encode(XxHash3_128::oneshot(bytes).to_be_bytes()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_its_whole_way() {
    let server = server().await;
    let made =
        server.post("/v1/sessions", &json!({"layout": paged_layout(), "labels": {"user": "42"}})).await;
    assert_eq!((made.status, made.json()["state"].as_str()), (201, Some("warm")));
    let path = made.header("location").unwrap().to_owned();
    assert_eq!(made.header("keepwarm-owner"), Some("n1"));
    let part = format!("{path}/parts/kv");
    let bytes = pattern(1, 64 * 40);
    let first = server.patch(&format!("{part}?offset=0"), bytes[..64 * 25].to_vec()).await;
    assert_eq!((first.status, first.json()["length_tokens"].as_u64()), (200, Some(25)), "{:?}", first.json());
    let second = server.patch(&format!("{part}?offset=25"), bytes[64 * 25..].to_vec()).await;
    assert_eq!(
        (second.json()["revision"].as_u64(), second.json()["holders"][0].as_str()),
        (Some(2), Some("n1"))
    );
    let read = server.get(&part).await;
    assert_eq!((read.status, &read.body), (200, &bytes));
    assert_eq!(read.header("etag"), second.header("etag"));
    let range = send(server.request(Method::GET, &part).header("range", "bytes=100-199")).await;
    assert_eq!(
        (range.status, &range.body[..], range.header("content-range")),
        (206, &bytes[100..200], Some("bytes 100-199/2560"))
    );
    let tokens = server.get(&format!("{part}?from_token=3&to_token=30&planes=1-2")).await;
    let expected: Vec<u8> =
        bytes.chunks(64).skip(3).take(27).flat_map(|token| &token[16..48]).copied().collect();
    assert_eq!(tokens.body, expected);
    let active = server.post(&format!("{path}/activate"), &json!({})).await.json();
    assert_eq!((active["source"].as_str(), active["bytes_moved"].as_u64()), (Some("pinned"), Some(2560)));
    let lease = active["lease"]["id"].clone();
    assert_eq!(server.post(&format!("{path}/activate"), &json!({})).await.code(), "leased");
    assert_eq!(server.patch(&format!("{part}?offset=40"), pattern(2, 64)).await.code(), "leased");
    assert_eq!(
        server.post(&format!("{path}/demote"), &json!({"tier": "pinned"})).await.json()["outcome"],
        "rejected"
    );
    assert_eq!(
        server.post(&format!("{path}/renew"), &json!({"lease": lease, "ttl_ms": 5})).await.json()["outcome"],
        "clipped"
    );
    assert_eq!(
        server.post(&format!("{path}/release"), &json!({"lease": lease})).await.json()["outcome"],
        "accepted"
    );
    assert_eq!(
        server.post(&format!("{path}/release"), &json!({"lease": lease})).await.code(),
        "lease_expired"
    );
    assert_eq!(
        server.post(&format!("{path}/demote"), &json!({"tier": "pinned"})).await.json()["outcome"],
        "accepted"
    );
    assert_eq!(
        server.post(&format!("{path}/prefetch"), &json!({"tier": "hbm"})).await.json()["outcome"],
        "accepted"
    );
    assert_eq!(
        server.post(&format!("{path}/migrate"), &json!({"gpu": 1})).await.json()["outcome"],
        "accepted"
    );
    let explained = server.get(&format!("{path}/explain")).await.json();
    assert!(explained["moves"].as_array().unwrap().len() >= 3, "{explained}");
    let fork = server.post(&format!("{path}/fork"), &json!({"length_tokens": 20})).await;
    assert_eq!(
        (fork.status, fork.json()["outcome"].as_str(), fork.json()["length_tokens"].as_u64()),
        (201, Some("clipped"), Some(16))
    );
    let cut = server.post(&format!("{path}/truncate"), &json!({"length_tokens": 32})).await;
    assert_eq!(cut.json()["length_tokens"], 32);
    assert_eq!(server.post(&format!("{path}/checkpoint"), &json!({})).await.json()["outcome"], "accepted");
    let listed = server.get("/v1/sessions?label.user=42").await.json();
    assert_eq!(listed["sessions"].as_array().unwrap().len(), 2, "the fork keeps its parent's labels");
    let ended = send(server.request(Method::DELETE, &path)).await;
    assert_eq!((ended.status, ended.json()["freed"].as_array().unwrap().is_empty()), (200, false));
    assert_eq!(server.get(&path).await.code(), "deleted");
    let child = format!("/v1/sessions/{}/parts/kv", fork.json()["id"].as_str().unwrap());
    assert_eq!(server.get(&child).await.body, bytes[..64 * 16], "a fork outlives its parent");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_parts_become_one_revision() {
    let server = server().await;
    let part = |name: &str| json!({"name": name, "form": "paged", "tokens_per_block": 4, "planes": 1, "plane_bytes_per_token": 8, "order": "token"});
    let layout = json!({"model": "m", "fingerprint": "f", "parts": [part("a"), part("b"), {"name": "s", "form": "snapshot", "bytes": 10}]});
    let path = server.session(&layout).await;
    assert_eq!(server.patch(&format!("{path}/parts/a?offset=0"), pattern(1, 40)).await.code(), "incomplete");
    let txn = "0197a3c2-6d0e-7b1a-9c54-2f6d8a3be041";
    let commit = json!({"txn": txn, "length_tokens": 5, "tokens": [1, 2, 3, 4, 5], "messages": [{"role": "user", "content": "hi"}]});
    for part in ["a", "b"] {
        let staged = server.patch(&format!("{path}/parts/{part}?offset=0&txn={txn}"), pattern(1, 40)).await;
        assert_eq!(staged.json()["staged"], true);
    }
    let refused = server.post(&format!("{path}/commit"), &commit).await;
    assert_eq!((refused.code().as_str(), refused.json()["part"].as_str()), ("incomplete", Some("s")));
    assert_eq!(
        server.get(&format!("{path}/parts/a")).await.code(),
        "unwritten_part",
        "nothing shows before the commit"
    );
    server.put(&format!("{path}/parts/s?txn={txn}"), pattern(2, 10)).await;
    let done = server.post(&format!("{path}/commit"), &commit).await;
    assert_eq!((done.status, done.json()["revision"].as_u64()), (200, Some(1)), "{:?}", done.json());
    assert_eq!(server.get(&format!("{path}/transcript")).await.json()["messages"][0]["content"], "hi");
    assert_eq!(
        server.post(&format!("{path}/match"), &json!({"tokens": [1, 2, 3, 9]})).await.json()["matched_tokens"],
        3
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn preconditions_and_write_ids_hold() {
    let server = server().await;
    let path = server.session(&bytes_layout()).await;
    let part = format!("{path}/parts/b");
    let id = uuid::Uuid::new_v4().to_string();
    let write = |offset: usize, id: &str| {
        server
            .request(Method::PATCH, &format!("{part}?offset={offset}"))
            .header("keepwarm-write-id", id)
            .body(pattern(1, 1000))
    };
    let first = send(write(0, &id)).await;
    let again = send(write(0, &id)).await;
    assert_eq!((first.status, again.status), (200, 200));
    assert_eq!(first.json()["revision"], again.json()["revision"]);
    let tag = first.header("etag").unwrap();
    let stale =
        send(server.request(Method::PUT, &part).header("if-match", "\"0000000000-9\"").body(vec![1])).await;
    assert_eq!((stale.status, stale.json()["last_write_id"].as_str()), (412, Some(id.as_str())));
    let fresh =
        send(server.request(Method::PUT, &part).header("if-match", tag).body(pattern(3, 70_000))).await;
    assert_eq!(fresh.status, 200);
    let mismatch = server.patch(&format!("{part}?offset=5"), vec![1]).await;
    assert_eq!(
        (mismatch.code().as_str(), mismatch.json()["length_bytes"].as_u64()),
        ("offset_mismatch", Some(70_000))
    );
    let digest = repr_digest(&pattern(4, 5000));
    let wrong =
        send(server.request(Method::PUT, &part).header("repr-digest", &digest).body(pattern(5, 5000))).await;
    assert_eq!((wrong.status, wrong.code().as_str()), (422, "digest_mismatch"));
    assert_eq!(server.get(&part).await.body, pattern(3, 70_000), "a refused write leaves everything");
    let right =
        send(server.request(Method::PUT, &part).header("repr-digest", &digest).body(pattern(4, 5000))).await;
    assert_eq!(right.status, 200);
    assert_eq!(server.get(&part).await.header("repr-digest"), Some(digest.as_str()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_say_what_is_wrong() {
    let server = server().await;
    let path = server.session(&paged_layout()).await;
    let unknown = "/v1/sessions/0197a3c2-6d0e-7b1a-9c54-2f6d8a3be041";
    let layout = |part: Value| json!({"layout": {"model": "m", "fingerprint": "f", "parts": [part]}});
    let posts = [
        ("/v1/sessions", json!({"layout": paged_layout(), "colour": 1}), "invalid_field", "colour"),
        (
            "/v1/sessions",
            layout(json!({"name": "x", "form": "snapshot", "bytes": 0})),
            "invalid_field",
            "layout.parts[0].bytes",
        ),
        ("/v1/sessions", json!({"layout": paged_layout(), "id": "no"}), "invalid_field", "id"),
        ("/v1/sessions", json!({"layout": paged_layout(), "ttl_s": -1}), "invalid_field", "ttl_s"),
        (
            "/v1/sessions",
            json!({"layout": paged_layout(), "protect_s": "never"}),
            "invalid_field",
            "protect_s",
        ),
    ];
    for (path, body, code, field) in posts {
        let answer = server.post(path, &body).await;
        assert_eq!((answer.code().as_str(), answer.json()["field"].as_str()), (code, Some(field)), "{body}");
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    }
    let broken = send(
        server
            .request(Method::POST, "/v1/sessions")
            .header("content-type", "application/json")
            .body("{\"layout\":"),
    )
    .await;
    assert_eq!((broken.status, broken.code().as_str()), (400, "malformed_request"));
    let deep = "[".repeat(100_000);
    let deep = send(
        server.request(Method::POST, "/v1/sessions").header("content-type", "application/json").body(deep),
    )
    .await;
    assert!(matches!(deep.status, 400 | 422), "{}", deep.status);
    let text =
        send(server.request(Method::POST, "/v1/sessions").header("content-type", "text/plain").body("x"))
            .await;
    assert_eq!(text.code(), "unsupported_media_type");
    assert_eq!(server.get(unknown).await.code(), "unknown_session");
    assert_eq!(server.get(&format!("{path}/parts/nope")).await.code(), "unknown_part");
    assert_eq!(server.get(&format!("{path}/parts/kv")).await.code(), "unwritten_part");
    assert_eq!(server.get("/v1/nothing").await.code(), "unknown_route");
    assert_eq!(server.get("/v1/nodes/n9").await.code(), "unknown_node");
    assert_eq!(server.post("/healthz", &json!({})).await.code(), "method_not_allowed");
    assert_eq!(
        server.patch(&format!("{path}/parts/kv?offset=0"), pattern(1, 63)).await.code(),
        "invalid_field"
    );
    assert_eq!(
        server.patch(&format!("{path}/parts/kv?offset=7"), pattern(1, 64)).await.code(),
        "offset_mismatch"
    );
    assert_eq!(
        server.patch(&format!("{path}/parts/kv?offset=0&x=1"), pattern(1, 64)).await.code(),
        "invalid_field"
    );
    server.patch(&format!("{path}/parts/kv?offset=0"), pattern(1, 64)).await;
    let beyond =
        send(server.request(Method::GET, &format!("{path}/parts/kv")).header("range", "bytes=64-")).await;
    assert_eq!((beyond.status, beyond.code().as_str()), (416, "range_not_satisfiable"));
    assert_eq!(
        server
            .post("/v1/sessions", &json!({"layout": bytes_layout(), "id": path.rsplit('/').next()}))
            .await
            .code(),
        "layout_mismatch"
    );
    assert!(server.get("/metrics").await.body.windows(16).any(|window| window == b"keepwarm_rejects"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_tier_refuses_with_a_time_to_come_back() {
    let server = Server::start(None, Setup { pinned: 16 << 20, ..Setup::default() }).await;
    let mut refused = None;
    for n in 0..12 {
        let path = server.session(&bytes_layout()).await;
        let answer = server.put(&format!("{path}/parts/b"), pattern(n, 2 << 20)).await;
        if answer.status != 200 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("16 MiB do not take 24 MiB of protected bytes");
    assert_eq!((refused.status, refused.code().as_str()), (507, "no_capacity"));
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    server.stop().await;
}

/// Sends a request head and part of a body by hand, then goes away or waits.
async fn torn(server: &Server, head: String, body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn torn_bodies_leave_the_session_and_give_their_memory_back() {
    let server = server().await;
    let path = server.session(&bytes_layout()).await;
    let part = format!("{path}/parts/b");
    server.put(&part, pattern(1, 1000)).await;
    let (_, before) = server.handle.used().await;
    for length in [70_000, 5_000_000] {
        let head =
            format!("PATCH {part}?offset=1000 HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
        drop(torn(&server, head, &pattern(2, 66_000)).await);
    }
    let head = format!("PATCH {part}?offset=1000 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n");
    drop(torn(&server, head, b"10\r\n0123456789abcdef\r\n").await);
    let mut garbage = torn(&server, "\0\0\0 not http\r\n\r\n".to_owned(), b"").await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, garbage.read_to_end(&mut answer)).await.unwrap();
    server
        .until("the torn writes' memory comes back", async |server| server.handle.used().await.1 == before)
        .await;
    assert_eq!(server.get(&part).await.body, pattern(1, 1000));
    assert_eq!(server.get(&path).await.json()["revision"], 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_sees_one_revision_while_writes_land() {
    let server = server().await;
    let path = server.session(&bytes_layout()).await;
    let part = format!("{path}/parts/b");
    let whole = |seed: usize| vec![seed as u8; 300_000 + seed * 1000];
    server.put(&part, whole(0)).await;
    let writer = async {
        for seed in 1..30 {
            assert_eq!(server.put(&part, whole(seed)).await.status, 200);
        }
    };
    let reader = async {
        let mut newest = 0;
        for _ in 0..60 {
            let body = server.get(&part).await.body;
            let seed = usize::from(body[0]);
            assert_eq!(body, whole(seed), "a mix of revisions");
            assert!(seed >= newest, "a revision went back");
            newest = seed;
        }
    };
    tokio::join!(writer, reader);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_go_round_and_a_flipped_byte_is_refused() {
    let server = server().await;
    let path = server.session(&paged_layout()).await;
    server.patch(&format!("{path}/parts/kv?offset=0"), pattern(7, 64 * 50)).await;
    let archive = server.get(&format!("{path}/export")).await.body;
    let id = uuid::Uuid::new_v4().to_string();
    let import = |id: &str, body: Vec<u8>| {
        server.request(Method::POST, &format!("/v1/sessions/import?id={id}")).body(body)
    };
    let taken = send(import(&id, archive.clone())).await;
    assert_eq!((taken.status, taken.json()["length_tokens"].as_u64()), (201, Some(50)), "{:?}", taken.json());
    assert_eq!(server.get(&format!("/v1/sessions/{id}/parts/kv")).await.body, pattern(7, 64 * 50));
    for (at, expected) in
        [(archive.len() - 200, "corrupt"), (archive.len() - 1, "corrupt"), (3, "invalid_field")]
    {
        let mut broken = archive.clone();
        broken[at] ^= 1;
        let id = uuid::Uuid::new_v4().to_string();
        let refused = send(import(&id, broken)).await;
        assert_eq!(refused.code(), expected, "byte {at}");
        assert_eq!(server.get(&format!("/v1/sessions/{id}")).await.status, 404, "nothing half-taken stays");
        assert_eq!(send(import(&id, archive.clone())).await.status, 201, "the id can be used again");
    }
    let short = send(import(&uuid::Uuid::new_v4().to_string(), archive[..archive.len() / 2].to_vec())).await;
    assert_eq!(short.code(), "invalid_field");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_sessions_are_made_listed_and_ended() {
    let server = server().await;
    let make = |_| async { server.post("/v1/sessions", &json!({"layout": bytes_layout()})).await.status };
    for _ in 0..100 {
        let made = futures::future::join_all((0..100).map(make)).await;
        assert!(made.iter().all(|status| *status == 201));
    }
    let (mut seen, mut cursor) = (BTreeSet::new(), String::new());
    loop {
        let page = server.get(&format!("/v1/sessions?limit=1000{cursor}")).await.json();
        for session in page["sessions"].as_array().unwrap() {
            assert!(seen.insert(session["id"].as_str().unwrap().to_owned()), "listed twice");
        }
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen.len(), 10_000);
    assert_eq!(
        server.post("/v1/tenants/default/purge", &json!({})).await.json()["receipts"]
            .as_array()
            .unwrap()
            .len(),
        10_000
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_and_the_server_agree() {
    let server = server().await;
    let document = server.get("/openapi.json").await.json();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let filled = path
            .replace("{id}", "0197a3c2-6d0e-7b1a-9c54-2f6d8a3be041")
            .replace("{part}", "kv")
            .replace("{node}", "n1")
            .replace("{name}", "x-1");
        let known: Vec<_> = methods.as_object().unwrap().keys().map(|method| method.to_uppercase()).collect();
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
            if filled == "/v1/events" && method == "GET" {
                continue;
            }
            let answer = send(server.request(method.parse().unwrap(), &filled)).await;
            let served = !matches!(answer.code().as_str(), "unknown_route" | "method_not_allowed");
            assert_eq!(
                served,
                known.contains(&method.to_owned()),
                "{method} {path}: {} {:?}",
                answer.status,
                answer.json()
            );
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_speaks_as_openai_does() {
    let server = server().await;
    assert_eq!(server.get("/v1/models").await.json()["data"][0]["id"], "tiny");
    let ask = |extra: Value| {
        let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8, "temperature": 0});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let whole = send(
        server
            .request(Method::POST, "/v1/chat/completions")
            .header("x-session-id", "chat-1")
            .json(&ask(json!({}))),
    )
    .await;
    assert_eq!(
        (whole.status, whole.json()["object"].as_str()),
        (200, Some("chat.completion")),
        "{:?}",
        whole.json()
    );
    assert!(whole.header("keepwarm-session").is_some() && whole.header("etag").is_some());
    assert_eq!(whole.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let text = whole.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let streamed = server
        .post(
            "/v1/chat/completions",
            &ask(json!({"stream": true, "stream_options": {"include_usage": true}})),
        )
        .await;
    let stream = String::from_utf8(streamed.body).unwrap();
    let chunks: Vec<Value> = stream
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).unwrap())
        .collect();
    let pieces: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(pieces, text, "streamed or not, the same answer");
    assert!(stream.trim_end().ends_with("data: [DONE]"));
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 8);
    let next = json!({"model": "tiny", "max_tokens": 4, "temperature": 0, "messages": [
        {"role": "user", "content": "hello there"}, {"role": "assistant", "content": text}, {"role": "user", "content": [{"type": "text", "text": "more"}]}]});
    let second = send(
        server.request(Method::POST, "/v1/chat/completions").header("x-session-id", "chat-1").json(&next),
    )
    .await;
    assert!(second.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    assert_eq!(second.header("keepwarm-source"), Some("hbm"));
    let stale = send(
        server
            .request(Method::POST, "/v1/chat/completions")
            .header("x-session-id", "chat-1")
            .header("if-match", "\"0000000000-1\"")
            .json(&ask(json!({}))),
    )
    .await;
    assert_eq!(stale.status, 412);
    for (extra, field) in [
        (json!({"n": 2}), "n"),
        (json!({"temperature": 9}), "temperature"),
        (json!({"stop": [""]}), "stop"),
        (json!({"tools": []}), "tools"),
    ] {
        let refused = server.post("/v1/chat/completions", &ask(extra)).await;
        assert_eq!(
            (refused.code().as_str(), refused.json()["field"].as_str()),
            ("invalid_field", Some(field))
        );
    }
    assert_eq!(
        server.post("/v1/chat/completions", &ask(json!({"model": "gpt-9"}))).await.code(),
        "unknown_model"
    );
    let plain = server
        .post(
            "/v1/completions",
            &json!({"model": "tiny", "prompt": "once upon", "max_tokens": 5, "temperature": 0}),
        )
        .await;
    assert_eq!(plain.json()["object"], "text_completion");
    server.stop().await;
}

/// A client that stops reading holds its own answer, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_disturbs_nobody() {
    let server = Server::start(None, Setup { pinned: 64 << 20, ..Setup::default() }).await;
    let path = server.session(&bytes_layout()).await;
    let part = format!("{path}/parts/b");
    assert_eq!(server.put(&part, pattern(1, 24 << 20)).await.status, 200);
    let address = server.url.trim_start_matches("http://").to_owned();
    let mut slow = TcpStream::connect(&address).await.unwrap();
    slow.write_all(format!("GET {part} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut first = [0; 1024];
    slow.read_exact(&mut first).await.unwrap();
    assert_eq!(server.get(&part).await.body.len(), 24 << 20, "others read the same bytes");
    assert_eq!(send(server.request(Method::DELETE, &path)).await.status, 200);
    let used = async |server: &Server| server.handle.used().await.1;
    assert!(used(&server).await >= Bytes(23 << 20), "its bytes stay while they are read");
    drop(slow);
    server.until("the memory is given back", async |server| used(server).await == Bytes::ZERO).await;
    server.stop().await;
}
