//! The binary as a process: killed at any moment, stopped in order, misused; and a terminal chat that resumes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keepwarm_client::{Client, Commit, Form, Layout, NewSession, Order, PartBody, PartLayout, WriteOptions};
use tokio::task::JoinSet;
use uuid::Uuid;

/// Longest wait for anything.
const DEADLINE: Duration = Duration::from_secs(30);
const WRITERS: usize = 4;
/// Kills; each after another number of acknowledgements.
const KILLS: usize = 8;

fn keepwarm() -> Command {
    Command::new(env!("CARGO_BIN_EXE_keepwarm"))
}

/// A server that ends with the test.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(folder: &Path, more: &[&str]) -> Self {
        let mut child = keepwarm()
            .args([
                "serve",
                "--http",
                "127.0.0.1:0",
                "--gpu",
                "host=16MiB",
                "--pinned",
                "32MiB",
                "--data-dir",
            ])
            .arg(folder)
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address =
            line.trim().strip_prefix("ready http=").expect("a ready line").split(' ').next().unwrap();
        Self { child, url: format!("http://{address}") }
    }

    fn client(&self) -> Client {
        Client::new(&self.url).unwrap()
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &id]).status().unwrap().success());
    }

    fn ended(&mut self) -> i32 {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(begun.elapsed() < DEADLINE, "the server did not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn layout() -> Layout {
    let form = Form::Paged { tokens_per_block: 16, planes: 2, plane_bytes_per_token: 8, order: Order::Token };
    Layout {
        model: "m".to_owned(),
        fingerprint: "f".to_owned(),
        parts: vec![PartLayout { name: "kv".to_owned(), form, cold: None }],
    }
}

/// What a writer was told about a session.
#[derive(Debug, Clone, Copy, Default)]
struct Told {
    /// Its transcript has the tokens below this.
    tokens: u32,
    /// It was deleted; or its deletion was asked for.
    deleted: bool,
    deleting: bool,
}

type Book = Arc<Mutex<BTreeMap<Uuid, Told>>>;

/// Makes sessions, commits one token after another to each, and deletes every other one.
async fn write(client: Client, book: Book) {
    let told = |id, change: &dyn Fn(&mut Told)| change(book.lock().unwrap().entry(id).or_default());
    for nth in 0u32.. {
        let session = NewSession::new(layout());
        let id = session.id;
        if client.create(&session).await.is_err() {
            return;
        }
        told(id, &|_| ());
        for token in 0..6 {
            let txn = Uuid::now_v7();
            let body = PartBody::from(vec![token as u8; 16]);
            if client.append_part(id, "kv", token.into(), body, &WriteOptions::staged(txn)).await.is_err() {
                return;
            }
            let commit = Commit {
                txn,
                length_tokens: u64::from(token) + 1,
                tokens: Some(vec![token]),
                messages: None,
                if_revision: None,
            };
            if client.commit(id, &commit, &WriteOptions::default()).await.is_err() {
                return;
            }
            told(id, &|told| told.tokens = token + 1);
        }
        if nth % 2 == 1 {
            told(id, &|told| told.deleting = true);
            if client.delete(id).await.is_err() {
                return;
            }
            told(id, &|told| told.deleted = true);
        }
    }
}

async fn verify(client: &Client, book: &Book) {
    let book = book.lock().unwrap().clone();
    for (id, told) in book {
        match client.transcript(id).await {
            Ok(transcript) => {
                assert!(!told.deleted, "{id} was deleted and is back");
                let tokens: Vec<u32> = (0..transcript.tokens.len() as u32).collect();
                assert_eq!(transcript.tokens, tokens, "{id}");
                let have = tokens.len() as u32;
                // A commit that was not answered may have been made.
                assert!(told.tokens <= have && have <= told.tokens + 1, "{id}: {told:?}, has {have}");
            }
            Err(error) => {
                assert!(told.deleting && error.code() == Some("deleted"), "{id}: {told:?}, now {error}");
            }
        }
    }
}

//= GUARANTEES.md#G1
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_it_keeps_what_it_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let book = Book::default();
    for kill in 0..KILLS {
        let server = Server::start(folder.path(), &[]);
        verify(&server.client(), &book).await;
        let mut writers = JoinSet::new();
        for _ in 0..WRITERS {
            writers.spawn(write(server.client(), Arc::clone(&book)));
        }
        let acknowledged =
            || book.lock().unwrap().values().map(|told| u64::from(told.tokens) + 1).sum::<u64>();
        let (begun, until) = (Instant::now(), acknowledged() + 40 + 37 * kill as u64);
        while acknowledged() < until {
            assert!(begun.elapsed() < DEADLINE, "the writers got stuck");
            tokio::task::yield_now().await;
        }
        server.signal("KILL");
        drop(server);
        writers.shutdown().await;
    }
    let server = Server::start(folder.path(), &[]);
    verify(&server.client(), &book).await;
    assert!(book.lock().unwrap().values().any(|told| told.deleted), "nothing was deleted");
}

/// Sends a request and gives what has come back of its answer once `seen` is in it.
fn ask(server: &Server, request: &str, seen: &str) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let (mut text, mut buffer) = (String::new(), [0; 4096]);
    while !text.contains(seen) {
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "no '{seen}' in {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    (stream, text)
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_a_streamed_answer_end_whole() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(folder.path(), &["--model", "tiny:1"]);
    let session = NewSession::new(layout());
    server.client().create(&session).await.unwrap();
    let body = r#"{"model": "tiny-random", "messages": [{"role": "user", "content": "At length."}],
                   "max_tokens": 3000, "stream": true}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Session-ID: long\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (mut stream, mut text) = ask(&server, &request, "\"content\":");
    server.signal("TERM");
    assert!(!text.contains("[DONE]"), "the answer was over before the signal: {text}");
    // The server ends the connection with the answer.
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("\"finish_reason\":\"") && text.contains("[DONE]"), "{text}");
    assert_eq!(server.ended(), 0);
    let again = Server::start(folder.path(), &["--model", "tiny:1"]);
    assert_eq!(again.client().session(session.id).await.unwrap().id, session.id);
}

#[test]
fn sigterm_counts_what_it_cut() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(folder.path(), &["--stop-grace", "1"]);
    // A body that never comes: the server has said that it waits for it.
    let request = "POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
                   Content-Length: 100\r\nExpect: 100-continue\r\n\r\n";
    let (stream, _) = ask(&server, request, "100 Continue");
    server.signal("TERM");
    assert_eq!(server.ended(), 1, "an exit code that says that something was cut");
    drop(stream);
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn misuse_is_told_with_an_exit_code_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &[]);
    let address = server.url.trim_start_matches("http://").to_owned();
    let text = "version = 1\n[cluster]\nname = \"c\"\nreplicaton = 1\n";
    let config = folder.path().join("cluster.toml");
    std::fs::write(&config, text).unwrap();
    let short = folder.path().join("short.gguf");
    std::fs::write(&short, b"GGUF\x03\0\0\0").unwrap();
    let (config, short) = (config.display().to_string(), short.display().to_string());
    let data = folder.path().join("data").display().to_string();
    let cases: [(&[&str], i32, &[&str]); 7] = [
        (&["serve", "--ephemeral", "--http", &address], 69, &["in use"]),
        (&["serve", "--http", "127.0.0.1:0", "--data-dir", &data], 69, &["in use"]),
        (&["serve", "--config", &config], 78, &["cluster.toml:4", "replicaton", "replication"]),
        (&["check", &config], 78, &["cluster.toml:4", "replication"]),
        (&["serve", "--ephemeral", "--http", "127.0.0.1:0", "--model", &short], 78, &["short.gguf"]),
        (
            &["serve", "--ephemeral", "--http", "127.0.0.1:0", "--gpu", "host=0"],
            78,
            &["gpu[0].memory", "at least"],
        ),
        (&["status", "--url", "http://127.0.0.1:1"], 69, &["127.0.0.1:1"]),
    ];
    for (arguments, code, words) in cases {
        let output = keepwarm().args(arguments).output().unwrap();
        let said = said(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{arguments:?} does not say '{word}': {said}");
        }
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn a_chat_resumes_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let chat = |server: &Server, line: &str| {
        let mut child = keepwarm()
            .args(["chat", "--url", &server.url, "--session", "my chat", "--max-tokens", "4", "--json"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(line.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let server = Server::start(folder.path(), &["--model", "tiny:1"]);
    let first = chat(&server, "Hello there.\n");
    let again = chat(&server, "And then?\n");
    assert_eq!(again["session"], first["session"], "the history went on in the same session");
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0, "{again}");
    let shown =
        keepwarm().args(["sessions", "show", "my chat", "--json", "--url", &server.url]).output().unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["id"], first["session"], "the name names it everywhere");
    drop(server);
    let server = Server::start(folder.path(), &["--model", "tiny:1"]);
    let later = chat(&server, "And now?\n");
    assert_eq!((&later["session"], &later["source"]), (&first["session"], &serde_json::json!("none")));
}

#[test]
fn the_demo_passes_its_own_checks() {
    let output = keepwarm().args(["demo", "--exit", "--model", "tiny:1"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", said(&output));
    assert_eq!(text.matches("check: ok").count(), 8, "{text}");
    assert_eq!(text.matches("first answer of a survivor").count(), 2, "{text}");
    assert!(text.contains("random weights"), "it says that the weights are random");
}
