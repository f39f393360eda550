//! What happens on the demo's cluster: the conversations, the kills between them, and what is measured on the way.

use std::time::{Duration, Instant};

use keepwarm_client::Model;
use keepwarm_types::Source;
use uuid::Uuid;

use super::checks::{self, Check, Probes, Recomputed, Restores};
use super::cluster::Cluster;
use super::play::{Player, Turn};
use super::screen::{Row, Screen};
use super::script::{self, Conversation};
use crate::failure::Failure;

/// Pieces of an answer that are heard before its node is killed.
const PIECES_BEFORE_KILL: usize = 4;
/// Asked at the end, of copies of one conversation.
pub(crate) const PROBE: &str = "Sum it up in five words.";
/// How long a survivor may take until it answers for a dead node's session.
const TAKEOVER_MAX: Duration = Duration::from_secs(30);
/// Time between two askings.
const LOOK: Duration = Duration::from_millis(5);

/// What the whole demo has at hand.
pub(crate) struct Stage {
    pub(crate) screen: Screen,
    pub(crate) script: Vec<Conversation>,
    pub(crate) model: Model,
    pub(crate) label: String,
}

/// A node's death, and what became of its sessions.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Takeover {
    pub(crate) node: String,
    /// Conversations that it owned.
    pub(crate) conversations: usize,
    /// From SIGKILL to the first answer for one of them.
    pub(crate) first_answer_ms: f64,
    /// From its new start until every promised copy was in place again.
    pub(crate) refilled_s: f64,
}

/// What was played on the cluster that is evicted and killed.
pub(crate) struct Played {
    pub(crate) turns: Vec<Turn>,
    pub(crate) recomputed: Vec<Recomputed>,
    pub(crate) restores: Option<Restores>,
    pub(crate) probes: Probes,
    pub(crate) takeovers: Vec<Takeover>,
    pub(crate) checks: Vec<Check>,
}

/// A death of which not all is known yet.
struct Death {
    takeover: Takeover,
    /// Conversations that the node owned.
    moved: Vec<usize>,
    /// Turns that were played before it.
    turns: usize,
}

/// Ids for the conversations: every other one at the second node, which so owns half of them, the rest by turns at the others.
async fn places(stage: &Stage, cluster: &Cluster) -> Result<Vec<Uuid>, Failure> {
    let names: Vec<_> = cluster.names().map(str::to_owned).collect();
    let place = |conversation: usize| match conversation % 4 {
        0 | 2 => 1,
        1 => 0,
        _ => names.len() - 1,
    };
    let mut ids = Vec::new();
    for conversation in 0..stage.script.len() {
        ids.push(cluster.mint(&names[place(conversation)]).await?);
    }
    Ok(ids)
}

/// Plays everything, kills twice, and measures what needs the cluster.
pub(crate) async fn act(stage: &Stage, cluster: &mut Cluster, begun: Instant) -> Result<Played, Failure> {
    let order = script::order(&stage.script);
    let ids = places(stage, cluster).await?;
    let mut player = Player::new(cluster.client().clone(), stage.model.id.clone(), stage.script.clone(), ids);
    let row = |(conversation, session): (&Conversation, &Uuid)| Row {
        title: conversation.title.clone(),
        session: *session,
        ..Row::default()
    };
    stage.screen.rows(stage.script.iter().zip(player.sessions()).map(row).collect());
    stage.screen.watch(Some(cluster.client().clone()));
    let (mut turns, mut deaths, mut checks) = (Vec::new(), Vec::new(), Vec::new());
    // One node dies between two turns, another later in the middle of an answer; each returns a few turns after.
    let [first, back, second, again] = [2, 3, 4, 5].map(|sixths| order.len() * sixths / 6);
    for (number, conversation) in order.iter().copied().enumerate() {
        if number == first {
            let node = busiest(&player, cluster).await?;
            deaths.push(kill(stage, cluster, &player, &turns, &node, None).await?);
        }
        if number == second {
            let node = owner(&player, cluster, conversation).await?;
            deaths.push(kill(stage, cluster, &player, &turns, &node, Some(conversation)).await?);
        }
        if number == first || number == second {
            checks.push(checks::nothing_lost(&player, &turns).await?);
        }
        if number == back || number == again {
            refill(stage, cluster, &mut deaths).await?;
        }
        let label = &stage.label;
        let elapsed = begun.elapsed().as_secs();
        stage.screen.phase(format!("{label}: turn {} of {}, {elapsed} s", number + 1, order.len()));
        stage.screen.speaking(conversation);
        let turn = player.turn(conversation, |text| stage.screen.heard(text)).await?;
        stage.screen.refresh().await;
        let source = if turn.source == Source::None { "prefill" } else { turn.source.word() };
        stage.screen.spoke(conversation, turn.ttft_ms, source, &turn.text);
        turns.push(turn);
    }
    checks.push(reused(&turns, &deaths));
    checks.push(refilled(&deaths));
    let takeovers = deaths.into_iter().map(|death| death.takeover).collect();
    stage.screen.phase("restoring each session from pinned memory");
    let restores = checks::restores(&player).await?;
    stage.screen.phase("computing the same contexts again, without sessions");
    let mut recomputed = Vec::new();
    for conversation in 0..stage.script.len() {
        // What the last turn was asked: all but its answer.
        let history = player.history(conversation);
        recomputed.push(checks::recompute(&player, &history[..history.len() - 1]).await?);
    }
    stage.screen.phase("flipping a byte, zeroing a state");
    let probes = checks::probe(&player, 0, PROBE).await?;
    Ok(Played { turns, recomputed, restores, probes, takeovers, checks })
}

/// The owner of a conversation's session.
async fn owner(player: &Player, cluster: &Cluster, conversation: usize) -> Result<String, Failure> {
    let owner = cluster.owner(player.sessions()[conversation]).await?;
    owner.ok_or_else(|| Failure::failed("a conversation's shard has no owner"))
}

/// Each conversation's owner.
async fn owners(player: &Player, cluster: &Cluster) -> Result<Vec<String>, Failure> {
    let mut owners = Vec::new();
    for conversation in 0..player.sessions().len() {
        owners.push(owner(player, cluster, conversation).await?);
    }
    Ok(owners)
}

/// The node that owns the most conversations.
async fn busiest(player: &Player, cluster: &Cluster) -> Result<String, Failure> {
    let owners = owners(player, cluster).await?;
    let owned = |name: &&str| owners.iter().filter(|owner| owner == name).count();
    let most = cluster.names().max_by_key(owned);
    most.map(str::to_owned).ok_or_else(|| Failure::failed("the cluster has no nodes"))
}

/// Kills a node, in the middle of a conversation's answer or between two turns, and waits until a survivor answers
/// for the first of its sessions.
async fn kill(
    stage: &Stage,
    cluster: &mut Cluster,
    player: &Player,
    turns: &[Turn],
    node: &str,
    speaking: Option<usize>,
) -> Result<Death, Failure> {
    let owners = owners(player, cluster).await?;
    let moved: Vec<_> = (0..owners.len()).filter(|conversation| owners[*conversation] == node).collect();
    let when = if speaking.is_some() { "in the middle of an answer" } else { "between two turns" };
    stage.screen.phase(format!("killing {node} (SIGKILL) {when}"));
    let answer = match speaking {
        Some(conversation) => Some(player.begin(conversation, PIECES_BEFORE_KILL).await?),
        None => None,
    };
    let begun = Instant::now();
    cluster.kill(node).await?;
    drop(answer);
    let asked = speaking.or(moved.first().copied()).unwrap_or(0);
    let session = player.sessions()[asked];
    while let Err(error) = player.client().transcript(session).await {
        if begun.elapsed() > TAKEOVER_MAX {
            return Err(Failure::failed(format!("no survivor answers for {session}: {error}")));
        }
        tokio::time::sleep(LOOK).await;
    }
    let first_answer_ms = begun.elapsed().as_secs_f64() * 1000.0;
    stage.screen.say(&format!(
        "   {node} was killed {when}; it owned {} conversations, and a survivor answered for them after {first_answer_ms:.0} ms",
        moved.len()
    ));
    let takeover =
        Takeover { node: node.to_owned(), conversations: moved.len(), first_answer_ms, refilled_s: 0.0 };
    Ok(Death { takeover, moved, turns: turns.len() })
}

/// Starts the killed node again, and waits until it has its share of the copies.
async fn refill(stage: &Stage, cluster: &mut Cluster, deaths: &mut [Death]) -> Result<(), Failure> {
    let Some(death) = deaths.last_mut() else { return Ok(()) };
    let node = &death.takeover.node;
    stage.screen.phase(format!("starting {node} again; it lost its memory, and is filled by the others"));
    let took = cluster.refill().await?;
    stage.screen.say(&format!(
        "   {node} is back, and every session has all its copies again after {:.1} s",
        took.as_secs_f64()
    ));
    death.takeover.refilled_s = took.as_secs_f64();
    Ok(())
}

/// The next turn of each conversation that lost its owner must have found its state at a survivor.
fn reused(turns: &[Turn], deaths: &[Death]) -> Check {
    let (mut met, mut cached, mut computed) = (0, Vec::new(), Vec::new());
    for death in deaths {
        for conversation in &death.moved {
            let later = turns[death.turns..].iter().find(|turn| turn.conversation == *conversation);
            // One that had not begun, or says nothing more, has nothing to reuse.
            let earlier = turns[..death.turns].iter().any(|turn| turn.conversation == *conversation);
            let Some(turn) = later.filter(|_| earlier) else { continue };
            met += 1;
            if turn.source == Source::None || turn.cached_tokens == 0 {
                computed.push(format!("{}", conversation + 1));
            } else {
                cached.push(turn.cached_tokens);
            }
        }
    }
    let passed = computed.is_empty() && met > 0;
    let detail = if passed {
        let least = cached.iter().min().copied().unwrap_or(0);
        format!("{met} of {met} turns, at least {least} cached tokens each")
    } else {
        format!("{} of {met} turns; these were computed again: {}", cached.len(), computed.join(", "))
    };
    Check::new("at a survivor each conversation goes on from its state, without prefill", passed, detail)
}

/// Each node that was killed must have come back.
fn refilled(deaths: &[Death]) -> Check {
    let back = deaths.iter().filter(|death| death.takeover.refilled_s > 0.0).count();
    let longest = deaths.iter().map(|death| death.takeover.refilled_s).fold(0.0, f64::max);
    let passed = back == deaths.len() && back > 0;
    let detail = format!("{back} of {} times, within {longest:.1} s", deaths.len());
    Check::new("a killed node returns, and every promised copy is in place again", passed, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(conversation: usize, source: Source, cached_tokens: u64) -> Turn {
        let (text, tokens) = (String::new(), Vec::new());
        Turn { conversation, source, ttft_ms: 1.0, cached_tokens, uncached: false, text, tokens }
    }

    fn death(moved: &[usize], turns: usize, refilled_s: f64) -> Death {
        let takeover =
            Takeover { node: "n2".to_owned(), conversations: moved.len(), first_answer_ms: 1.0, refilled_s };
        Death { takeover, moved: moved.to_vec(), turns }
    }

    #[test]
    fn state_that_was_computed_again_after_a_death_shows() {
        let before = [turn(0, Source::None, 0), turn(1, Source::None, 0)];
        let with = |later: &[Turn]| {
            let turns: Vec<_> = before.iter().chain(later).cloned().collect();
            reused(&turns, &[death(&[0, 2], 2, 1.0)])
        };
        assert!(with(&[turn(1, Source::None, 0), turn(0, Source::Pinned, 50)]).passed);
        let check = with(&[turn(0, Source::None, 0)]);
        assert!(!check.passed && check.detail.contains("0 of 1"), "{}", check.detail);
        assert!(!with(&[turn(1, Source::Hbm, 50)]).passed, "nothing of the dead node was asked for");
        // A conversation that had not begun may be computed.
        assert!(with(&[turn(2, Source::None, 0), turn(0, Source::Hbm, 9)]).passed);
    }

    #[test]
    fn a_node_that_stays_away_shows() {
        assert!(refilled(&[death(&[], 0, 0.5), death(&[], 0, 1.5)]).passed);
        assert!(!refilled(&[death(&[], 0, 0.5), death(&[], 0, 0.0)]).passed);
        assert!(!refilled(&[]).passed);
    }
}
