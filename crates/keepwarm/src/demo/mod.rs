//! `keepwarm demo`: the main job, to be seen.
//!
//! It starts three nodes as processes of their own, each with a GPU whose memory is too small for what comes, plays
//! conversations through the HTTP API, kills the owner of half of them between two turns and another node in the middle of
//! an answer, and says at the end what was kept, how fast, and whether every token is what it would have been otherwise.

mod act;
mod checks;
mod cluster;
mod figures;
mod play;
mod report;
mod screen;
mod script;
mod server;

use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use keepwarm_client::Model;
use keepwarm_types::{Bytes, Source};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::DemoArgs;
use crate::commands::chat::pick;
use crate::commands::model::fetched;
use crate::failure::Failure;
use crate::output::{Output, print};
use act::{PROBE, Played, Stage};
use cluster::{Cluster, ClusterSpec};
use play::{Player, Turn};
use report::Report;
use screen::Screen;
use script::Conversation;
use server::{Server, ServerSpec};

/// What stands in where the real model cannot be had.
const STAND_IN: &str = "tiny:1";
/// Conversations that a node's GPU has room for: fewer than it owns.
const SESSIONS_PER_GPU: f64 = 1.7;
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
/// How long a node stays away that somebody killed at the end of the demo.
const AWAY: Duration = Duration::from_secs(10);

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
    let (source, why) = weights(&args, &screen).await?;
    let folder = tempfile::Builder::new().prefix("keepwarm-demo-").tempdir()?;
    screen.phase("starting three nodes, each with a GPU whose memory is too small");
    let model = loaded(&source, folder.path()).await?;
    let label = match (model.random_weights, why) {
        (false, _) => model.id.clone(),
        (true, None) => format!("{} (random weights)", model.id),
        (true, Some(_)) => format!("{} (random weights, for want of the real ones)", model.id),
    };
    let (hbm, pinned) = sizes(&script, &model);
    let stage = Stage { screen, script, model, label };
    let devices = args.gpu.clone();
    let spec = ClusterSpec { folder: folder.path().join("cluster"), model: source, devices, hbm, pinned };
    let mut cluster = Cluster::start(&spec).await?;
    stage.screen.say(&format!(
        "{}: {} conversations on three nodes, each with {hbm} of GPU memory and {pinned} of pinned memory",
        stage.label,
        stage.script.len(),
    ));
    for (name, url, pid) in cluster.running() {
        stage.screen.say(&format!("   {name}  {url}  pid {pid}"));
    }
    let animation = stage.screen.animate();
    let played = act::act(&stage, &mut cluster, begun).await;
    let played = match played {
        Ok(done) => done,
        Err(failure) => {
            animation.abort();
            return Err(failure);
        }
    };
    stage.screen.phase("the same conversations on an engine that is never evicted, for comparison");
    stage.screen.watch(None);
    let (reference, answer) = reference(&stage, &spec, folder.path()).await?;
    stage.screen.finish();
    animation.abort();
    let mut report = report(&stage, played, &reference, &answer);
    report.seconds = begun.elapsed().as_secs_f64();
    output.show(&report, |report| format!("\n{}", report.text()))?;
    finish(&args, output, &stage, cluster, report.failed()).await
}

fn report(stage: &Stage, played: Played, reference: &[Turn], answer: &[u32]) -> Report {
    let mut checks = vec![checks::same_tokens(&played.turns, reference)];
    checks.extend(played.checks);
    checks.push(played.probes.refused.clone());
    checks.extend(checks::probed(&played.probes, answer));
    let kv = stage.model.kv_bytes_per_token;
    let mut report =
        Report::new(stage.label.clone(), kv, &played.turns, &played.recomputed, played.restores, checks);
    report.takeovers = played.takeovers;
    report
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

/// What a node says of the model: how much it keeps per token decides how large the cluster is.
async fn loaded(model: &str, folder: &Path) -> Result<Model, Failure> {
    const ENOUGH: Bytes = Bytes(64 << 20);
    let spec = ServerSpec::alone(&folder.join("probe"), ENOUGH, model, folder.join("probe.log"));
    let server = Server::start(&spec).await?;
    let model = pick(server.client().models().await?, None)?;
    server.stop().await?;
    Ok(model)
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

/// The same conversations, all at once, where all have room and nothing is killed; and the answer to the probe.
async fn reference(
    stage: &Stage,
    cluster: &ClusterSpec,
    folder: &Path,
) -> Result<(Vec<Turn>, Vec<u32>), Failure> {
    let log = folder.join("reference.log");
    let spec = ServerSpec::alone(&folder.join("reference"), cluster.pinned, &cluster.model, log);
    let server = Server::start(&spec).await?;
    let all = (0..stage.script.len()).map(|conversation| {
        let ids = stage.script.iter().map(|_| uuid::Uuid::now_v7()).collect();
        let client = server.client().clone();
        let mut player = Player::new(client, stage.model.id.clone(), stage.script.clone(), ids);
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

/// Ends, or serves on until Ctrl-C; a node that somebody kills meanwhile stays away for a while, and is started again.
async fn finish(
    args: &DemoArgs,
    output: Output,
    stage: &Stage,
    mut cluster: Cluster,
    failed: usize,
) -> Result<(), Failure> {
    if args.exit {
        cluster.stop().await?;
        return if failed == 0 {
            Ok(())
        } else {
            Err(Failure::failed(format!("{failed} of the checks failed")))
        };
    }
    let say = |text: &str| if output.json { Ok(()) } else { print(text) };
    say(&hints(&cluster.running(), &stage.model.id))?;
    loop {
        let (name, how) = tokio::select! {
            _ = tokio::signal::ctrl_c() => return cluster.stop().await,
            ended = cluster.ended() => ended,
        };
        say(&format!(
            "{name} ended ({how}); its sessions go on at the others. Back in {} s.\n",
            AWAY.as_secs()
        ))?;
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return cluster.stop().await,
            () = tokio::time::sleep(AWAY) => {}
        }
        let took = cluster.refill().await?;
        say(&format!("{name} is back, and filled again after {:.1} s.\n", took.as_secs_f64()))?;
        say(&pids(&cluster.running()))?;
    }
}

/// The nodes with their processes.
fn pids(nodes: &[(&str, &str, u32)]) -> String {
    nodes.iter().map(|(name, url, pid)| format!("  {name}  {url}  pid {pid}\n")).collect()
}

fn hints(nodes: &[(&str, &str, u32)], model: &str) -> String {
    let url = nodes.first().map_or("", |(_, url, _)| *url);
    let pids = pids(nodes);
    format!(
        "
The nodes go on until Ctrl-C. Try, in another terminal:

  keepwarm chat --url {url} --session me
  keepwarm status --url {url}
  curl {url}/v1/sessions
  curl {url}/v1/cluster
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -H 'X-Session-ID: me' \\
       -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Why is the sea salty?\"}}]}}'
  curl {url}/openapi.json

kill -9 any of these, and go on with `keepwarm chat --session me` at the URL of another:

{pids}
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
            let gpus = hbm.0 * u64::from(cluster::NODES);
            assert!(gpus < pinned.0, "{hbm} {pinned}");
            let all = script.len() as f64 * hbm.0 as f64 / SESSIONS_PER_GPU;
            assert!(gpus as f64 <= 0.75 * all && all <= pinned.0 as f64);
        }
    }

    #[test]
    fn the_hints_name_addresses_and_processes() {
        let hints =
            hints(&[("n1", "http://127.0.0.1:7777", 11), ("n2", "http://127.0.0.1:7778", 12)], "tiny");
        for part in [
            "curl http://127.0.0.1:7777/openapi.json",
            "\"model\": \"tiny\"",
            "kill -9 any of these",
            "n2  http://127.0.0.1:7778  pid 12",
        ] {
            assert!(hints.contains(part), "{part}: {hints}");
        }
    }
}
