//! Which node the client asks: three fakes that share one idea of who owns what, and can be killed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use keepwarm_client::Client;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use uuid::Uuid;

/// Longer than the client's own pauses on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// What the nodes have in common.
#[derive(Debug, Default)]
struct Shared {
    owner: usize,
    /// Takes connections and answers nothing, as a stopped process.
    stopped: Option<usize>,
    http: Vec<String>,
    /// Who was asked what, in order; with the token.
    asked: Vec<(usize, String, Option<String>)>,
}

/// A node with a runtime of its own, so that all its connections end when it is killed.
struct Node {
    runtime: Option<Runtime>,
    url: String,
}

impl Node {
    /// Ends it, and returns when its sockets are closed.
    fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_timeout(DEADLINE);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Cluster {
    shared: Arc<Mutex<Shared>>,
    nodes: Vec<Node>,
}

fn session(id: &str) -> Value {
    json!({"id": id, "birth": "0000000007", "layout": {"model": "m", "fingerprint": "f", "parts": []},
        "layout_hash": "x", "protect_s": 900.0, "ttl_s": null, "state": "cold", "generation": 1, "revision": 3,
        "length_tokens": 0, "owner": "n1", "home": null, "durability": "full", "lease": null,
        "last_write_id": null, "created_at": "2026-01-01T00:00:00Z", "last_used_at": "2026-01-01T00:00:00Z"})
}

async fn handle(State((me, shared)): State<(usize, Arc<Mutex<Shared>>)>, request: Request) -> Response {
    if shared.lock().unwrap().stopped == Some(me) {
        std::future::pending::<()>().await;
    }
    let mut shared = shared.lock().unwrap();
    let path = request.uri().path().to_owned();
    let token = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
    shared.asked.push((me, path.clone(), token));
    if path == "/v1/cluster/shards" {
        let name = |node: usize| format!("n{node}");
        let nodes: serde_json::Map<_, _> =
            shared.http.iter().enumerate().map(|(node, http)| (name(node), json!(http))).collect();
        let shards = json!([{"shard": 0, "generation": 1, "replicas": [name(shared.owner)]}]);
        return Response::new(json!({"shards": shards, "nodes": nodes}).to_string().into());
    }
    let mut answer = Response::builder().header("keepwarm-owner", format!("n{}", shared.owner));
    if me != shared.owner {
        answer = answer.header("keepwarm-relayed-by", format!("n{me}"));
    }
    answer.body(session(path.rsplit('/').next().unwrap()).to_string().into()).unwrap()
}

impl Cluster {
    fn start(nodes: usize, owner: usize) -> Self {
        let shared = Arc::new(Mutex::new(Shared { owner, ..Shared::default() }));
        let start = |me| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            let runtime = runtime.unwrap();
            let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
            let http = listener.local_addr().unwrap().to_string();
            let app = Router::new().fallback(handle).with_state((me, Arc::clone(&shared)));
            runtime.spawn(async move { axum::serve(listener, app).await });
            shared.lock().unwrap().http.push(http.clone());
            Node { runtime: Some(runtime), url: format!("http://{http}") }
        };
        let nodes = (0..nodes).map(start).collect();
        Self { shared, nodes }
    }

    fn asked(&self) -> Vec<(usize, String, Option<String>)> {
        self.shared.lock().unwrap().asked.clone()
    }

    /// Calls until a call goes to that node alone.
    async fn straight_to(&self, node: usize, client: &Client, id: Uuid) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let before = self.asked().len();
            client.session(id).await.unwrap();
            let about = |(_, path, _): &&(usize, String, Option<String>)| path.contains("/sessions/");
            let since: Vec<_> = self.asked()[before..].iter().filter(about).map(|(node, ..)| *node).collect();
            if since == [node] {
                return;
            }
            assert!(Instant::now() < deadline, "calls still go to {since:?}, not to {node}");
            tokio::task::yield_now().await;
        }
    }
}

#[test]
fn calls_go_straight_to_the_owner_and_on_to_the_next_when_it_dies() {
    let mut cluster = Cluster::start(3, 1);
    let runtime = Runtime::new().unwrap();
    let id = Uuid::now_v7();
    let client = Client::builder(&cluster.nodes[0].url).token(Some("secret".to_owned())).build().unwrap();
    runtime.block_on(async {
        client.session(id).await.unwrap();
        assert_eq!(cluster.asked()[0].0, 0, "the first call goes to the node that the client was made for");
        cluster.straight_to(1, &client, id).await;
    });
    cluster.nodes[1].kill();
    cluster.shared.lock().unwrap().owner = 2;
    runtime.block_on(cluster.straight_to(2, &client, id));
    cluster.nodes[0].kill();
    runtime.block_on(async {
        cluster.straight_to(2, &client, id).await;
        client.shards().await.expect("what any node can answer is asked of one that lives");
        let metrics = client.metrics().await;
        assert!(metrics.is_err(), "another node's metrics passed for those of the one that was asked");
    });
    let asked = cluster.asked();
    assert!(asked.iter().all(|(.., token)| token.as_deref() == Some("Bearer secret")), "{asked:?}");
}

#[test]
fn a_node_that_takes_the_call_and_never_answers_is_left_for_another() {
    let cluster = Cluster::start(3, 1);
    let id = Uuid::now_v7();
    let client =
        Client::builder(&cluster.nodes[0].url).patience(Duration::from_millis(300)).deadline(DEADLINE);
    let client = client.build().unwrap();
    Runtime::new().unwrap().block_on(async {
        cluster.straight_to(1, &client, id).await;
        {
            let mut shared = cluster.shared.lock().unwrap();
            (shared.stopped, shared.owner) = (Some(1), 2);
        }
        cluster.straight_to(2, &client, id).await;
        // Who is the only one that can be asked is waited for.
        let alone = Client::builder(&cluster.nodes[1].url).patience(Duration::from_millis(1));
        let alone = alone.fixed().deadline(Duration::from_millis(200)).build().unwrap();
        let waited = alone.session(id).await;
        assert!(matches!(waited, Err(keepwarm_client::ClientError::Deadline { .. })), "{waited:?}");
    });
}

#[test]
fn a_fixed_client_asks_one_address_whoever_owns() {
    let cluster = Cluster::start(2, 1);
    let client = Client::builder(&cluster.nodes[0].url).fixed().build().unwrap();
    Runtime::new().unwrap().block_on(async {
        for _ in 0..5 {
            client.session(Uuid::now_v7()).await.unwrap();
        }
    });
    let asked = cluster.asked();
    assert_eq!(asked.len(), 5);
    assert!(asked.iter().all(|(node, path, _)| *node == 0 && path.contains("/sessions/")), "{asked:?}");
}

#[test]
fn a_seed_is_asked_where_the_first_node_is_dead() {
    let mut cluster = Cluster::start(2, 1);
    cluster.nodes[0].kill();
    let client = Client::builder(&cluster.nodes[0].url).seed(&cluster.nodes[1].url).build().unwrap();
    let id = Uuid::now_v7();
    let found = Runtime::new().unwrap().block_on(client.session(id)).unwrap();
    assert_eq!(found.id, id);
    assert_eq!(cluster.asked()[0].0, 1);
}
