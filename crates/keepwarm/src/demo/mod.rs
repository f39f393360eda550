//! `keepwarm demo`: the main job, to be seen.
//!
//! It starts a node as a process of its own, with two host GPUs whose memory is too small for what comes,
//! plays conversations through the HTTP API, kills the node in the middle of an answer and goes on, and says
//! at the end what was kept, how fast, and whether every token is what it would have been otherwise.

mod checks;
mod figures;
mod play;
mod report;
mod screen;
mod script;
mod server;

use std::path::Path;
use std::time::Instant;

use futures::future::try_join_all;
use keepwarm_client::{Client, Model};
use keepwarm_types::{Bytes, Source};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::DemoArgs;
use crate::commands::chat::pick;
use crate::commands::model::fetched;
use crate::failure::Failure;
use crate::output::{Output, print};
use checks::{Check, Probes, Recomputed};
use play::{Player, Turn};
use report::Report;
use screen::{Row, Screen};
use script::Conversation;
use server::{Server, ServerSpec};

/// What stands in where the real model cannot be had.
const STAND_IN: &str = "tiny:1";
/// GPUs of the node.
const GPUS: usize = 2;
/// Conversations that a GPU has room for, out of half of all.
const SESSIONS_PER_GPU: f64 = 2.6;
/// Copies that the checks make, beside the conversations.
const COPIES: usize = 4;
/// Pinned memory is kept below this share, so that it need not drop anything.
const PINNED_SHARE: f64 = 0.75;
/// Room for what is under way, whatever the model.
const SLACK: u64 = 16 << 20;
/// Characters of English in a token, for a model with a vocabulary; one with random weights reads bytes.
const CHARS_PER_TOKEN: u64 = 4;
/// Tokens of a turn's frame in the template, at most.
const FRAME_TOKENS: u64 = 40;
/// Pieces of an answer that are heard before the node is killed.
const PIECES_BEFORE_KILL: usize = 4;
/// Asked at the end, of copies of one conversation.
const PROBE: &str = "Sum it up in five words.";

/// What the whole demo has at hand.
struct Stage {
    screen: Screen,
    script: Vec<Conversation>,
    spec: ServerSpec,
    model: Model,
    label: String,
}

/// What was played on the node that is evicted and killed.
struct Played {
    turns: Vec<Turn>,
    recomputed: Vec<Recomputed>,
    restores: Option<checks::Restores>,
    probes: Probes,
    survived: Check,
}

/// Runs the demo; a signal ends it and its servers.
pub(crate) async fn run(args: DemoArgs, output: Output) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let screen = Screen::new(output);
    let demo = Box::pin(perform(args, output, screen.clone()));
    let done = tokio::select! {
        done = demo => done,
        _ = tokio::signal::ctrl_c() => Err(Failure::failed("interrupted")),
        _ = terminate.recv() => Err(Failure::failed("ended by a signal")),
    };
    screen.finish();
    done
}

async fn perform(args: DemoArgs, output: Output, screen: Screen) -> Result<(), Failure> {
    let begun = Instant::now();
    let script = script::parse(script::TEXT).map_err(Failure::failed)?;
    let (model, why) = weights(&args, &screen).await?;
    let folder = tempfile::Builder::new().prefix("keepwarm-demo-").tempdir()?;
    screen.phase("starting a node with two GPUs whose memory is too small");
    let (stage, server) = open(script, model, &why, folder.path(), screen).await?;
    stage.screen.say(&format!(
        "{}: {} conversations on {GPUS} host GPUs of {}, pinned memory {}, node at {}",
        stage.label,
        stage.script.len(),
        stage.spec.hbm,
        stage.spec.pinned,
        server.client().url()
    ));
    let animation = stage.screen.animate();
    let played = act(&stage, server, begun).await;
    let (played, server) = match played {
        Ok(done) => done,
        Err(failure) => {
            animation.abort();
            return Err(failure);
        }
    };
    stage.screen.phase("the same conversations on an engine that is never evicted, for comparison");
    stage.screen.watch(None);
    let (reference, answer) = reference(&stage, folder.path()).await?;
    stage.screen.finish();
    animation.abort();
    let mut checks = vec![checks::same_tokens(&played.turns, &reference), played.survived.clone()];
    checks.push(played.probes.refused.clone());
    checks.extend(checks::probed(&played.probes, &answer));
    let kv = stage.model.kv_bytes_per_token;
    let mut report =
        Report::new(stage.label.clone(), kv, &played.turns, &played.recomputed, played.restores, checks);
    report.seconds = begun.elapsed().as_secs_f64();
    output.show(&report, |report| format!("\n{}", report.text()))?;
    finish(&args, output, &stage, server, report.failed()).await
}

/// The model's file, or the stand-in and why.
async fn weights(args: &DemoArgs, screen: &Screen) -> Result<(String, Option<String>), Failure> {
    if let Some(model) = &args.model {
        return Ok((model.clone(), None));
    }
    match fetched().await? {
        Ok(path) => Ok((path.display().to_string(), None)),
        Err(error) => {
            screen.say(&format!(
                "the real model cannot be had ({error}): a tiny one with random weights takes its place"
            ));
            Ok((STAND_IN.to_owned(), Some(error.to_string())))
        }
    }
}

/// Starts the node, sized for its model: what a model keeps per token is known once it is loaded, so a first
/// guess may have to be corrected.
async fn open(
    script: Vec<Conversation>,
    model: String,
    why: &Option<String>,
    folder: &Path,
    screen: Screen,
) -> Result<(Stage, Server), Failure> {
    const KV_GUESS: u64 = 23_040;
    let guess = Model {
        id: String::new(),
        fingerprint: String::new(),
        context_length: 0,
        kv_bytes_per_token: KV_GUESS,
        random_weights: false,
    };
    let mut spec = ServerSpec {
        data_dir: folder.join("node"),
        model,
        gpus: GPUS,
        hbm: Bytes::ZERO,
        pinned: Bytes::ZERO,
        log: folder.join("node.log"),
    };
    (spec.hbm, spec.pinned) = sizes(&script, &guess);
    let mut server = Server::start(&spec).await?;
    let model = pick(server.client().models().await?, None)?;
    let right = sizes(&script, &model);
    if right != (spec.hbm, spec.pinned) {
        server.stop().await?;
        (spec.hbm, spec.pinned) = right;
        server = Server::start(&spec).await?;
    }
    let label = match (model.random_weights, why) {
        (false, _) => model.id.clone(),
        (true, None) => format!("{} (random weights)", model.id),
        (true, Some(_)) => format!("{} (random weights, for want of the real ones)", model.id),
    };
    Ok((Stage { screen, script, spec, model, label }, server))
}

/// Memory of a GPU and of the host for these conversations.
fn sizes(script: &[Conversation], model: &Model) -> (Bytes, Bytes) {
    let chars = if model.random_weights { 1 } else { CHARS_PER_TOKEN };
    let tokens = |conversation: &Conversation| {
        let said: usize = conversation.messages.iter().map(String::len).sum();
        let turns = conversation.messages.len() as u64;
        said as u64 / chars + turns * (u64::from(play::ANSWER_TOKENS) + FRAME_TOKENS)
    };
    let most = script.iter().map(tokens).max().unwrap_or(0);
    let session = most * model.kv_bytes_per_token;
    let mib = |bytes: f64| Bytes((bytes as u64).next_multiple_of(1 << 20).max(1 << 20));
    let kept = (script.len() + COPIES) as f64 * session as f64;
    (mib(SESSIONS_PER_GPU * session as f64), mib(kept / PINNED_SHARE + SLACK as f64))
}

/// Plays everything on the node that is too small, and measures there what needs it.
async fn act(stage: &Stage, server: Server, begun: Instant) -> Result<(Played, Server), Failure> {
    let order = script::order(&stage.script);
    let mut player = Player::new(server.client().clone(), stage.model.id.clone(), stage.script.clone());
    let row = |(conversation, session): (&Conversation, &uuid::Uuid)| Row {
        title: conversation.title.clone(),
        session: *session,
        ..Row::default()
    };
    stage.screen.rows(stage.script.iter().zip(player.sessions()).map(row).collect());
    stage.screen.watch(Some(server.client().clone()));
    let (mut server, mut turns, mut survived) = (server, Vec::new(), None);
    for (number, conversation) in order.iter().copied().enumerate() {
        if number == order.len() / 2 {
            let (again, check) = kill(stage, server, &mut player, conversation, &turns).await?;
            (server, survived) = (again, Some(check));
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
    let survived = survived.ok_or_else(|| Failure::failed("the node was never killed"))?;
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
    Ok((Played { turns, recomputed, restores, probes, survived }, server))
}

/// Kills the node while it answers, starts it again on the same data, and looks at what it still knows.
async fn kill(
    stage: &Stage,
    server: Server,
    player: &mut Player,
    conversation: usize,
    turns: &[Turn],
) -> Result<(Server, Check), Failure> {
    stage.screen.phase("killing the node (SIGKILL) in the middle of an answer");
    let answer = player.begin(conversation, PIECES_BEFORE_KILL).await?;
    stage.screen.watch(None);
    server.kill().await?;
    drop(answer);
    let begun = Instant::now();
    let server = Server::start(&stage.spec).await?;
    player.reconnect(server.client().clone());
    stage.screen.watch(Some(server.client().clone()));
    let survived = checks::nothing_lost(player, turns).await?;
    stage.screen.say(&format!(
        "   the node was killed in the middle of an answer and is back after {:.1} s: {}",
        begun.elapsed().as_secs_f64(),
        survived.detail
    ));
    Ok((server, survived))
}

/// The same conversations, all at once, where all have room and nothing is killed; and the answer to the probe.
async fn reference(stage: &Stage, folder: &Path) -> Result<(Vec<Turn>, Vec<u32>), Failure> {
    let roomy = Bytes(stage.spec.pinned.0);
    let spec = ServerSpec {
        data_dir: folder.join("reference"),
        gpus: 1,
        hbm: roomy,
        pinned: roomy,
        log: folder.join("reference.log"),
        ..stage.spec.clone()
    };
    let server = Server::start(&spec).await?;
    let all = (0..stage.script.len()).map(|conversation| {
        let mut player = Player::new(server.client().clone(), stage.model.id.clone(), stage.script.clone());
        async move {
            let mut turns = Vec::new();
            while player.upcoming(conversation).is_some() {
                turns.push(player.turn(conversation, |_| ()).await?);
            }
            let probe = if conversation == 0 { player.add(0, PROBE).await?.tokens } else { Vec::new() };
            Ok::<_, Failure>((turns, probe))
        }
    });
    let played = try_join_all(all).await?;
    server.stop().await?;
    let evicted = |turn: &&Turn| turn.source != Source::Hbm && turn.cached_tokens > 0;
    if let Some(turn) = played.iter().flat_map(|(turns, _)| turns).find(evicted) {
        return Err(Failure::failed(format!(
            "the reference was evicted too: its state came from {}",
            turn.source
        )));
    }
    let answer = played.first().map(|(_, probe)| probe.clone()).unwrap_or_default();
    Ok((played.into_iter().flat_map(|(turns, _)| turns).collect(), answer))
}

/// Ends, or serves on until Ctrl-C.
async fn finish(
    args: &DemoArgs,
    output: Output,
    stage: &Stage,
    mut server: Server,
    failed: usize,
) -> Result<(), Failure> {
    if args.exit {
        server.stop().await?;
        return if failed == 0 {
            Ok(())
        } else {
            Err(Failure::failed(format!("{failed} of the checks failed")))
        };
    }
    if !output.json {
        print(&hints(server.client(), &stage.model.id))?;
    }
    tokio::select! {
        _ = tokio::signal::ctrl_c() => server.stop().await,
        how = server.ended() => Err(Failure::failed(format!("the node ended: {how}"))),
    }
}

fn hints(client: &Client, model: &str) -> String {
    let url = client.url();
    format!(
        "
The node goes on at {url} until Ctrl-C. Try, in another terminal:

  curl {url}/v1/sessions
  curl {url}/v1/gpus
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -H 'X-Session-ID: me' \\
       -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Why is the sea salty?\"}}]}}'
  keepwarm chat --url {url} --session me
  keepwarm status --url {url}
  curl {url}/openapi.json
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(kv: u64, random_weights: bool) -> Model {
        let id = "m".to_owned();
        Model { id, fingerprint: String::new(), context_length: 0, kv_bytes_per_token: kv, random_weights }
    }

    #[test]
    fn the_gpus_are_too_small_for_all_conversations_and_pinned_memory_is_not() {
        let script = script::parse(script::TEXT).unwrap();
        for model in [model(23_040, false), model(256, true)] {
            let (hbm, pinned) = sizes(&script, &model);
            assert!(hbm.0 * (GPUS as u64) < pinned.0, "{hbm} {pinned}");
            let all = script.len() as f64 * hbm.0 as f64 / SESSIONS_PER_GPU;
            assert!((hbm.0 * GPUS as u64) as f64 <= 0.75 * all && all <= pinned.0 as f64);
        }
    }

    #[test]
    fn the_hints_name_the_address() {
        let hints = hints(&Client::new("http://127.0.0.1:7777").unwrap(), "tiny");
        assert!(
            hints.contains("curl http://127.0.0.1:7777/openapi.json")
                && hints.contains("\"model\": \"tiny\"")
        );
    }
}
