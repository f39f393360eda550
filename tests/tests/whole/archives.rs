//! Archives that are damaged anywhere: refused, with nothing left behind.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use keepwarm_tests::{Server, Setup, paged_layout, send};
use keepwarm_types::Bytes;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reqwest::Method;
use serde_json::json;

const CASES: u64 = 400;

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_archive_is_refused_and_leaves_nothing() {
    let server = Server::start(None, Setup::default()).await;
    let path = server.session(&paged_layout()).await;
    let body: Vec<u8> = (0..64 * 40).map(|n| (n * 7) as u8).collect();
    assert_eq!(server.patch(&format!("{path}/parts/kv?offset=0"), body).await.status, 200);
    let archive = server.get(&format!("{path}/export")).await.body;
    assert_eq!(send(server.request(Method::DELETE, &path)).await.status, 200);
    for seed in 0..CASES {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut broken = archive.clone();
        match rng.random_range(0..3) {
            0 => broken.truncate(rng.random_range(0..archive.len())),
            1 => broken.extend((0..rng.random_range(1..64)).map(|_| rng.random::<u8>())),
            _ => {
                // Most of an archive is blocks; its header is where a byte can mean anything.
                let end = if rng.random() { archive.len().min(900) } else { archive.len() };
                let at = rng.random_range(0..end);
                broken[at] ^= 1 << rng.random_range(0..8);
            }
        }
        let id = uuid::Uuid::new_v4();
        let import = server.request(Method::POST, &format!("/v1/sessions/import?id={id}"));
        let answer = send(import.body(broken)).await;
        let code = answer.code();
        let refused = matches!(code.as_str(), "invalid_field" | "corrupt" | "conflict" | "incomplete");
        assert!(refused, "seed {seed}: {} {code}: {:?}", answer.status, answer.json());
        assert_eq!(server.get(&format!("/v1/sessions/{id}")).await.status, 404, "seed {seed}");
    }
    server
        .until("all memory is given back", async |server| server.handle.used().await.1 == Bytes::ZERO)
        .await;
    assert_eq!(server.get("/v1/sessions").await.json()["sessions"], json!([]));
    server.stop().await;
}
