//! Those who use the cluster while it is under attack: a writer for each session, and readers of all through every node.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use keepwarm_client::{
    Client, ClientError, Etag, Form, Layout, NewSession, PartBody, PartLayout, State, WriteOptions, Written,
};
use keepwarm_types::{Durability, Revision};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::content::{CELL, Run, read, written};
use super::history::{History, Op, Outcome, Record};

/// How long a client waits for one node before it asks another.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two calls of a reader: some hundred a second by all of them.
const READER_PAUSE: Duration = Duration::from_millis(10);
/// After a call that was not answered well.
const PAUSE: Duration = Duration::from_millis(20);
/// The part that is written.
const PART: &str = "state";
/// Small blocks, so that one write changes several.
const BLOCK: u64 = 4096;
/// Most cells of one write: three blocks.
const WRITE_CELLS_MAX: u64 = 3 * BLOCK / CELL as u64;
/// Most cells of a part: ten blocks; what would be longer replaces it.
const PART_CELLS_MAX: u64 = 10 * BLOCK / CELL as u64;
/// Sendings of a write whose outcome is unclear, with its write id, before its writer looks instead.
const SENDINGS_MAX: u32 = 3;

/// What all clients share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) history: History,
    /// Names and clients of all nodes.
    pub(super) nodes: Vec<(String, Client)>,
    pub(super) stop: AtomicBool,
    /// Acknowledged writes of each session.
    pub(super) progress: Mutex<BTreeMap<Uuid, u64>>,
}

impl Shared {
    /// Clients for nodes by name and address.
    pub(super) fn new(nodes: &[(String, String)]) -> Result<Self, String> {
        let client = |(name, url): &(String, String)| {
            let client = Client::builder(url).deadline(PATIENCE).no_retries().build();
            client.map(|client| (name.clone(), client)).map_err(|error| error.to_string())
        };
        Ok(Self {
            history: History::default(),
            nodes: nodes.iter().map(client).collect::<Result<_, _>>()?,
            stop: AtomicBool::new(false),
            progress: Mutex::default(),
        })
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    pub(super) fn note(&self, client: &str, node: usize, session: Uuid, op: Op, asked: Asked) {
        let (begin, outcome) = asked;
        self.history.add(Record {
            client: client.to_owned(),
            node: self.nodes[node].0.clone(),
            session,
            op,
            begin,
            end: self.history.now(),
            outcome,
        });
    }

    /// Asks a node for a session's bytes.
    pub(super) async fn read(&self, client: &str, node: usize, session: Uuid) -> bool {
        let begin = self.history.now();
        let asked = async {
            let reader = self.nodes[node].1.part(session, PART).await?;
            let etag = reader.etag();
            Ok((etag, reader.bytes().await?))
        };
        let outcome = match timeout(PATIENCE, asked).await {
            Ok(Ok((Some(etag), bytes))) => match read(session, &bytes) {
                Ok(runs) => Outcome::Bytes { revision: etag.revision.0, runs },
                Err(reason) => Outcome::Broken(format!(
                    "revision {} has bytes that nobody wrote: {reason}",
                    etag.revision
                )),
            },
            Ok(Ok((None, _))) => Outcome::Broken("a part without its revision".to_owned()),
            Ok(Err(error)) => unread(&error),
            Err(_) => Outcome::Unknown(format!("no answer within {PATIENCE:?}")),
        };
        let answered = matches!(outcome, Outcome::Bytes { .. } | Outcome::Cold(_) | Outcome::Missing(_));
        self.note(client, node, session, Op::Read, (begin, outcome));
        answered
    }

    /// Asks a node for a session's state: revision, cells, and whether it is cold.
    pub(super) async fn look(&self, client: &str, node: usize, session: Uuid) -> Option<(u64, u64, bool)> {
        let begin = self.history.now();
        let (outcome, seen) = match self.nodes[node].1.session(session).await {
            Ok(found) => {
                let reason = || found.cold_reason.map_or_else(String::new, |reason| reason.word().to_owned());
                let cold = (found.state == State::Cold).then(reason);
                let cells = found.parts.get(PART).map_or(0, |part| part.length_bytes / CELL as u64);
                let (revision, is_cold) = (found.revision, cold.is_some());
                (Outcome::Seen { revision, cold }, Some((revision, cells, is_cold)))
            }
            Err(error) => (unread(&error), None),
        };
        self.note(client, node, session, Op::Look, (begin, outcome));
        seen
    }
}

/// When a call began, and what came of it.
type Asked = (Duration, Outcome);

/// What an error says about a read.
fn unread(error: &ClientError) -> Outcome {
    match error {
        ClientError::Refused(problem) => match (problem.status, problem.code.as_str()) {
            (410, "cold") => Outcome::Cold(problem.text("cold_reason").unwrap_or_default().to_owned()),
            // None of the sessions ever ends.
            (404 | 410, _) => Outcome::Missing(problem.to_string()),
            (429 | 503 | 504, _) => Outcome::Unknown(problem.to_string()),
            _ => Outcome::Broken(problem.to_string()),
        },
        ClientError::Transport { .. } | ClientError::Deadline { .. } | ClientError::Stalled { .. } => {
            Outcome::Unknown(error.to_string())
        }
        _ => Outcome::Broken(error.to_string()),
    }
}

const fn no(why: String) -> Outcome {
    Outcome::No { stale: false, why }
}

/// What an error says about a write.
fn unwritten(error: &ClientError) -> Outcome {
    match error {
        ClientError::Refused(problem) => match (problem.status, problem.code.as_str()) {
            (504, _) => Outcome::Unknown(problem.to_string()),
            (409, "offset_mismatch") | (412, _) => Outcome::No { stale: true, why: problem.to_string() },
            (409 | 429 | 503 | 507, _) | (410, "cold") => no(problem.to_string()),
            (404 | 410, _) => Outcome::Missing(problem.to_string()),
            _ => Outcome::Broken(problem.to_string()),
        },
        // It was never sent.
        ClientError::Transport { cause, .. } if cause.is_connect() => no(error.to_string()),
        ClientError::Transport { .. } | ClientError::Deadline { .. } | ClientError::Stalled { .. } => {
            Outcome::Unknown(error.to_string())
        }
        _ => Outcome::Broken(error.to_string()),
    }
}

/// Writes one session, revision after revision.
pub(super) struct Writer<'s> {
    name: String,
    shared: &'s Shared,
    session: Uuid,
    etag: Etag,
    cells: u64,
    cold: bool,
    /// Number of the next write.
    next: u64,
    rng: ChaCha8Rng,
}

impl<'s> Writer<'s> {
    /// Makes a session, before anything goes wrong.
    pub(super) async fn new(shared: &'s Shared, number: usize, rng: ChaCha8Rng) -> Result<Self, String> {
        let part = PartLayout { name: PART.to_owned(), form: Form::Bytes { block_bytes: Some(BLOCK) } };
        let layout = Layout { model: "m".to_owned(), fingerprint: "f".to_owned(), parts: vec![part] };
        let node = &shared.nodes[number % shared.nodes.len()].1;
        let made = node.create(&NewSession::new(layout)).await.map_err(|error| error.to_string())?;
        let etag = made.etag().ok_or_else(|| format!("birth '{}' is none", made.birth))?;
        let name = format!("writer {number}");
        let mut writer = Self { name, shared, session: made.id, etag, cells: 0, cold: true, next: 1, rng };
        shared.progress.lock().unwrap().insert(made.id, 0);
        while writer.cells == 0 {
            writer.write().await;
        }
        Ok(writer)
    }

    pub(super) const fn session(&self) -> Uuid {
        self.session
    }

    pub(super) async fn run(mut self) {
        while !self.shared.stopped() {
            self.write().await;
        }
    }

    async fn write(&mut self) {
        let run = Run { write: self.next, cells: self.rng.random_range(1..=WRITE_CELLS_MAX) };
        self.next += 1;
        let put = self.cold || self.cells + run.cells > PART_CELLS_MAX || self.rng.random_range(0..8) == 0;
        let base = self.etag.revision.0;
        let op = if put { Op::Put { base, run } } else { Op::Append { base, run } };
        let options = WriteOptions {
            write_id: Some(Uuid::from_u128(self.rng.random())),
            if_match: Some(self.etag),
            ..WriteOptions::default()
        };
        for _ in 0..SENDINGS_MAX {
            let outcome = self.send(&op, run, &options).await;
            match outcome {
                Outcome::Written { revision, .. } => {
                    self.etag.revision = Revision(revision);
                    self.cells = if put { run.cells } else { self.cells + run.cells };
                    self.cold = false;
                    *self.shared.progress.lock().unwrap().entry(self.session).or_default() += 1;
                    return;
                }
                // The same id again must give what the first sending made, or make it.
                Outcome::Unknown(_) if self.rng.random() => sleep(PAUSE).await,
                _ => break,
            }
        }
        self.settle().await;
    }

    async fn send(&mut self, op: &Op, run: Run, options: &WriteOptions) -> Outcome {
        let node = self.rng.random_range(0..self.shared.nodes.len());
        let client = &self.shared.nodes[node].1;
        let body = PartBody::from(written(self.session, run));
        let begin = self.shared.history.now();
        let answer = match op {
            Op::Put { .. } => client.put_part(self.session, PART, body, options).await,
            _ => client.append_part(self.session, PART, self.cells * CELL as u64, body, options).await,
        };
        let outcome = match answer {
            Ok(Written::Committed { revision, holders, durability, .. }) => {
                Outcome::Written { revision, holders, full: durability == Durability::Full }
            }
            Ok(Written::Staged { .. }) => {
                Outcome::Broken("a write without a transaction was staged".to_owned())
            }
            Err(error) => unwritten(&error),
        };
        self.shared.note(&self.name, node, self.session, op.clone(), (begin, outcome.clone()));
        outcome
    }

    /// Finds out where the session is.
    async fn settle(&mut self) {
        while !self.shared.stopped() {
            let node = self.rng.random_range(0..self.shared.nodes.len());
            if let Some((revision, cells, cold)) = self.shared.look(&self.name, node, self.session).await {
                (self.etag.revision, self.cells, self.cold) = (Revision(revision), cells, cold);
                return;
            }
            sleep(PAUSE).await;
        }
    }
}

/// Reads sessions through every node.
pub(super) async fn reader(shared: &Shared, number: usize, sessions: &[Uuid], mut rng: ChaCha8Rng) {
    let name = format!("reader {number}");
    while !shared.stopped() {
        let session = sessions[rng.random_range(0..sessions.len())];
        let node = rng.random_range(0..shared.nodes.len());
        if rng.random_range(0..4) == 0 {
            shared.look(&name, node, session).await;
        } else {
            shared.read(&name, node, session).await;
        }
        sleep(READER_PAUSE).await;
    }
}
