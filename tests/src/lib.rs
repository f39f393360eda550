//! What the whole-system tests share: a real node behind a real listener, and a client that reads answers.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test that cannot go on fails")]

pub mod chaos;
pub mod cluster_sim;
pub mod shells;
pub mod sim;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use keepwarm_api::{ApiState, Credentials, router, serve};
use keepwarm_config::{BatchConfig, Config, ModelConfig, SingleNode, TenantConfig};
use keepwarm_engine::serve::Service;
use keepwarm_node::{Handle, Node};
use keepwarm_test_devices::gpus;
use keepwarm_types::Bytes;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Longest wait for anything.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// How to start a server.
#[derive(Debug, Clone)]
pub struct Setup {
    pub pinned: u64,
    pub hbm: u64,
    pub tenants: Vec<TenantConfig>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { pinned: 64 << 20, hbm: 16 << 20, tenants: Vec::new() }
    }
}

/// A node behind its HTTP API, on a free port of loopback.
#[derive(Debug)]
pub struct Server {
    pub url: String,
    pub handle: Handle,
    pub client: reqwest::Client,
    node: Option<Node>,
    stop: Option<oneshot::Sender<()>>,
    served: Option<JoinHandle<()>>,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// Sends a request and reads the answer.
pub async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.expect("the server answers");
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Answer { status, headers, body: response.bytes().await.expect("the body ends well").to_vec() }
}

impl Server {
    pub async fn start(folder: Option<&Path>, setup: Setup) -> Self {
        let model = ModelConfig {
            name: "tiny".to_owned(),
            source: "tiny:5".to_owned(),
            instances: (1, 1),
            batch: BatchConfig::default(),
        };
        let mut config = Config::single(SingleNode {
            name: "n1".parse().unwrap(),
            http: "127.0.0.1:0".to_owned(),
            gpus: gpus(Bytes(setup.hbm), 2),
            pinned: Bytes(setup.pinned),
            data_dir: folder.map(Path::to_owned),
            models: vec![model.clone()],
        });
        config.tenants = setup.tenants;
        let credentials = Arc::new(Credentials::new(&config.tenants));
        let node = Node::start(config, &"n1".parse().unwrap()).await.unwrap();
        let handle = node.handle();
        let chat = Arc::new(Service::start(&handle, &[model]).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let app = router(ApiState { handle: handle.clone(), chat, credentials });
        let served = tokio::spawn(async move {
            serve(listener, app, async { drop(stopped.await) }, Duration::from_secs(10)).await.unwrap();
        });
        Self {
            url,
            handle,
            client: reqwest::Client::new(),
            node: Some(node),
            stop: Some(stop),
            served: Some(served),
        }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    pub async fn get(&self, path: &str) -> Answer {
        send(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        send(self.request(Method::POST, path).json(body)).await
    }

    pub async fn put(&self, path: &str, body: Vec<u8>) -> Answer {
        send(self.request(Method::PUT, path).body(body)).await
    }

    pub async fn patch(&self, path: &str, body: Vec<u8>) -> Answer {
        send(self.request(Method::PATCH, path).body(body)).await
    }

    /// Makes a session of one part and gives its path.
    pub async fn session(&self, layout: &Value) -> String {
        let made = self.post("/v1/sessions", &json!({"layout": layout})).await;
        assert_eq!(made.status, 201, "{:?}", made.json());
        format!("/v1/sessions/{}", made.json()["id"].as_str().unwrap())
    }

    /// Waits for a condition, with a deadline.
    pub async fn until(&self, what: &str, mut condition: impl AsyncFnMut(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self).await {
            assert!(Instant::now() < deadline, "never: {what}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Stops the node, while its HTTP goes on.
    pub async fn drain(&mut self) {
        if let Some(node) = self.node.take() {
            node.shutdown(DEADLINE).await;
        }
    }

    pub async fn stop(mut self) {
        drop(self.stop.take());
        if let Some(served) = self.served.take() {
            served.await.unwrap();
        }
        if let Some(node) = self.node.take() {
            let report = node.shutdown(DEADLINE).await;
            assert_eq!((report.unfinished, report.checkpoints), (0, 0));
        }
    }
}

/// A layout of one untyped part.
pub fn bytes_layout() -> Value {
    json!({"model": "m", "fingerprint": "f", "parts": [{"name": "b", "form": "bytes", "block_bytes": 65536}]})
}

/// A layout of one token-ordered part of 64 bytes a token.
pub fn paged_layout() -> Value {
    let part = json!({"name": "kv", "form": "paged", "tokens_per_block": 16, "planes": 4, "plane_bytes_per_token": 16, "order": "token"});
    json!({"model": "m", "fingerprint": "f", "parts": [part]})
}
