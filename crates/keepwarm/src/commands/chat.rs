//! `keepwarm chat`: a conversation in the terminal that can be continued by its session's id.
//!
//! What was said is taken from the session's transcript, so a later call with the same id goes on where this
//! one ended, also after the session's bytes were evicted or the server was started anew. Each turn sends
//! only the new message, bound to the revision that was seen last; where another client has gone on in the
//! meantime, the history is fetched again and sent whole.

use std::time::Instant;

use keepwarm_client::{
    ChatCall, ChatEnd, ChatMessage, ChatPiece, ChatRequest, Client, ClientError, ColdForm, Etag, Model,
};
use keepwarm_types::Source;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::json;
use uuid::Uuid;

use super::client;
use crate::cli::{ChatArgs, Cold};
use crate::failure::Failure;
use crate::output::{Output, millis, note, print};

/// Where a turn's text goes while it arrives, and what is known at its end.
struct Turn {
    text: String,
    ttft_ms: f64,
    end: ChatEnd,
}

struct Conversation {
    client: Client,
    model: Model,
    session: String,
    history: Vec<ChatMessage>,
    revision: Option<Etag>,
    max_tokens: u32,
    temperature: f32,
    cold: Option<ColdForm>,
}

pub(crate) async fn run(args: ChatArgs, output: Output) -> Result<(), Failure> {
    let client = client(&args.remote)?;
    let model = pick(client.models().await?, args.model.as_deref())?;
    let session = args.session.unwrap_or_else(|| Uuid::now_v7().to_string());
    let mut conversation = Conversation {
        client,
        model,
        session,
        history: Vec::new(),
        revision: None,
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        cold: args.cold.map(|cold| match cold {
            Cold::Exact => ColdForm::Exact,
            Cold::Fp8 => ColdForm::Fp8,
        }),
    };
    conversation.resume().await?;
    greet(&conversation, output);
    let mut editor = DefaultEditor::new().map_err(Failure::failed)?;
    loop {
        let (back, line) = read_line(editor).await?;
        editor = back;
        let Some(line) = line else { break };
        if line.trim().is_empty() {
            continue;
        }
        match conversation.say(line.trim(), output).await {
            Ok(turn) => report(&conversation, &turn, output)?,
            Err(failure) => note(&format!("\n{failure}")),
        }
    }
    note(&format!("continue with: keepwarm chat --session {}", conversation.session));
    Ok(())
}

/// The model by its name, or the first.
pub(crate) fn pick(models: Vec<Model>, name: Option<&str>) -> Result<Model, Failure> {
    let known = models.iter().map(|model| model.id.as_str()).collect::<Vec<_>>().join(", ");
    let found = match name {
        Some(name) => models.into_iter().find(|model| model.id == name),
        None => models.into_iter().next(),
    };
    found.ok_or_else(|| match name {
        Some(name) => {
            Failure::usage(format!("--model {name}: the server has no such model; it has: {known}"))
        }
        None => Failure::failed("the server has no model: start it with `keepwarm serve --model FILE.gguf`"),
    })
}

fn greet(conversation: &Conversation, output: Output) {
    if output.json {
        return;
    }
    let random = if conversation.model.random_weights { " (random weights: it babbles)" } else { "" };
    note(&format!("{}{random} · session {}", conversation.model.id, conversation.session));
    for message in &conversation.history {
        let mark = if message.role == "user" { ">" } else { "·" };
        note(&format!("{mark} {}", message.content));
    }
}

/// A line from the terminal, read on a thread where it may wait; none at the end.
async fn read_line(mut editor: DefaultEditor) -> Result<(DefaultEditor, Option<String>), Failure> {
    let read = tokio::task::spawn_blocking(move || {
        let line = editor.readline("> ");
        if let Ok(line) = &line {
            let _ = editor.add_history_entry(line);
        }
        (editor, line)
    });
    let (editor, line) = read.await.map_err(Failure::failed)?;
    match line {
        Ok(line) => Ok((editor, Some(line))),
        Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok((editor, None)),
        Err(error) => Err(Failure::failed(format!("the terminal: {error}"))),
    }
}

impl Conversation {
    /// Takes over what the session has, if it is there.
    async fn resume(&mut self) -> Result<(), Failure> {
        let session = match self.client.session_named(&self.session).await {
            Ok(session) => session,
            Err(error) if error.code() == Some("unknown_session") => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let transcript = self.client.transcript(session.id).await?;
        let message =
            |message: keepwarm_client::StoredMessage| ChatMessage::new(message.role, message.content);
        self.history = transcript.messages.into_iter().map(message).collect();
        self.revision = session.etag();
        Ok(())
    }

    async fn say(&mut self, text: &str, output: Output) -> Result<Turn, Failure> {
        let message = ChatMessage::new("user", text);
        let turn = match self.ask(&message, self.revision, output).await {
            // Another client went on: what follows is no longer what was said here.
            Err(error) if error.code() == Some("revision_mismatch") => {
                self.resume().await?;
                self.ask(&message, self.revision, output).await
            }
            answer => answer,
        }?;
        self.history.push(message);
        self.history.push(ChatMessage::new("assistant", turn.text.clone()));
        self.revision = turn.end.etag;
        if let Some(session) = &turn.end.session {
            self.session.clone_from(session);
        }
        Ok(turn)
    }

    async fn ask(
        &self,
        message: &ChatMessage,
        revision: Option<Etag>,
        output: Output,
    ) -> Result<Turn, ClientError> {
        let follows = revision.is_some() && !self.history.is_empty();
        let earlier: &[ChatMessage] = if follows { &[] } else { &self.history };
        let request = ChatRequest {
            model: self.model.id.clone(),
            messages: earlier.iter().chain([message]).cloned().collect(),
            max_tokens: Some(self.max_tokens),
            temperature: Some(self.temperature),
            ..ChatRequest::default()
        };
        let binding = ChatCall {
            session: Some(self.session.clone()),
            if_match: revision.filter(|_| follows),
            idempotency_key: Some(Uuid::now_v7().to_string()),
            cold: self.cold,
        };
        let begun = Instant::now();
        let mut answer = self.client.chat_stream(&request, &binding).await?;
        let mut turn = Turn { text: String::new(), ttft_ms: 0.0, end: ChatEnd::default() };
        while let Some(piece) = answer.next_piece().await? {
            match piece {
                ChatPiece::Text(text) => {
                    if turn.text.is_empty() {
                        turn.ttft_ms = begun.elapsed().as_secs_f64() * 1000.0;
                    }
                    if !output.json {
                        // A terminal that went away ends the process; nothing else can fail here.
                        let _ = print(&text);
                    }
                    turn.text.push_str(&text);
                }
                ChatPiece::End(end) => turn.end = *end,
            }
        }
        Ok(turn)
    }
}

fn report(conversation: &Conversation, turn: &Turn, output: Output) -> Result<(), Failure> {
    let (end, usage) = (&turn.end, &turn.end.usage);
    let source = end.source.map_or("unknown", Source::word);
    if output.json {
        let line = json!({
            "session": conversation.session, "text": turn.text, "source": source, "ttft_ms": turn.ttft_ms,
            "finish_reason": end.finish_reason, "usage": usage, "uncached": end.uncached,
        });
        return print(&format!("{line}\n"));
    }
    let where_from = match end.source {
        Some(Source::None) | None => "computed".to_owned(),
        Some(source) => format!("state from {source}"),
    };
    let uncached = if end.uncached { " · ran uncached: no room" } else { "" };
    print("\n")?;
    note(&format!(
        "  [{where_from} · {} of {} prompt tokens kept · first token after {}{uncached}]",
        usage.prompt_tokens_details.cached_tokens,
        usage.prompt_tokens,
        millis(turn.ttft_ms)
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Kind;

    fn model(id: &str) -> Model {
        serde_json::from_value(json!({"id": id})).unwrap()
    }

    #[test]
    fn a_model_is_picked_by_name_or_is_the_first() {
        let models = || vec![model("a"), model("b")];
        assert_eq!(pick(models(), None).unwrap().id, "a");
        assert_eq!(pick(models(), Some("b")).unwrap().id, "b");
        let unknown = pick(models(), Some("c")).unwrap_err();
        assert!(unknown.kind() == Kind::Usage && unknown.to_string().contains("a, b"));
        assert_eq!(pick(Vec::new(), None).unwrap_err().kind(), Kind::Failed);
    }
}
