//! What a call continues: the stored conversation, a branch of it, or a new one.

use std::sync::Arc;

use keepwarm_core::session::{Labels, Layout, Message, PROTECT_DEFAULT, Protect};
use keepwarm_core::shard::Refusal;
use keepwarm_node::{CreateRequest, Error, ForkRequest};
use keepwarm_types::{SessionKey, Tokens};

use super::branch::{Stored, shared_messages};
use super::turn::{Inner, Served};
use crate::chat::{ChatError, ChatMessage, Cold, Prompt, SessionRef};

/// What a call continues, and from where.
pub(super) struct Plan {
    pub(super) key: SessionKey,
    pub(super) tokens: Vec<u32>,
    /// Tokens of the stored transcript that stay.
    pub(super) keep_tokens: usize,
    pub(super) keep_messages: usize,
    /// New messages of the history, with their ends in `tokens`.
    pub(super) messages: Vec<Message>,
    pub(super) diverged_at: Option<Tokens>,
    pub(super) conversation: bool,
}

fn text_error(error: impl std::fmt::Display) -> ChatError {
    ChatError::InvalidField { field: "messages".to_owned(), reason: error.to_string() }
}

/// The layout of a session that a call makes.
fn new_layout(served: &Served, cold: Option<Cold>) -> Result<Arc<Layout>, ChatError> {
    match cold {
        None | Some(Cold::Exact) => Ok(Arc::clone(&served.layout)),
        Some(Cold::Fp8) => served.lossy.as_ref().map(Arc::clone).ok_or_else(|| ChatError::InvalidField {
            field: "Keepwarm-Cold".to_owned(),
            reason: "the model's blocks are too small to gain by fp8: leave it out".to_owned(),
        }),
    }
}

/// Whether a stored session's state is this model's, and kept as the call says.
fn check_layout(served: &Served, layout: &Layout, cold: Option<Cold>) -> Result<(), ChatError> {
    let is = |served: &Arc<Layout>| served.hash() == layout.hash();
    let stored = if is(&served.layout) {
        Cold::Exact
    } else if served.lossy.as_ref().is_some_and(is) {
        Cold::Fp8
    } else {
        return Err(Error::Refused(Refusal::LayoutMismatch).into());
    };
    match cold.filter(|asked| *asked != stored) {
        None => Ok(()),
        Some(asked) => {
            let (asked, stored) = (asked.word(), stored.word());
            let why = format!("Keepwarm-Cold says {asked}, and the session is {stored} for its whole life");
            Err(Error::Refused(Refusal::Conflict(why)).into())
        }
    }
}

impl Inner {
    /// A call without a session: its tokens.
    pub(super) fn plain(&self, served: &Served, prompt: &Prompt) -> Result<Vec<u32>, ChatError> {
        let tokenizer = served.model.tokenizer();
        let tokens = match prompt {
            Prompt::Messages(messages) => tokenizer.render(messages).map_err(text_error)?.tokens,
            Prompt::Text(text) => tokenizer.encode(text).map_err(text_error)?,
        };
        if tokens.is_empty() {
            return Err(ChatError::InvalidField {
                field: "prompt".to_owned(),
                reason: "has no tokens".to_owned(),
            });
        }
        Ok(tokens)
    }

    async fn stored(&self, key: &SessionKey) -> Result<Stored, Error> {
        let (info, transcript) = self.handle.transcript(key).await?;
        Ok(Stored { info, transcript })
    }

    /// The session, made if it is new, and its branches.
    async fn family(
        &self,
        served: &Served,
        key: &SessionKey,
        cold: Option<Cold>,
    ) -> Result<Vec<Stored>, ChatError> {
        let root = match self.stored(key).await {
            Err(Error::Refused(Refusal::UnknownSession | Refusal::Expired { .. })) => {
                let request = CreateRequest {
                    id: Some(key.id),
                    layout: new_layout(served, cold)?,
                    protect: Protect::For(PROTECT_DEFAULT),
                    ttl: None,
                    labels: Labels::new(),
                    near: None,
                };
                self.handle.create(&key.tenant, request).await?;
                self.stored(key).await?
            }
            other => other?,
        };
        check_layout(served, &root.info.manifest.layout, cold)?;
        let mut family = vec![root];
        for branch in family[0].info.manifest.branches.clone() {
            // A branch that has ended since is no candidate.
            if let Ok(stored) = self.stored(&SessionKey::new(key.tenant.clone(), branch)).await {
                family.push(stored);
            }
        }
        Ok(family)
    }

    /// Compares a call with what is stored, forking where it leaves that.
    pub(super) async fn plan(
        &self,
        served: &Served,
        key: &SessionKey,
        prompt: &Prompt,
        session: &SessionRef,
    ) -> Result<Plan, ChatError> {
        let mut family = self.family(served, key, session.cold).await?;
        let history: Vec<ChatMessage> = match (prompt, session.if_match) {
            (Prompt::Text(text), _) => return self.plan_text(served, family, text).await,
            (Prompt::Messages(messages), None) => messages.clone(),
            (Prompt::Messages(messages), Some(etag)) => {
                let at = family.iter().position(|stored| stored.is_at(etag));
                let Some(at) = at else {
                    let manifest = &family[0].info.manifest;
                    let refusal = Refusal::RevisionMismatch {
                        birth: manifest.birth,
                        revision: manifest.revision,
                        length_tokens: manifest.length_tokens,
                        last_write_id: manifest.writes.last().map(|memo| memo.id),
                    };
                    return Err(Error::Refused(refusal).into());
                };
                family.swap(0, at);
                family.truncate(1);
                let before = family[0].transcript.messages.iter();
                let before = before.map(|message| ChatMessage {
                    role: message.role.clone(),
                    content: message.content.clone(),
                });
                before.chain(messages.iter().cloned()).collect()
            }
        };
        let shared = |stored: &Stored| shared_messages(&stored.transcript.messages, &history);
        let whole = |stored: &Stored| shared(stored) == stored.transcript.messages.len();
        let best = (0..family.len())
            .max_by_key(|at| (shared(&family[*at]), whole(&family[*at]), std::cmp::Reverse(*at)));
        let stored = family.swap_remove(best.unwrap_or(0));
        let common = shared(&stored);
        if common == history.len() && whole(&stored) {
            let reason = "the history ends where the stored one does: there is nothing to answer".to_owned();
            return Err(ChatError::InvalidField { field: "messages".to_owned(), reason });
        }
        let keep = stored.tokens_of(common);
        let rendered = served.model.tokenizer().render_after(&history, common).map_err(text_error)?;
        let messages = history[common..].iter().zip(&rendered.ends).map(|(message, end)| Message {
            role: message.role.clone(),
            content: message.content.clone(),
            tokens_end: Tokens((keep + end) as u64),
        });
        let messages = messages.collect();
        let leaves = !whole(&stored) || keep != stored.transcript.tokens.len();
        let (key, diverged_at) = self.branch(&stored, keep, common, leaves).await?;
        let mut tokens = stored.transcript.tokens;
        tokens.truncate(keep);
        tokens.extend(rendered.tokens);
        Ok(Plan {
            key,
            tokens,
            keep_tokens: keep,
            keep_messages: common,
            messages,
            diverged_at,
            conversation: true,
        })
    }

    async fn plan_text(
        &self,
        served: &Served,
        mut family: Vec<Stored>,
        text: &str,
    ) -> Result<Plan, ChatError> {
        let tokens = self.plain(served, &Prompt::Text(text.to_owned()))?;
        let shared = |stored: &Stored| {
            stored.transcript.tokens.iter().zip(&tokens).take_while(|(a, b)| a == b).count()
        };
        let best = (0..family.len()).max_by_key(|at| (shared(&family[*at]), std::cmp::Reverse(*at)));
        let stored = family.swap_remove(best.unwrap_or(0));
        let keep = shared(&stored);
        let messages = stored
            .transcript
            .messages
            .iter()
            .take_while(|message| message.tokens_end.as_usize() <= keep)
            .count();
        let leaves = keep != stored.transcript.tokens.len();
        let (key, diverged_at) = self.branch(&stored, keep, messages, leaves).await?;
        let messages_kept = messages;
        Ok(Plan {
            key,
            tokens,
            keep_tokens: keep,
            keep_messages: messages_kept,
            messages: Vec::new(),
            diverged_at,
            conversation: false,
        })
    }

    /// The session to go on in: the stored one, or a fork of it.
    async fn branch(
        &self,
        stored: &Stored,
        keep: usize,
        messages: usize,
        leaves: bool,
    ) -> Result<(SessionKey, Option<Tokens>), ChatError> {
        let key = stored.info.manifest.key.clone();
        if !leaves {
            return Ok((key, None));
        }
        self.handle.settled(&key).await?;
        let request = ForkRequest {
            length: Some(Tokens(keep as u64)),
            keep_messages: Some(u32::try_from(messages).unwrap_or(u32::MAX)),
            branch: true,
            ..ForkRequest::default()
        };
        let (_, child) = self.handle.fork(&key, request).await?;
        Ok((child.manifest.key.clone(), Some(Tokens(keep as u64))))
    }
}
