//! Making, finding, cutting, forking and ending sessions.

use std::collections::{BTreeMap, VecDeque};

use futures::stream::{self, Stream};
use reqwest::Method;
use serde_json::json;
use uuid::Uuid;

use crate::calls::parts::WriteOptions;
use crate::client::Client;
use crate::error::ClientError;
use crate::session::{NewSession, Session, SessionPage};
use crate::verbs::{Deleted, Explanation, Fork, Length, Match, Transcript, Verdict};

/// Sessions of one page of [`Client::sessions`]: the most that a server gives.
const PAGE: u32 = 1000;

/// Which sessions to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SessionFilter {
    /// Only sessions with all of these labels.
    pub labels: BTreeMap<String, String>,
}

/// What a listing still has to give.
struct Listing {
    client: Client,
    filter: SessionFilter,
    ready: VecDeque<Result<Session, ClientError>>,
    next: Option<Option<String>>,
}

/// A session along with what became of the verb that made or cut it.
#[derive(Debug, serde::Deserialize)]
struct Changed {
    #[serde(flatten)]
    verdict: Verdict,
    #[serde(flatten)]
    session: Session,
}

impl Client {
    /// Makes a session, or confirms the same one: sending a request again is safe, since the id is in it.
    ///
    /// # Errors
    /// [`ClientError`]; `conflict` for the id of another session.
    pub async fn create(&self, session: &NewSession) -> Result<Session, ClientError> {
        let call = self.call(Method::POST, &["v1", "sessions"]).about(session.id);
        call.json(session)?.repeatable().answer().await
    }

    /// A session.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn session(&self, id: Uuid) -> Result<Session, ClientError> {
        self.on_session(Method::GET, id, &[]).answer().await
    }

    /// A session by its name: a UUID, or the text that chat calls were bound to.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn session_named(&self, name: &str) -> Result<Session, ClientError> {
        self.call(Method::GET, &["v1", "sessions", name]).answer().await
    }

    /// One page of sessions, from `cursor` on, at most `limit` (1 to 1,000).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn session_page(
        &self,
        filter: &SessionFilter,
        cursor: Option<&str>,
        limit: u32,
    ) -> Result<SessionPage, ClientError> {
        let mut call = self.call(Method::GET, &["v1", "sessions"]).query("limit", limit);
        if let Some(cursor) = cursor {
            call = call.query("cursor", cursor);
        }
        for (name, value) in &filter.labels {
            call = call.query(&format!("label.{name}"), value);
        }
        call.answer().await
    }

    /// All sessions, page after page, in the order of their ids. A page that some shards did not answer for
    /// is followed by [`ClientError::Incomplete`], and the listing goes on; any other error ends it.
    pub fn sessions(
        &self,
        filter: SessionFilter,
    ) -> impl Stream<Item = Result<Session, ClientError>> + Send + use<> {
        let listing = Listing { client: self.clone(), filter, ready: VecDeque::new(), next: Some(None) };
        stream::unfold(listing, |mut listing| async move {
            loop {
                if let Some(item) = listing.ready.pop_front() {
                    return Some((item, listing));
                }
                let cursor = listing.next.take()?;
                match listing.client.session_page(&listing.filter, cursor.as_deref(), PAGE).await {
                    Ok(page) => {
                        listing.next = page.next_cursor.map(Some);
                        listing.ready.extend(page.sessions.into_iter().map(Ok));
                        if !page.incomplete.is_empty() {
                            listing.ready.push_back(Err(ClientError::Incomplete(page.incomplete)));
                        }
                    }
                    Err(error) => return Some((Err(error), listing)),
                }
            }
        })
    }

    /// The token ids and messages, warm or cold.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn transcript(&self, id: Uuid) -> Result<Transcript, ClientError> {
        self.on_session(Method::GET, id, &["transcript"]).answer().await
    }

    /// How many leading tokens of `tokens` the session has.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn matching(&self, id: Uuid, tokens: &[u32]) -> Result<Match, ClientError> {
        let call = self.on_session(Method::POST, id, &["match"]).json(&json!({"tokens": tokens}))?;
        call.repeatable().answer().await
    }

    /// Cuts a session short. The write id and preconditions of `options` are sent along.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn truncate(
        &self,
        id: Uuid,
        length: Length,
        options: &WriteOptions,
    ) -> Result<(Verdict, Session), ClientError> {
        let call = self.on_session(Method::POST, id, &["truncate"]).json(&length)?;
        let changed: Changed = options.apply(call)?.answer().await?;
        Ok((changed.verdict, changed.session))
    }

    /// Begins another session as a prefix of this one, sharing its memory.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn fork(&self, id: Uuid, fork: &Fork) -> Result<(Verdict, Session), ClientError> {
        let minted = Fork { id: Some(fork.id.unwrap_or_else(|| child_id(id))), ..fork.clone() };
        let call = self.on_session(Method::POST, id, &["fork"]).json(&minted)?;
        let changed: Changed = call.answer().await?;
        Ok((changed.verdict, changed.session))
    }

    /// Where a session's bytes are and how they came there.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn explain(&self, id: Uuid) -> Result<Explanation, ClientError> {
        self.on_session(Method::GET, id, &["explain"]).answer().await
    }

    /// Ends a session: its memory is given back, and zeroed before another tenant's use.
    ///
    /// # Errors
    /// [`ClientError`]; `deleted` where that was done before.
    pub async fn delete(&self, id: Uuid) -> Result<Deleted, ClientError> {
        self.on_session(Method::DELETE, id, &[]).answer().await
    }
}

/// An id in the shard of `parent`: shards are told by the top bits of an id's last 16, so all 16 are kept.
fn child_id(parent: Uuid) -> Uuid {
    let low = 0xffff_u128;
    Uuid::from_u128((Uuid::now_v7().as_u128() & !low) | (parent.as_u128() & low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_lies_in_its_parents_shard() {
        let parent = Uuid::now_v7();
        let (one, two) = (child_id(parent), child_id(parent));
        assert_ne!(one, two);
        assert_eq!(one.as_bytes()[14..], parent.as_bytes()[14..]);
        assert_eq!(one.get_version_num(), 7);
    }
}
