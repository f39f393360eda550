//! The client against a hand-made server that answers what each test says, and remembers what it was asked.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::response::Response;
use futures::{StreamExt, TryStreamExt};
use keepwarm_client::{
    ChatCall, ChatPiece, ChatRequest, Client, ClientError, ColdForm, Form, Layout, NewSession, PartBody,
    PartLayout, Placement, Selection, SessionFilter, WriteOptions,
};
use keepwarm_types::{Outcome, Source};
use serde_json::{Value, json};
use uuid::Uuid;

/// What the server was asked.
#[derive(Debug, Clone)]
struct Asked {
    line: String,
    headers: HeaderMap,
    body: Bytes,
}

enum Answer {
    Response(Box<Response>),
    /// The connection is cut without a word.
    Cut,
    /// Nothing comes for longer than any deadline here.
    Silence,
}

#[derive(Default)]
struct Script {
    answers: VecDeque<Answer>,
    asked: Vec<Asked>,
}

#[derive(Clone)]
struct Fake {
    script: Arc<Mutex<Script>>,
    url: String,
}

async fn handle(State(script): State<Arc<Mutex<Script>>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let answer = {
        let mut script = script.lock().unwrap();
        script.asked.push(Asked {
            line: format!("{} {}", parts.method, parts.uri),
            headers: parts.headers,
            body,
        });
        script.answers.pop_front().expect("the server was asked more often than the test expects")
    };
    match answer {
        Answer::Response(response) => *response,
        Answer::Cut => {
            // A body that fails before its first byte makes the server drop the connection.
            let broken = futures::stream::iter([Err::<Bytes, _>(std::io::Error::other("cut"))]);
            Response::builder().header("content-length", "10").body(Body::from_stream(broken)).unwrap()
        }
        Answer::Silence => std::future::pending().await,
    }
}

impl Fake {
    async fn start(answers: impl IntoIterator<Item = Answer>) -> Self {
        let script =
            Arc::new(Mutex::new(Script { answers: answers.into_iter().collect(), asked: Vec::new() }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().fallback(handle).with_state(Arc::clone(&script));
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { script, url }
    }

    fn client(&self) -> Client {
        Client::new(&self.url).unwrap()
    }

    fn asked(&self) -> Vec<Asked> {
        self.script.lock().unwrap().asked.clone()
    }
}

fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Answer {
    let builder = headers
        .iter()
        .fold(Response::builder().status(status), |builder, (name, value)| builder.header(*name, *value));
    Answer::Response(Box::new(builder.body(body.into()).unwrap()))
}

fn ok(body: Value) -> Answer {
    answer(200, &[], body.to_string())
}

fn refused(status: u16, code: &str, retry_after: Option<&str>) -> Answer {
    let body = json!({"status": status, "code": code, "detail": "no", "request_id": "r"}).to_string();
    let headers: Vec<_> = retry_after.map(|seconds| ("retry-after", seconds)).into_iter().collect();
    answer(status, &headers, body)
}

fn layout() -> Layout {
    let form = Form::Bytes { block_bytes: None };
    Layout {
        model: "m".into(),
        fingerprint: "f".into(),
        parts: vec![PartLayout { name: "state".into(), form, cold: None }],
    }
}

fn session(id: Uuid) -> Value {
    json!({"id": id, "birth": "0000000007", "layout": layout(), "layout_hash": "x", "protect_s": 900.0, "ttl_s": null,
           "state": "cold", "cold_reason": "restarted", "generation": 1, "revision": 3, "length_tokens": 0,
           "parts": {"state": {"length_bytes": 5, "blocks": 1}}, "tiers": {"hbm": 0, "pinned": 0, "peer": 0},
           "owner": "n1", "home": {"node": "n1", "gpus": [1]}, "durability": "full", "lease": null,
           "last_write_id": null, "created_at": "2026-01-01T00:00:00Z", "last_used_at": "2026-01-01T00:00:00Z"})
}

fn written() -> Value {
    json!({"revision": 1, "generation": 1, "birth": "0000000007", "length_tokens": 0, "length_bytes": 4,
           "holders": ["n1"], "durability": "full"})
}

#[tokio::test]
async fn a_write_keeps_its_id_over_its_retries() {
    let fake = Fake::start([
        refused(503, "unavailable", Some("0")),
        Answer::Cut,
        refused(504, "outcome_unknown", None),
        ok(written()),
    ])
    .await;
    let body = PartBody::from(b"data".to_vec());
    let done = fake.client().put_part(Uuid::now_v7(), "state", body, &WriteOptions::default()).await.unwrap();
    assert_eq!(done.revision(), Some(1));
    let asked = fake.asked();
    assert_eq!(asked.len(), 4);
    let id = &asked[0].headers["keepwarm-write-id"];
    assert!(asked.iter().all(|one| one.headers["keepwarm-write-id"] == *id && one.body == "data"));
    assert!(asked[0].headers["repr-digest"].to_str().unwrap().starts_with("xxh3-128=:"));
}

#[tokio::test]
async fn a_call_that_might_act_twice_is_sent_again_only_where_it_did_nothing() {
    let activation = json!({"outcome": "accepted", "reason": "", "lease": {"id": Uuid::now_v7(), "epoch": 1,
        "expires_at": "2026-01-01T00:00:00Z"}, "home": {"node": "n1", "gpus": [0]}, "source": "pinned",
        "bytes_moved": 30, "duration_ms": 1.5});
    let fake = Fake::start([refused(429, "overloaded", Some("0")), ok(activation), Answer::Cut]).await;
    let client = fake.client();
    let activated = client.activate(Uuid::now_v7(), &Placement::default(), Some(500)).await.unwrap();
    assert_eq!((activated.verdict.outcome, activated.source), (Outcome::Accepted, Source::Pinned));
    assert_eq!(fake.asked()[1].body, r#"{"ttl_ms":500}"#);
    let lost = client.activate(Uuid::now_v7(), &Placement::default(), None).await;
    assert!(matches!(lost, Err(ClientError::Transport { .. })), "{lost:?}");
    assert_eq!(fake.asked().len(), 3);
}

#[tokio::test]
async fn a_body_that_can_be_had_once_is_sent_once() {
    let fake = Fake::start([refused(503, "unavailable", Some("0"))]).await;
    let body = PartBody::once(Some(4), futures::stream::iter([Ok(Bytes::from_static(b"data"))]));
    let error =
        fake.client().put_part(Uuid::now_v7(), "state", body, &WriteOptions::default()).await.unwrap_err();
    assert_eq!(error.code(), Some("unavailable"));
    let again = Fake::start([refused(503, "unavailable", Some("0")), ok(written())]).await;
    let body = PartBody::repeatable(4, || {
        futures::stream::iter([Ok(Bytes::from_static(b"da")), Ok(Bytes::from_static(b"ta"))])
    });
    again.client().append_part(Uuid::now_v7(), "state", 0, body, &WriteOptions::default()).await.unwrap();
    assert_eq!(again.asked()[1].body, "data");
    assert!(again.asked()[1].line.ends_with("/parts/state?offset=0"));
}

#[tokio::test]
async fn definite_refusals_and_far_retries_come_back_at_once() {
    let fake = Fake::start([
        refused(409, "leased", None),
        refused(503, "draining", Some("3600")),
        refused(507, "no_capacity", Some("0")),
    ])
    .await;
    let client = fake.client();
    for code in ["leased", "draining", "no_capacity"] {
        let begun = Instant::now();
        assert_eq!(client.session(Uuid::now_v7()).await.unwrap_err().code(), Some(code));
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
    assert_eq!(fake.asked().len(), 3);
}

#[tokio::test]
async fn no_call_outlasts_its_deadline() {
    let fake = Fake::start([Answer::Silence]).await;
    let client = Client::builder(&fake.url).deadline(Duration::from_millis(200)).build().unwrap();
    assert!(matches!(client.session(Uuid::now_v7()).await, Err(ClientError::Deadline { .. })));
    let nobody = Client::builder("http://127.0.0.1:1").deadline(Duration::from_secs(5)).build().unwrap();
    let error = nobody.session(Uuid::now_v7()).await.unwrap_err();
    assert!(matches!(error, ClientError::Transport { .. }) && error.is_unavailable());
}

#[tokio::test]
async fn creates_bring_their_id_and_the_token() {
    let new = NewSession::new(layout());
    let fake = Fake::start([Answer::Cut, ok(session(new.id))]).await;
    let client = Client::builder(&fake.url).token(Some("secret".to_owned())).build().unwrap();
    let made = client.create(&new).await.unwrap();
    assert_eq!((made.id, made.etag().unwrap().to_string()), (new.id, "\"0000000007-3\"".to_owned()));
    for asked in fake.asked() {
        let body: Value = serde_json::from_slice(&asked.body).unwrap();
        assert_eq!(body["id"], json!(new.id));
        assert_eq!(asked.headers["authorization"], "Bearer secret");
    }
}

#[tokio::test]
async fn bytes_that_do_not_have_their_digest_are_an_error() {
    let good = "xxh3-128=:maoG0wFHmNhgAcMkRo1Jfw==:";
    let fake = Fake::start([
        answer(200, &[("repr-digest", good), ("etag", "\"0000000007-2\"")], ""),
        answer(200, &[("repr-digest", good)], "other"),
        answer(206, &[("repr-digest", good)], "part"),
    ])
    .await;
    let client = fake.client();
    let reader = client.part(Uuid::now_v7(), "state").await.unwrap();
    assert_eq!(reader.etag().unwrap().revision.0, 2);
    assert_eq!(reader.bytes().await.unwrap(), "");
    let wrong = client.part(Uuid::now_v7(), "state").await.unwrap().bytes().await;
    assert!(matches!(wrong, Err(ClientError::Digest { .. })), "{wrong:?}");
    let some = Selection { bytes: Some((2, 6)), ..Selection::default() };
    assert_eq!(
        client.part_range(Uuid::now_v7(), "state", some).await.unwrap().bytes().await.unwrap(),
        "part"
    );
    assert_eq!(fake.asked()[2].headers["range"], "bytes=2-5");
    let empty = Selection { bytes: Some((2, 2)), ..Selection::default() };
    assert!(matches!(client.part_range(Uuid::now_v7(), "state", empty).await, Err(ClientError::Usage(_))));
}

#[tokio::test]
async fn listings_follow_the_pages_and_name_what_is_missing() {
    let ids: Vec<_> = (0..3).map(|_| Uuid::now_v7()).collect();
    let page = |ids: &[Uuid], next: Option<&str>, incomplete: &[u32]| {
        let sessions: Vec<_> = ids.iter().map(|id| session(*id)).collect();
        ok(json!({"sessions": sessions, "next_cursor": next, "incomplete": incomplete}))
    };
    let fake = Fake::start([page(&ids[..2], Some("c1"), &[7]), page(&ids[2..], None, &[])]).await;
    let filter = SessionFilter { labels: [("user".to_owned(), "42".to_owned())].into() };
    let items: Vec<_> = fake.client().sessions(filter).collect().await;
    let kinds: Vec<_> = items.iter().map(|item| item.as_ref().ok().map(|session| session.id)).collect();
    assert_eq!(kinds, [Some(ids[0]), Some(ids[1]), None, Some(ids[2])]);
    assert!(matches!(&items[2], Err(ClientError::Incomplete(shards)) if shards == &[7]));
    let asked = fake.asked();
    assert_eq!(asked[0].line, "GET /v1/sessions?limit=1000&label.user=42");
    assert_eq!(asked[1].line, "GET /v1/sessions?limit=1000&cursor=c1&label.user=42");
}

const STREAM: &str = concat!(
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n: keep-alive\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hel\"}}]}\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"lo\"}}]}\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}],\"keepwarm\":{\"session\":\"s\",",
    "\"etag\":\"0000000007-5\",\"source\":\"hbm\",\"diverged_at\":null,\"ttft_ms\":2.5,\"uncached\":false}}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2,\"total_tokens\":11,",
    "\"prompt_tokens_details\":{\"cached_tokens\":8}}}\n\ndata: [DONE]\n\n"
);

#[tokio::test]
async fn a_streamed_answer_comes_in_pieces_with_its_figures_at_the_end() {
    let head = [("keepwarm-source", "pinned"), ("keepwarm-session", "s"), ("keepwarm-diverged-at", "4")];
    let fake = Fake::start([answer(200, &head, STREAM), answer(200, &[], &STREAM[..300])]).await;
    let client = fake.client();
    let request = ChatRequest { model: "m".to_owned(), max_tokens: Some(5), ..ChatRequest::default() };
    let binding =
        ChatCall { session: Some("s".to_owned()), cold: Some(ColdForm::Fp8), ..ChatCall::default() };
    let answer = client.chat_stream(&request, &binding).await.unwrap();
    assert_eq!((answer.head().source, answer.head().diverged_at), (Some(Source::Pinned), Some(4)));
    let pieces: Vec<_> = answer.into_stream().try_collect().await.unwrap();
    let [ChatPiece::Text(one), ChatPiece::Text(two), ChatPiece::End(end)] = &pieces[..] else {
        panic!("{pieces:?}");
    };
    assert_eq!((one.as_str(), two.as_str(), end.finish_reason.as_str()), ("Hel", "lo", "stop"));
    assert_eq!((end.usage.prompt_tokens_details.cached_tokens, end.etag.unwrap().revision.0), (8, 5));
    assert_eq!(fake.asked()[0].headers["x-session-id"], "s");
    assert_eq!(fake.asked()[0].headers["keepwarm-cold"], "fp8");
    let torn: Result<Vec<_>, _> =
        client.chat_stream(&request, &binding).await.unwrap().into_stream().try_collect().await;
    assert!(matches!(torn, Err(ClientError::BrokenOff(_))), "{torn:?}");
}

#[tokio::test]
async fn a_stream_that_fails_says_why() {
    let failed = "data: {\"status\":500,\"code\":\"internal\",\"error\":{\"message\":\"the model failed\"}}\n\ndata: [DONE]\n\n";
    let fake = Fake::start([answer(200, &[], failed)]).await;
    let mut stream = fake.client().chat_stream(&ChatRequest::default(), &ChatCall::default()).await.unwrap();
    let error = stream.next_piece().await.unwrap_err();
    assert!(matches!(&error, ClientError::BrokenOff(why) if why == "the model failed"), "{error:?}");
    assert_eq!(stream.next_piece().await.unwrap(), None);
}

#[tokio::test]
async fn a_node_that_is_not_ready_is_an_answer() {
    let body = json!({"ready": false, "reasons": ["every GPU is fenced"]}).to_string();
    let fake = Fake::start([answer(503, &[("retry-after", "1")], body), ok(json!({"ready": true}))]).await;
    let readiness = fake.client().ready(true).await.unwrap();
    assert_eq!(
        (readiness.ready, readiness.reasons.as_slice()),
        (false, &["every GPU is fenced".to_owned()][..])
    );
    assert!(fake.client().ready(false).await.unwrap().ready);
}
