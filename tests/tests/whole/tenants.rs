//! Tenants: strangers to each other, each within its quotas.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use keepwarm_config::TenantConfig;
use keepwarm_tests::{Server, Setup, bytes_layout, send};
use keepwarm_types::Bytes;
use reqwest::Method;
use serde_json::json;
use sha2::{Digest, Sha256};

fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 31 + seed * 101) as u8).collect()
}

//= GUARANTEES.md#G4
#[tokio::test(flavor = "multi_thread")]
async fn two_tenants_with_one_id_never_learn_of_each_other() {
    let tenant = |name: &str, admin| TenantConfig {
        name: name.parse().unwrap(),
        token_sha256: Sha256::digest(format!("token-{name}")).into(),
        admin,
        share: 1.0,
        sessions_max: 2,
        forever_bytes_max: Bytes(0),
    };
    let server = Server::start(
        None,
        Setup { tenants: vec![tenant("a", true), tenant("b", false)], ..Setup::default() },
    )
    .await;
    let as_tenant = |name: &str, method: Method, path: &str| {
        server.request(method, path).bearer_auth(format!("token-{name}"))
    };
    let id = uuid::Uuid::new_v4().to_string();
    let (path, body) = (format!("/v1/sessions/{id}"), json!({"layout": bytes_layout(), "id": id}));
    assert_eq!(server.get(&path).await.status, 401);
    assert_eq!(
        send(server.request(Method::GET, &path).bearer_auth("token-c")).await.code(),
        "unauthenticated"
    );
    assert_eq!(send(as_tenant("a", Method::POST, "/v1/sessions").json(&body)).await.status, 201);
    let part = format!("{path}/parts/b");
    send(as_tenant("a", Method::PUT, &part).body(pattern(1, 100))).await;
    let (absent, other) =
        (send(as_tenant("b", Method::GET, &path)).await, send(as_tenant("b", Method::GET, &part)).await);
    assert_eq!((absent.code().as_str(), other.code().as_str()), ("unknown_session", "unknown_session"));
    assert_eq!(send(as_tenant("b", Method::POST, "/v1/sessions").json(&body)).await.status, 201);
    send(as_tenant("b", Method::PUT, &part).body(pattern(2, 200))).await;
    assert_eq!(send(as_tenant("a", Method::GET, &part)).await.body, pattern(1, 100));
    assert_eq!(send(as_tenant("b", Method::GET, &part)).await.body, pattern(2, 200));
    assert_eq!(send(as_tenant("b", Method::POST, "/v1/tenants/a/purge")).await.code(), "forbidden");
    let second = json!({"layout": bytes_layout()});
    assert_eq!(send(as_tenant("b", Method::POST, "/v1/sessions").json(&second)).await.status, 201);
    assert_eq!(
        send(as_tenant("b", Method::POST, "/v1/sessions").json(&second)).await.code(),
        "quota_exceeded"
    );
    let forever = json!({"layout": bytes_layout(), "protect_s": "forever"});
    assert_eq!(
        send(as_tenant("a", Method::POST, "/v1/sessions").json(&forever)).await.code(),
        "invalid_field"
    );
    let purged = send(as_tenant("a", Method::POST, "/v1/tenants/b/purge")).await.json();
    assert_eq!(purged["receipts"].as_array().unwrap().len(), 2);
    assert_eq!(send(as_tenant("b", Method::GET, &path)).await.code(), "deleted");
    assert_eq!(send(as_tenant("a", Method::GET, &part)).await.body, pattern(1, 100));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_kept_for_ever_have_a_quota() {
    let tenant = TenantConfig {
        name: "a".parse().unwrap(),
        token_sha256: Sha256::digest("token").into(),
        admin: false,
        share: 1.0,
        sessions_max: 10,
        forever_bytes_max: Bytes(100 << 10),
    };
    let server = Server::start(None, Setup { tenants: vec![tenant], ..Setup::default() }).await;
    let ask = |method: Method, path: &str| server.request(method, path).bearer_auth("token");
    let mut paths = Vec::new();
    for _ in 0..2 {
        let body = json!({"layout": bytes_layout(), "protect_s": "forever"});
        let made = send(ask(Method::POST, "/v1/sessions").json(&body)).await;
        assert_eq!(made.status, 201, "{:?}", made.json());
        paths.push(format!("/v1/sessions/{}", made.json()["id"].as_str().unwrap()));
    }
    let put = async |path: &str| {
        send(ask(Method::PUT, &format!("{path}/parts/b")).body(pattern(1, 60 << 10))).await
    };
    assert_eq!(put(&paths[0]).await.status, 200);
    let refused = put(&paths[1]).await;
    assert_eq!((refused.status, refused.code().as_str()), (429, "quota_exceeded"), "{:?}", refused.json());
    assert_eq!(send(ask(Method::DELETE, &paths[0])).await.status, 200);
    assert_eq!(put(&paths[1]).await.status, 200, "what ended counts no more");
    server.stop().await;
}
