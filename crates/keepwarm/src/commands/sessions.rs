//! `keepwarm sessions …`: list, show, explain, export, import, rm.

use std::path::Path;
use std::pin::pin;

use futures::StreamExt;
use keepwarm_client::{Client, Deleted, Explanation, PartBody, Session, SessionFilter, State};
use keepwarm_types::Bytes;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

use super::client;
use crate::cli::{Remote, SessionVerb};
use crate::failure::Failure;
use crate::output::{Output, Table, note};

/// Bytes of an archive in flight from a file to the server.
const CHUNK_BYTES: usize = 256 << 10;

pub(crate) async fn run(remote: &Remote, verb: SessionVerb, output: Output) -> Result<(), Failure> {
    let client = client(remote)?;
    match verb {
        SessionVerb::Ls { labels, limit } => list(&client, labels, limit, output).await,
        SessionVerb::Show { id } => output.show(&client.session_named(&id).await?, shown),
        SessionVerb::Explain { id } => {
            let id = client.session_named(&id).await?.id;
            output.show(&client.explain(id).await?, explained)
        }
        SessionVerb::Export { id, output: file } => {
            let id = client.session_named(&id).await?.id;
            export(&client, id, file.as_deref()).await
        }
        SessionVerb::Import { file, id } => output.show(&import(&client, &file, id).await?, shown),
        SessionVerb::Rm { ids } => remove(&client, &ids, output).await,
    }
}

async fn list(
    client: &Client,
    labels: Vec<(String, String)>,
    limit: usize,
    output: Output,
) -> Result<(), Failure> {
    let filter = SessionFilter { labels: labels.into_iter().collect() };
    let mut listed = pin!(client.sessions(filter));
    let mut sessions = Vec::new();
    let mut cut = false;
    while let Some(session) = listed.next().await {
        if sessions.len() == limit {
            cut = true;
            break;
        }
        sessions.push(session?);
    }
    output.show(&sessions, |sessions| table(sessions))?;
    if cut {
        note(&format!("there are more than {limit}: raise --limit"));
    }
    Ok(())
}

fn state(session: &Session) -> String {
    match (session.state, session.cold_reason) {
        (State::Warm, _) => "warm".to_owned(),
        (State::Cold, Some(reason)) => format!("cold ({reason})"),
        (State::Cold, None) => "cold".to_owned(),
    }
}

fn home(session: &Session) -> String {
    let gpus = |gpus: &[u16]| gpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    session
        .home
        .as_ref()
        .map_or_else(|| "-".to_owned(), |home| format!("{} gpu {}", home.node, gpus(&home.gpus)))
}

fn table(sessions: &[Session]) -> String {
    let mut table = Table::new(["id", "model", "state", "tokens", "hbm", "pinned", "home", "last used"]);
    for session in sessions {
        table.row([
            session.id.to_string(),
            session.layout.model.clone(),
            state(session),
            session.length_tokens.to_string(),
            Bytes(session.tiers.hbm).to_string(),
            Bytes(session.tiers.pinned).to_string(),
            home(session),
            session.last_used_at.clone(),
        ]);
    }
    table.render()
}

fn shown(session: &Session) -> String {
    let mut table = Table::default();
    let mut line = |name: &str, value: String| table.row([name.to_owned(), value]);
    line("id", session.id.to_string());
    line("birth-revision", format!("{}-{}", session.birth, session.revision));
    line("state", state(session));
    line("model", session.layout.model.clone());
    line(
        "length",
        format!("{} tokens ({} in the transcript)", session.length_tokens, session.transcript_tokens),
    );
    for (name, part) in &session.parts {
        line(&format!("part {name}"), format!("{} in {} blocks", Bytes(part.length_bytes), part.blocks));
    }
    let tiers = session.tiers;
    line(
        "tiers",
        format!("hbm {}, pinned {}, peer {}", Bytes(tiers.hbm), Bytes(tiers.pinned), Bytes(tiers.peer)),
    );
    line("home", home(session));
    line("copies", format!("{} on {}", session.durability, session.holders.join(", ")));
    let lease = session.lease.as_ref();
    line(
        "lease",
        lease.map_or_else(|| "none".to_owned(), |lease| format!("{} until {}", lease.id, lease.expires_at)),
    );
    for (name, value) in &session.labels {
        line(&format!("label {name}"), value.clone());
    }
    line("created", session.created_at.clone());
    line("last used", session.last_used_at.clone());
    table.render()
}

fn explained(explanation: &Explanation) -> String {
    let mut text = shown(&explanation.session);
    let mut places = Table::new(["node", "tier", "bytes"]);
    for place in &explanation.residency {
        places.row([place.node.clone(), place.tier.clone(), Bytes(place.bytes).to_string()]);
    }
    let mut moves = Table::new(["at", "from", "to", "bytes", "why"]);
    for step in &explanation.moves {
        moves.row([
            step.at.clone(),
            step.from.clone(),
            step.to.clone(),
            Bytes(step.bytes).to_string(),
            step.why.clone(),
        ]);
    }
    text.push_str(&format!("\n{}\n{}", places.render(), moves.render()));
    let counts = |counts: &std::collections::BTreeMap<String, u64>| {
        counts.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
    };
    text.push_str(&format!(
        "\nhits: {}\nmisses: {}\n",
        counts(&explanation.hits),
        counts(&explanation.misses)
    ));
    text
}

async fn export(client: &Client, id: Uuid, file: Option<&Path>) -> Result<(), Failure> {
    let mut archive = client.export(id).await?;
    let Some(path) = file else {
        let mut out = tokio::io::stdout();
        while let Some(chunk) = archive.next_chunk().await? {
            out.write_all(&chunk).await?;
        }
        return Ok(out.flush().await?);
    };
    // Written beside the file and renamed, so that a torn export never looks like an archive.
    let name = path.file_name().ok_or_else(|| Failure::usage(format!("{} names no file", path.display())))?;
    let part = path.with_file_name(format!("{}.part", name.to_string_lossy()));
    let error = |error: std::io::Error| Failure::failed(format!("{}: {error}", part.display()));
    let mut out = File::create(&part).await.map_err(error)?;
    let written = async {
        while let Some(chunk) = archive.next_chunk().await? {
            out.write_all(&chunk).await.map_err(error)?;
        }
        out.sync_all().await.map_err(error)
    };
    if let Err(failure) = written.await {
        let _ = tokio::fs::remove_file(&part).await;
        return Err(failure);
    }
    Ok(tokio::fs::rename(&part, path).await?)
}

async fn import(client: &Client, path: &Path, id: Option<Uuid>) -> Result<Session, Failure> {
    let error = |error: std::io::Error| Failure::failed(format!("{}: {error}", path.display()));
    let file = File::open(path).await.map_err(error)?;
    let length = file.metadata().await.map_err(error)?.len();
    let chunks = futures::stream::try_unfold(file, |mut file| async move {
        let mut chunk = vec![0; CHUNK_BYTES];
        let read = file.read(&mut chunk).await?;
        chunk.truncate(read);
        Ok((read > 0).then(|| (bytes::Bytes::from(chunk), file)))
    });
    Ok(client.import(PartBody::once(Some(length), chunks), id).await?)
}

async fn remove(client: &Client, names: &[String], output: Output) -> Result<(), Failure> {
    let mut receipts = Vec::new();
    for name in names {
        let told = |error| {
            let failure = Failure::from(error);
            note(&format!("{name}: {failure}"));
            failure
        };
        let session = client.session_named(name).await.map_err(told)?;
        let receipt = client.delete(session.id).await.map_err(told)?;
        receipts.push(receipt);
    }
    output.show(&receipts, |receipts| {
        let line = |receipt: &Deleted| {
            let freed: Bytes = receipt.freed.iter().map(|freed| Bytes(freed.bytes)).sum();
            format!("{} ended, {freed} given back\n", receipt.id)
        };
        receipts.iter().map(line).collect()
    })
}
