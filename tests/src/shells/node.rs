//! A node of the simulated network: the real one, with its disk in a temporary folder and its HTTP API behind a door
//! instead of a port.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::BodyExt;
use keepwarm_api::{ApiState, Credentials, router, serve_relayed};
use keepwarm_client::{Etag, NewSession, Session, WriteOptions, Written};
use keepwarm_config::{Bootstrap, Config, LocalCluster};
use keepwarm_engine::chat::NoModels;
use keepwarm_node::{Node, StartError};
use keepwarm_transport::certificate::Authority;
use keepwarm_types::{Bytes, NodeName, ShardCount};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt;
use uuid::Uuid;

use super::network::sockets;
use crate::chaos::clients::{Asked, Failed};

/// Requests that wait at a door.
const WAITING_MAX: usize = 64;
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the process before may keep its disk, in real time; then something else is wrong.
const DISK_MAX: Duration = Duration::from_secs(10);
/// How long a node that stops lets its requests finish.
const STOP: Duration = Duration::from_millis(100);
/// Ports of the peers' links begin above this.
const PORTS: u16 = 7000;
/// Shards of the cluster: a few for every node.
const SHARDS: u64 = 16;

/// A cluster's files, and the real time at which its simulation began.
#[derive(Debug)]
pub(super) struct Files {
    file: String,
    text: String,
    begun: std::time::Instant,
}

/// Where a node's links are.
pub(super) const fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, number as u8 + 1)
}

/// A node's name.
pub(super) fn name(number: usize) -> NodeName {
    format!("n{}", number + 1).parse().unwrap()
}

impl Files {
    /// Writes what `keepwarm init` would for nodes of the simulated network.
    pub(super) fn create(folder: &Path, nodes: u16) -> Self {
        let local = LocalCluster {
            hbm: Bytes(8 << 20),
            pinned: Bytes(16 << 20),
            ..LocalCluster::new("shells", nodes, PORTS, ShardCount::new(SHARDS).unwrap())
        };
        let mut text = local.render().unwrap();
        for node in 1..=nodes {
            let port = PORTS + 100 + node;
            let (here, there) =
                (format!("127.0.0.1:{port}"), format!("{}:{port}", address(node as usize - 1)));
            text = text.replace(&here, &there);
        }
        let file = folder.join("cluster.toml").display().to_string();
        let config = Config::parse(&file, &text).unwrap();
        std::fs::write(folder.join(Bootstrap::FILE), Bootstrap::new(&config).render()).unwrap();
        let certificates = folder.join("certs");
        std::fs::create_dir(&certificates).unwrap();
        let authority = Authority::generate(&config.name, 1).unwrap();
        std::fs::write(certificates.join("ca.pem"), authority.certificate()).unwrap();
        for node in &config.nodes {
            let issued = authority.issue(&node.name, 1).unwrap();
            std::fs::write(certificates.join(format!("{}.pem", node.name)), issued.certificate).unwrap();
            std::fs::write(certificates.join(format!("{}.key", node.name)), issued.key).unwrap();
        }
        Self { file, text, begun: std::time::Instant::now() }
    }

    /// A process that starts late begins at the simulation's time, not at the machine's.
    async fn keep_time(&self) {
        let passed = turmoil::sim_elapsed().unwrap_or_default();
        let should = self.begun + passed;
        let behind = should.saturating_duration_since(Instant::now().into_std());
        tokio::time::advance(behind).await;
    }

    /// A process of a node, from its start to its end: its crash, or that it asks for a new one in its place.
    pub(super) async fn run(self: Arc<Self>, number: usize, door: Arc<Door>) -> turmoil::Result {
        self.keep_time().await;
        let config = Config::parse(&self.file, &self.text)?;
        let credentials = Arc::new(Credentials::new(&config.tenants));
        let mut node = self.start(config, &name(number)).await?;
        let state = ApiState { handle: node.handle(), chat: Arc::new(NoModels), credentials };
        let app = router(state);
        if let Some(relays) = node.take_relays() {
            tokio::spawn(serve_relayed(relays, app.clone()));
        }
        let reason = tokio::select! {
            reason = node.failed() => reason,
            () = door.serve(app) => "the door was shut".to_owned(),
        };
        let again = node.superseded();
        node.shutdown(STOP).await;
        if again {
            door.anew.store(true, Ordering::SeqCst);
            return Ok(());
        }
        Err(reason.into())
    }

    async fn start(&self, config: Config, name: &NodeName) -> Result<Node, StartError> {
        let begun = std::time::Instant::now();
        loop {
            match Node::start_over(config.clone(), name, &sockets()).await {
                Err(StartError::Catalog(_)) if begun.elapsed() < DISK_MAX => {
                    sleep(Duration::from_millis(20)).await;
                }
                started => return started,
            }
        }
    }
}

/// An answer, read to its end.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

type Knock = (Request<Body>, oneshot::Sender<Result<Answer, String>>);

/// A node's HTTP API without a port: who knocks is answered by the process that runs now, if any.
#[derive(Debug)]
pub(super) struct Door {
    name: String,
    open: Mutex<Option<mpsc::Sender<Knock>>>,
    /// The process has ended, and wants another in its place.
    anew: AtomicBool,
}

impl Door {
    pub(super) fn new(number: usize) -> Arc<Self> {
        Arc::new(Self { name: name(number).to_string(), open: Mutex::default(), anew: AtomicBool::default() })
    }

    /// Whether a process must start in place of the one that has ended; told once.
    pub(super) fn wants_anew(&self) -> bool {
        self.anew.swap(false, Ordering::SeqCst)
    }

    async fn serve(&self, app: Router) {
        let (knocks, mut knocked) = mpsc::channel::<Knock>(WAITING_MAX);
        *self.open.lock().unwrap() = Some(knocks);
        while let Some((mut request, reply)) = knocked.recv().await {
            let app = app.clone();
            request.extensions_mut().insert(ConnectInfo(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))));
            tokio::spawn(async move {
                let response: Response<Body> =
                    app.oneshot(request).await.unwrap_or_else(|never| match never {});
                let (parts, body) = response.into_parts();
                let body = body.collect().await.map_err(|error| format!("the answer broke off: {error}"));
                let answer = body.map(|body| Answer {
                    status: parts.status,
                    headers: parts.headers,
                    body: body.to_bytes().to_vec(),
                });
                let _ = reply.send(answer);
            });
        }
    }

    async fn ask(&self, request: Request<Body>) -> Result<Answer, Failed> {
        let open = self.open.lock().unwrap().clone();
        let (reply, answer) = oneshot::channel();
        let sent = open.is_some_and(|open| open.try_send((request, reply)).is_ok());
        if !sent {
            return Err(Failed::NotSent("the node does not run".to_owned()));
        }
        let answer = match timeout(PATIENCE, answer).await {
            Ok(Ok(Ok(answer))) => answer,
            Ok(Ok(Err(broke))) => return Err(Failed::Unclear(broke)),
            Ok(Err(_)) => return Err(Failed::Unclear("the node crashed".to_owned())),
            Err(_) => return Err(Failed::Unclear(format!("no answer within {PATIENCE:?}"))),
        };
        if answer.status.is_success() {
            return Ok(answer);
        }
        let problem: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let member = |name: &str| problem[name].as_str().unwrap_or_default().to_owned();
        let text = format!("{} {}: {}", answer.status.as_u16(), member("code"), member("detail"));
        Err(Failed::Refused {
            status: answer.status.as_u16(),
            code: member("code"),
            cold_reason: member("cold_reason"),
            text,
        })
    }
}

fn document<T: DeserializeOwned>(answer: &Answer) -> Result<T, Failed> {
    serde_json::from_slice(&answer.body)
        .map_err(|error| Failed::Strange(format!("{error} in {}", String::from_utf8_lossy(&answer.body))))
}

fn strange(error: impl std::fmt::Display) -> Failed {
    Failed::Strange(error.to_string())
}

impl Asked for Arc<Door> {
    fn name(&self) -> &str {
        &self.name
    }

    async fn create(&self, new: &NewSession) -> Result<(Uuid, Etag), String> {
        let text = serde_json::to_vec(new).map_err(|error| error.to_string())?;
        let request = Request::post("/v1/sessions").header("content-type", "application/json");
        let request = request.body(Body::from(text)).map_err(|error| error.to_string())?;
        let answer = self.ask(request).await.map_err(|failed| format!("{failed:?}"))?;
        let made: Session = document(&answer).map_err(|failed| format!("{failed:?}"))?;
        let etag = made.etag().ok_or_else(|| format!("birth '{}' is none", made.birth))?;
        Ok((made.id, etag))
    }

    async fn part(&self, session: Uuid, part: &str) -> Result<(Etag, Vec<u8>), Failed> {
        let request = Request::get(format!("/v1/sessions/{session}/parts/{part}"));
        let answer = self.ask(request.body(Body::empty()).map_err(strange)?).await?;
        let etag = answer.headers.get("etag").and_then(|etag| etag.to_str().ok()?.parse().ok());
        let etag = etag.ok_or_else(|| Failed::Strange("a part without its revision".to_owned()))?;
        Ok((etag, answer.body))
    }

    async fn session(&self, session: Uuid) -> Result<Session, Failed> {
        let request = Request::get(format!("/v1/sessions/{session}"));
        document(&self.ask(request.body(Body::empty()).map_err(strange)?).await?)
    }

    async fn write(
        &self,
        session: Uuid,
        part: &str,
        at: Option<u64>,
        bytes: Vec<u8>,
        options: &WriteOptions,
    ) -> Result<Written, Failed> {
        let path = format!("/v1/sessions/{session}/parts/{part}");
        let mut request = match at {
            Some(offset) => Request::patch(format!("{path}?offset={offset}")),
            None => Request::put(path),
        };
        request = request.header("content-type", "application/octet-stream");
        if let Some(id) = options.write_id {
            request = request.header("keepwarm-write-id", id.to_string());
        }
        if let Some(etag) = options.if_match {
            request = request.header("if-match", etag.to_string());
        }
        document(&self.ask(request.body(Body::from(bytes)).map_err(strange)?).await?)
    }
}
