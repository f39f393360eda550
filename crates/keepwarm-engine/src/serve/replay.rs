//! Idempotency: a call that is sent again with its key gets the first one's turn, while that is under way
//! and once it has ended.
//!
//! A key is taken by the first call that brings it; what comes meanwhile waits for that call's answer. One
//! that fails, or whose reader goes away, gives the key back, and the next in line makes the turn. Kept in
//! memory, for the last answers; a restart forgets them.

use std::collections::HashMap;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::hash::{Hash, Hasher};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use keepwarm_types::TenantName;
use lru::LruCache;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::chat::{ChatError, ChatRequest, Finished, Prompt, Started};

/// Answers that are remembered: some KiB each.
const REPLAYS_MAX: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// Calls that wait for the first one with their key. A client that repeats a call has given the one before
/// up, so more than a few mean a loop.
const WAITING_MAX: usize = 16;
/// How long a call waits for the first one: some four default turns of 30 s.
const WAIT: Duration = Duration::from_secs(120);

type Key = (TenantName, String);

/// An answer that was given.
#[derive(Debug, Clone)]
pub(super) struct Replay {
    pub(super) started: Started,
    pub(super) text: String,
    pub(super) finished: Finished,
    asked: u64,
}

/// A turn under way.
#[derive(Debug)]
struct Running {
    asked: u64,
    /// Closed once the turn has ended, in whichever way.
    ended: watch::Receiver<()>,
    waiting: usize,
}

#[derive(Debug)]
struct Book {
    given: LruCache<Key, Replay>,
    running: HashMap<Key, Running>,
}

/// The last answers and those under way, by tenant and key.
#[derive(Debug)]
pub(super) struct Replays(Mutex<Book>);

impl Default for Replays {
    fn default() -> Self {
        Self(Mutex::new(Book { given: LruCache::new(REPLAYS_MAX), running: HashMap::new() }))
    }
}

/// A key, taken; given back on drop.
#[derive(Debug)]
pub(super) struct Claim {
    replays: Arc<Replays>,
    key: Key,
    asked: u64,
    /// Its drop tells those who wait.
    _ended: watch::Sender<()>,
}

/// What a call with a key is.
#[derive(Debug)]
pub(super) enum Call {
    /// The first one; none where it has no key.
    First(Option<Claim>),
    /// A repetition.
    Again(Box<Replay>),
}

impl Replays {
    /// Takes the call's key, or waits for the answer to the call that has it.
    ///
    /// # Errors
    /// [`ChatError::InvalidField`] where the key stands for another call, [`ChatError::Overloaded`] where too
    /// many wait or the first call takes too long.
    pub(super) async fn enter(self: &Arc<Self>, request: &ChatRequest) -> Result<Call, ChatError> {
        let Some(key) = &request.idempotency_key else { return Ok(Call::First(None)) };
        let (key, asked) = ((request.tenant.clone(), key.clone()), asked(request));
        let until = Instant::now() + WAIT;
        loop {
            let mut ended = match self.look(&key, asked)? {
                Ok(call) => return Ok(call),
                Err(ended) => ended,
            };
            let _waiting = Waiting { replays: self, key: &key };
            // Nothing is ever sent: it ends when the sender goes.
            if timeout_at(until, ended.changed()).await.is_err() {
                return Err(ChatError::Overloaded("for the first call with this Idempotency-Key"));
            }
        }
    }

    /// What the call is now; or what to wait for, having been counted among those who wait.
    fn look(self: &Arc<Self>, key: &Key, asked: u64) -> Result<Result<Call, watch::Receiver<()>>, ChatError> {
        let other_call = || ChatError::InvalidField {
            field: "Idempotency-Key".to_owned(),
            reason: "the key was used for another call".to_owned(),
        };
        let mut book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(replay) = book.given.get(key) {
            let same = replay.asked == asked;
            return if same { Ok(Ok(Call::Again(Box::new(replay.clone())))) } else { Err(other_call()) };
        }
        match book.running.entry(key.clone()) {
            Entry::Occupied(running) if running.get().asked != asked => Err(other_call()),
            Entry::Occupied(running) if running.get().waiting >= WAITING_MAX => {
                Err(ChatError::Overloaded("for the first call with this Idempotency-Key"))
            }
            Entry::Occupied(mut running) => {
                running.get_mut().waiting += 1;
                Ok(Err(running.get().ended.clone()))
            }
            Entry::Vacant(vacant) => {
                let (send, ended) = watch::channel(());
                vacant.insert(Running { asked, ended, waiting: 0 });
                let claim = Claim { replays: Arc::clone(self), key: key.clone(), asked, _ended: send };
                Ok(Ok(Call::First(Some(claim))))
            }
        }
    }
}

/// A call that waits, for as long as it does.
struct Waiting<'a> {
    replays: &'a Replays,
    key: &'a Key,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut book = self.replays.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = book.running.get_mut(self.key) {
            // The key may have changed hands since: whoever has it now counts its own.
            running.waiting = running.waiting.saturating_sub(1);
        }
    }
}

impl Claim {
    /// Remembers the answer for those who wait and those who come later.
    pub(super) fn keep(self, started: Started, text: String, finished: Finished) {
        let replay = Replay { started, text, finished, asked: self.asked };
        let mut book = self.replays.0.lock().unwrap_or_else(PoisonError::into_inner);
        book.given.put(self.key.clone(), replay);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut book = self.replays.0.lock().unwrap_or_else(PoisonError::into_inner);
        book.running.remove(&self.key);
    }
}

/// All that makes a call this one.
fn asked(request: &ChatRequest) -> u64 {
    let mut hasher = DefaultHasher::new();
    request.model.hash(&mut hasher);
    let etag =
        |session: crate::chat::SessionRef| session.if_match.map(|etag| (etag.birth.get(), etag.revision.0));
    request.session.map(|session| (session.id, etag(session))).hash(&mut hasher);
    match &request.prompt {
        Prompt::Text(text) => text.hash(&mut hasher),
        Prompt::Messages(messages) => {
            messages.len().hash(&mut hasher);
            messages.iter().for_each(|message| (&message.role, &message.content).hash(&mut hasher));
        }
    }
    (request.max_tokens, request.temperature.to_bits(), request.top_p.to_bits()).hash(&mut hasher);
    (request.seed, &request.stop).hash(&mut hasher);
    hasher.finish()
}
