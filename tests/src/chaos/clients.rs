//! Those who use the cluster while it is under attack: a writer for each session, and readers of all through every node.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use keepwarm_client::{
    Client, ClientError, Etag, Form, Layout, NewSession, PartBody, PartLayout, Session, State, WriteOptions,
    Written,
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

/// A node as its clients see it.
pub(crate) trait Asked {
    fn name(&self) -> &str;

    /// Makes a session.
    async fn create(&self, new: &NewSession) -> Result<(Uuid, Etag), String>;

    /// The part's bytes, with the revision that they are of.
    async fn part(&self, session: Uuid, part: &str) -> Result<(Etag, Vec<u8>), Failed>;

    async fn session(&self, session: Uuid) -> Result<Session, Failed>;

    /// Continues the part where an offset is given, else replaces it.
    async fn write(
        &self,
        session: Uuid,
        part: &str,
        at: Option<u64>,
        bytes: Vec<u8>,
        options: &WriteOptions,
    ) -> Result<Written, Failed>;
}

/// Why a call did not give what it was for.
#[derive(Debug)]
pub(crate) enum Failed {
    /// The node said no.
    Refused { status: u16, code: String, cold_reason: String, text: String },
    /// It was never sent.
    NotSent(String),
    /// Nobody answered.
    Unclear(String),
    /// The answer is none.
    Strange(String),
}

impl From<ClientError> for Failed {
    fn from(error: ClientError) -> Self {
        let text = error.to_string();
        match error {
            ClientError::Refused(problem) => Self::Refused {
                status: problem.status,
                cold_reason: problem.text("cold_reason").unwrap_or_default().to_owned(),
                code: problem.code,
                text,
            },
            ClientError::Transport { cause, .. } if cause.is_connect() => Self::NotSent(text),
            ClientError::Transport { .. } | ClientError::Deadline { .. } | ClientError::Stalled { .. } => {
                Self::Unclear(text)
            }
            _ => Self::Strange(text),
        }
    }
}

/// A node process, over HTTP.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    pub(super) client: Client,
}

impl Process {
    pub(super) fn new(name: &str, url: &str) -> Result<Self, String> {
        let client = Client::builder(url).deadline(PATIENCE).no_retries().fixed().build();
        let client = client.map_err(|error| error.to_string())?;
        Ok(Self { name: name.to_owned(), client })
    }
}

impl Asked for Process {
    fn name(&self) -> &str {
        &self.name
    }

    async fn create(&self, new: &NewSession) -> Result<(Uuid, Etag), String> {
        let made = self.client.create(new).await.map_err(|error| error.to_string())?;
        let etag = made.etag().ok_or_else(|| format!("birth '{}' is none", made.birth))?;
        Ok((made.id, etag))
    }

    async fn part(&self, session: Uuid, part: &str) -> Result<(Etag, Vec<u8>), Failed> {
        let reader = self.client.part(session, part).await?;
        let etag = reader.etag().ok_or_else(|| Failed::Strange("a part without its revision".to_owned()))?;
        Ok((etag, reader.bytes().await?.to_vec()))
    }

    async fn session(&self, session: Uuid) -> Result<Session, Failed> {
        Ok(self.client.session(session).await?)
    }

    async fn write(
        &self,
        session: Uuid,
        part: &str,
        at: Option<u64>,
        bytes: Vec<u8>,
        options: &WriteOptions,
    ) -> Result<Written, Failed> {
        let body = PartBody::from(bytes);
        Ok(match at {
            Some(offset) => self.client.append_part(session, part, offset, body, options).await?,
            None => self.client.put_part(session, part, body, options).await?,
        })
    }
}

/// What all clients share.
#[derive(Debug)]
pub(crate) struct Shared<N> {
    pub(crate) history: History,
    pub(crate) nodes: Vec<N>,
    pub(crate) stop: AtomicBool,
    /// Acknowledged writes of each session.
    pub(crate) progress: Mutex<BTreeMap<Uuid, u64>>,
}

impl<N: Asked> Shared<N> {
    pub(crate) fn new(nodes: Vec<N>, history: History) -> Self {
        Self { history, nodes, stop: AtomicBool::new(false), progress: Mutex::default() }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn note(&self, client: &str, node: usize, session: Uuid, op: Op, asked: Asking) {
        let (begin, outcome) = asked;
        self.history.add(Record {
            client: client.to_owned(),
            node: self.nodes[node].name().to_owned(),
            session,
            op,
            begin,
            end: self.history.now(),
            outcome,
        });
    }

    /// Asks a node for a session's bytes.
    pub(crate) async fn read(&self, client: &str, node: usize, session: Uuid) -> bool {
        let begin = self.history.now();
        let outcome = match timeout(PATIENCE, self.nodes[node].part(session, PART)).await {
            Ok(Ok((etag, bytes))) => match read(session, &bytes) {
                Ok(runs) => Outcome::Bytes { revision: etag.revision.0, runs },
                Err(reason) => Outcome::Broken(format!(
                    "revision {} has bytes that nobody wrote: {reason}",
                    etag.revision
                )),
            },
            Ok(Err(failed)) => unread(failed),
            Err(_) => Outcome::Unknown(format!("no answer within {PATIENCE:?}")),
        };
        let answered = matches!(outcome, Outcome::Bytes { .. } | Outcome::Cold(_) | Outcome::Missing(_));
        self.note(client, node, session, Op::Read, (begin, outcome));
        answered
    }

    /// Asks a node for a session's state: revision, cells, and whether it is cold.
    pub(crate) async fn look(&self, client: &str, node: usize, session: Uuid) -> Option<(u64, u64, bool)> {
        let begin = self.history.now();
        let (outcome, seen) = match self.nodes[node].session(session).await {
            Ok(found) => {
                let reason = || found.cold_reason.map_or_else(String::new, |reason| reason.word().to_owned());
                let cold = (found.state == State::Cold).then(reason);
                let cells = found.parts.get(PART).map_or(0, |part| part.length_bytes / CELL as u64);
                let (revision, is_cold) = (found.revision, cold.is_some());
                (Outcome::Seen { revision, cold }, Some((revision, cells, is_cold)))
            }
            Err(failed) => (unread(failed), None),
        };
        self.note(client, node, session, Op::Look, (begin, outcome));
        seen
    }
}

/// When a call began, and what came of it.
type Asking = (Duration, Outcome);

/// What a failure says about a read.
fn unread(failed: Failed) -> Outcome {
    match failed {
        Failed::Refused { status, code, cold_reason, text } => match (status, code.as_str()) {
            (410, "cold") => Outcome::Cold(cold_reason),
            // None of the sessions ever ends.
            (404 | 410, _) => Outcome::Missing(text),
            (429 | 503 | 504, _) => Outcome::Unknown(text),
            _ => Outcome::Broken(text),
        },
        Failed::NotSent(text) | Failed::Unclear(text) => Outcome::Unknown(text),
        Failed::Strange(text) => Outcome::Broken(text),
    }
}

/// What a failure says about a write.
fn unwritten(failed: Failed) -> Outcome {
    let no = |why| Outcome::No { stale: false, why };
    match failed {
        Failed::Refused { status, code, text, .. } => match (status, code.as_str()) {
            (504, _) => Outcome::Unknown(text),
            (409, "offset_mismatch") | (412, _) => Outcome::No { stale: true, why: text },
            (409 | 429 | 503 | 507, _) | (410, "cold") => no(text),
            (404 | 410, _) => Outcome::Missing(text),
            _ => Outcome::Broken(text),
        },
        Failed::NotSent(text) => no(text),
        Failed::Unclear(text) => Outcome::Unknown(text),
        Failed::Strange(text) => Outcome::Broken(text),
    }
}

/// Writes one session, revision after revision.
pub(crate) struct Writer<'s, N> {
    name: String,
    shared: &'s Shared<N>,
    session: Uuid,
    etag: Etag,
    cells: u64,
    cold: bool,
    /// Number of the next write.
    next: u64,
    rng: ChaCha8Rng,
}

impl<'s, N: Asked> Writer<'s, N> {
    /// Makes a session, before anything goes wrong.
    pub(crate) async fn new(shared: &'s Shared<N>, number: usize, rng: ChaCha8Rng) -> Result<Self, String> {
        let part =
            PartLayout { name: PART.to_owned(), form: Form::Bytes { block_bytes: Some(BLOCK) }, cold: None };
        let layout = Layout { model: "m".to_owned(), fingerprint: "f".to_owned(), parts: vec![part] };
        let node = &shared.nodes[number % shared.nodes.len()];
        let (session, etag) = node.create(&NewSession::new(layout)).await?;
        let name = format!("writer {number}");
        let mut writer = Self { name, shared, session, etag, cells: 0, cold: true, next: 1, rng };
        shared.progress.lock().unwrap().insert(session, 0);
        while writer.cells == 0 {
            writer.write().await;
        }
        Ok(writer)
    }

    pub(crate) const fn session(&self) -> Uuid {
        self.session
    }

    pub(crate) async fn run(mut self) {
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
        let asked = &self.shared.nodes[node];
        let at = matches!(op, Op::Append { .. }).then_some(self.cells * CELL as u64);
        let begin = self.shared.history.now();
        let bytes = written(self.session, run);
        let outcome = match asked.write(self.session, PART, at, bytes, options).await {
            Ok(Written::Committed { revision, holders, durability, .. }) => {
                Outcome::Written { revision, holders, full: durability == Durability::Full }
            }
            Ok(Written::Staged { .. }) => {
                Outcome::Broken("a write without a transaction was staged".to_owned())
            }
            Err(failed) => unwritten(failed),
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
pub(crate) async fn reader<N: Asked>(
    shared: &Shared<N>,
    number: usize,
    sessions: &[Uuid],
    mut rng: ChaCha8Rng,
) {
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
