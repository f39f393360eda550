//! The demo's checks and measurements on its server, all through the public HTTP API.

use bytes::Bytes as Buffer;
use keepwarm_client::{Client, ClientError, PartBody, Placement, WriteOptions};
use keepwarm_types::{Source, Tier};
use serde::Serialize;
use uuid::Uuid;

use super::figures::{gb_per_s, median, memcpy_gb_per_s};
use super::play::{ANSWER_TOKENS, Player, Turn, binding, speak};
use crate::failure::Failure;
use keepwarm_client::ChatMessage;

/// Something that must hold.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Check {
    pub(crate) what: String,
    pub(crate) passed: bool,
    pub(crate) detail: String,
}

impl Check {
    pub(crate) fn new(what: impl Into<String>, passed: bool, detail: impl Into<String>) -> Self {
        Self { what: what.into(), passed, detail: detail.into() }
    }
}

/// The greedy output of every turn against that of an engine that was never evicted.
pub(crate) fn same_tokens(turns: &[Turn], reference: &[Turn]) -> Check {
    let of = |turn: &Turn, nth: usize| {
        let same = reference.iter().filter(|other| other.conversation == turn.conversation).nth(nth);
        same.is_some_and(|other| other.tokens == turn.tokens && other.text == turn.text)
    };
    let mut said = vec![0; turns.len()];
    let mut differing = Vec::new();
    for turn in turns {
        let nth = said[turn.conversation];
        said[turn.conversation] += 1;
        if !of(turn, nth) {
            differing.push(format!("{}.{}", turn.conversation + 1, nth + 1));
        }
    }
    let same = turns.len() - differing.len();
    let tokens: usize = turns.iter().map(|turn| turn.tokens.len()).sum();
    let detail = if differing.is_empty() {
        format!("{same} of {} turns, {tokens} tokens compared", turns.len())
    } else {
        format!("{same} of {} turns; these differ: {}", turns.len(), differing.join(", "))
    };
    let passed = differing.is_empty() && turns.len() == reference.len() && !turns.is_empty();
    Check::new(
        "every turn has token for token the output of an engine that was never evicted",
        passed,
        detail,
    )
}

/// After the kill, each session must be there with the transcript that was acknowledged last.
pub(crate) async fn nothing_lost(player: &Player, turns: &[Turn]) -> Result<Check, Failure> {
    let mut lost = Vec::new();
    let mut met = 0;
    for (conversation, id) in player.sessions().iter().enumerate() {
        let Some(last) = turns.iter().rev().find(|turn| turn.conversation == conversation) else { continue };
        met += 1;
        match player.client().transcript(*id).await {
            Ok(transcript) if transcript.tokens == last.tokens => {}
            Ok(transcript) => {
                lost.push(format!("{id} has {} of {} tokens", transcript.tokens.len(), last.tokens.len()))
            }
            Err(error) => lost.push(format!("{id}: {error}")),
        }
    }
    let detail = if lost.is_empty() { format!("{met} of {met} transcripts, whole") } else { lost.join("; ") };
    Ok(Check::new("after SIGKILL every acknowledged turn is there", lost.is_empty() && met > 0, detail))
}

/// How fast state comes back from pinned memory.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Restores {
    pub(crate) count: usize,
    pub(crate) median_bytes: u64,
    pub(crate) gb_per_s: f64,
    pub(crate) memcpy_gb_per_s: f64,
    pub(crate) ratio: f64,
}

/// Drives each session out of HBM and brings it back; the figures are the server's own, of the copy alone.
pub(crate) async fn restores(player: &Player) -> Result<Option<Restores>, Failure> {
    let client = player.client();
    let mut moved = Vec::new();
    for id in player.sessions() {
        client.checkpoint(*id).await?;
        client.demote(*id, Tier::Pinned).await?;
        let activation = client.activate(*id, &Placement::default(), None).await?;
        client.release(*id, activation.lease.id).await?;
        if activation.source == Source::Pinned && activation.duration_ms > 0.0 {
            moved.push((activation.bytes_moved, activation.duration_ms));
        }
    }
    let rate = median(moved.iter().map(|(bytes, millis)| gb_per_s(*bytes, *millis)));
    let bytes = median(moved.iter().map(|(bytes, _)| *bytes as f64));
    let (Some(rate), Some(bytes)) = (rate, bytes) else { return Ok(None) };
    let length = bytes as usize;
    let memcpy =
        tokio::task::spawn_blocking(move || memcpy_gb_per_s(length)).await.map_err(Failure::failed)?;
    let ratio = rate / memcpy;
    Ok(Some(Restores {
        count: moved.len(),
        median_bytes: bytes as u64,
        gb_per_s: rate,
        memcpy_gb_per_s: memcpy,
        ratio,
    }))
}

/// The time to first token of a history that nobody kept, and its length.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recomputed {
    pub(crate) ttft_ms: f64,
    pub(crate) tokens: u64,
}

/// Sends a history without a session: all of it is computed.
pub(crate) async fn recompute(player: &Player, messages: &[ChatMessage]) -> Result<Recomputed, Failure> {
    let spoken = speak(player.client(), player.model(), messages, &binding(None), 1, |_| ()).await?;
    let usage = spoken.end.usage;
    let tokens = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens.min(usage.prompt_tokens);
    Ok(Recomputed { ttft_ms: spoken.ttft_ms, tokens })
}

/// What a probe of a session's state showed.
pub(crate) struct Probes {
    pub(crate) refused: Check,
    /// Tokens after the probe, of an untouched copy.
    pub(crate) copied: Vec<u32>,
    /// The same, of a copy whose KV was set to zero.
    pub(crate) zeroed: Vec<u32>,
    /// Tokens that the zeroed copy took from its state.
    pub(crate) zeroed_cached: u64,
}

/// Exports a conversation and imports it thrice: with a byte flipped, as it is, and with its KV then zeroed.
pub(crate) async fn probe(player: &Player, conversation: usize, question: &str) -> Result<Probes, Failure> {
    let client = player.client();
    let id = player.sessions()[conversation];
    let archive = client.export(id).await?.bytes().await?;
    let refused = flipped(client, &archive).await?;
    let copy = client.import(PartBody::from(archive.clone()), Some(Uuid::now_v7())).await?.id;
    let history = player.history(conversation).iter().cloned();
    let messages: Vec<_> = history.chain([ChatMessage::new("user", question)]).collect();
    let (copied, _) = ask(player, &messages, copy).await?;
    let blank = client.import(PartBody::from(archive), Some(Uuid::now_v7())).await?;
    for (name, part) in &blank.parts {
        let zeros = vec![0; usize::try_from(part.length_bytes).map_err(Failure::failed)?];
        client.put_part(blank.id, name, PartBody::from(zeros), &WriteOptions::default()).await?;
    }
    let (zeroed, zeroed_cached) = ask(player, &messages, blank.id).await?;
    for id in [copy, blank.id] {
        client.delete(id).await?;
    }
    Ok(Probes { refused, copied, zeroed, zeroed_cached })
}

/// Asks in a copy, which must not fork; gives its tokens and how many of them were not computed again.
async fn ask(player: &Player, messages: &[ChatMessage], copy: Uuid) -> Result<(Vec<u32>, u64), Failure> {
    let spoken =
        speak(player.client(), player.model(), messages, &binding(Some(copy)), ANSWER_TOKENS, |_| ()).await?;
    let used = spoken.end.session.as_deref().and_then(|id| id.parse().ok()).unwrap_or(copy);
    let transcript = player.client().transcript(used).await?;
    Ok((transcript.tokens, spoken.end.usage.prompt_tokens_details.cached_tokens))
}

async fn flipped(client: &Client, archive: &Buffer) -> Result<Check, Failure> {
    let mut bytes = archive.to_vec();
    // The last quarter of an archive is block bytes; its head is small.
    let at = bytes.len() / 4 * 3;
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 0x10;
    }
    let id = Uuid::now_v7();
    let what = "a byte flipped in a cold copy is refused";
    Ok(match client.import(PartBody::from(bytes), Some(id)).await {
        Ok(_) => Check::new(what, false, format!("byte {at} of {}: it was taken", archive.len())),
        Err(ClientError::Refused(problem)) => {
            let absent = client.session(id).await.is_err_and(|error| error.code() == Some("unknown_session"));
            let passed = absent && matches!(problem.code.as_str(), "corrupt" | "invalid_field");
            Check::new(
                what,
                passed,
                format!("byte {at} of {}: {} {}", archive.len(), problem.status, problem.code),
            )
        }
        Err(error) => return Err(error.into()),
    })
}

/// The two checks that follow from the probes, and from what the reference answered to the same question.
pub(crate) fn probed(probes: &Probes, reference: &[u32]) -> [Check; 2] {
    let copied = probes.copied == reference;
    let first = probes.zeroed.iter().zip(reference).position(|(one, other)| one != other);
    let differs = probes.zeroed != reference;
    let place = first.map_or_else(|| "by their lengths".to_owned(), |at| format!("from token {} on", at + 1));
    let zeroed = match (differs, probes.zeroed_cached) {
        (_, 0) => "the zeroed state was not used".to_owned(),
        (true, cached) => format!("{cached} tokens of state zeroed; the answers differ {place}"),
        (false, _) => "the answers are the same".to_owned(),
    };
    [
        Check::new(
            "an exported and imported session goes on with the same tokens",
            copied,
            if copied { format!("{} tokens", reference.len()) } else { "they differ".to_owned() },
        ),
        Check::new(
            "with KV zeroed on purpose the tokens differ (so the first check could have failed)",
            differs && probes.zeroed_cached > 0,
            zeroed,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(conversation: usize, tokens: &[u32]) -> Turn {
        Turn {
            conversation,
            source: Source::Hbm,
            ttft_ms: 1.0,
            cached_tokens: 0,
            uncached: false,
            text: String::new(),
            tokens: tokens.to_vec(),
        }
    }

    #[test]
    fn turns_are_compared_by_conversation_whatever_their_order() {
        let played = [turn(0, &[1]), turn(1, &[2]), turn(0, &[1, 3])];
        let reference = [turn(0, &[1]), turn(0, &[1, 3]), turn(1, &[2])];
        assert!(same_tokens(&played, &reference).passed);
        let other = [turn(0, &[1]), turn(0, &[1, 4]), turn(1, &[2])];
        let check = same_tokens(&played, &other);
        assert!(!check.passed && check.detail.contains("1.2"), "{check:?}");
        assert!(!same_tokens(&[], &[]).passed);
        assert!(!same_tokens(&played[..2], &reference).passed);
    }

    #[test]
    fn zeroed_state_must_be_used_and_must_show() {
        let refused = Check::new("x", true, "");
        let probes = |zeroed: &[u32], cached| Probes {
            refused: refused.clone(),
            copied: vec![1, 2, 3],
            zeroed: zeroed.to_vec(),
            zeroed_cached: cached,
        };
        let passed = |probes: &Probes| probed(probes, &[1, 2, 3]).map(|check| check.passed);
        assert_eq!(passed(&probes(&[1, 9, 3], 2)), [true, true]);
        assert_eq!(passed(&probes(&[1, 9, 3], 0)), [true, false]);
        assert_eq!(passed(&probes(&[1, 2, 3], 2)), [true, false]);
        assert!(!probed(&probes(&[1], 2), &[1]).map(|check| check.passed)[0]);
    }
}
