//! A session's conversation: calls on it queue, and a history that leaves the stored one forks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use keepwarm_core::session::{Etag, Message};
use keepwarm_node::{SessionInfo, TranscriptInfo};
use keepwarm_types::SessionKey;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::chat::{ChatError, ChatMessage};

/// Calls that wait for one conversation.
const WAITING_MAX: usize = 16;

#[derive(Debug)]
struct Gate {
    semaphore: Arc<Semaphore>,
    inside: usize,
}

/// Lets one call at a time through to each conversation.
#[derive(Debug, Default)]
pub(super) struct Gates(Mutex<HashMap<SessionKey, Gate>>);

/// The right to work on a conversation; given back on drop.
#[derive(Debug)]
pub(super) struct Pass {
    gates: Arc<Gates>,
    key: SessionKey,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Pass {
    fn drop(&mut self) {
        drop(self.permit.take());
        let mut gates = self.gates.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gate) = gates.get_mut(&self.key) {
            gate.inside -= 1;
            if gate.inside == 0 {
                gates.remove(&self.key);
            }
        }
    }
}

impl Gates {
    /// Waits for the conversation's turn.
    pub(super) async fn enter(self: &Arc<Self>, key: &SessionKey) -> Result<Pass, ChatError> {
        let semaphore = {
            let mut gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let fresh = || Gate { semaphore: Arc::new(Semaphore::new(1)), inside: 0 };
            let gate = gates.entry(key.clone()).or_insert_with(fresh);
            if gate.inside > WAITING_MAX {
                return Err(ChatError::Overloaded("on this conversation"));
            }
            gate.inside += 1;
            Arc::clone(&gate.semaphore)
        };
        let mut pass = Pass { gates: Arc::clone(self), key: key.clone(), permit: None };
        pass.permit = semaphore.acquire_owned().await.ok();
        Ok(pass)
    }
}

/// How many leading messages a stored conversation and a history share.
pub(super) fn shared_messages(stored: &[Message], history: &[ChatMessage]) -> usize {
    let same = |(stored, given): &(&Message, &ChatMessage)| {
        stored.role == given.role && stored.content == given.content
    };
    stored.iter().zip(history).take_while(same).count()
}

/// A stored conversation that a call may continue.
pub(super) struct Stored {
    pub(super) info: SessionInfo,
    pub(super) transcript: TranscriptInfo,
}

impl Stored {
    /// Whether a tag names the transcript as it is now: state that was committed behind it changes nothing.
    pub(super) fn is_at(&self, etag: Etag) -> bool {
        let manifest = &self.info.manifest;
        etag.birth == manifest.birth
            && (manifest.transcript_revision..=manifest.revision).contains(&etag.revision)
    }

    /// Tokens up to the end of the first `messages` messages.
    pub(super) fn tokens_of(&self, messages: usize) -> usize {
        match messages {
            0 => 0,
            count => self.transcript.messages[count - 1].tokens_end.as_usize(),
        }
    }
}
