//! Idempotency: a call that is sent again with its key gets its first answer.
//!
//! Kept in memory, for the last answers; a restart forgets them.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use keepwarm_types::TenantName;
use lru::LruCache;

use crate::chat::{ChatRequest, Finished, Prompt, Started};

/// Answers that are remembered: some KiB each.
const REPLAYS_MAX: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// An answer that was given.
#[derive(Debug, Clone)]
pub(super) struct Replay {
    pub(super) started: Started,
    pub(super) text: String,
    pub(super) finished: Finished,
    asked: u64,
}

/// The last answers, by tenant and key.
#[derive(Debug)]
pub(super) struct Replays(Mutex<LruCache<(TenantName, String), Replay>>);

impl Default for Replays {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(REPLAYS_MAX)))
    }
}

impl Replays {
    /// The first answer to this call; an error where the key stands for another call.
    pub(super) fn find(&self, request: &ChatRequest) -> Result<Option<Replay>, ()> {
        let Some(key) = &request.idempotency_key else { return Ok(None) };
        let mut replays = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match replays.get(&(request.tenant.clone(), key.clone())) {
            Some(replay) if replay.asked == asked(request) => Ok(Some(replay.clone())),
            Some(_) => Err(()),
            None => Ok(None),
        }
    }

    pub(super) fn keep(&self, request: &ChatRequest, started: Started, text: String, finished: Finished) {
        let Some(key) = &request.idempotency_key else { return };
        let replay = Replay { started, text, finished, asked: asked(request) };
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .put((request.tenant.clone(), key.clone()), replay);
    }
}

fn asked(request: &ChatRequest) -> u64 {
    let mut hasher = DefaultHasher::new();
    request.model.hash(&mut hasher);
    request.session.map(|session| session.id).hash(&mut hasher);
    match &request.prompt {
        Prompt::Text(text) => text.hash(&mut hasher),
        Prompt::Messages(messages) => {
            messages.iter().for_each(|message| (&message.role, &message.content).hash(&mut hasher))
        }
    }
    hasher.finish()
}
