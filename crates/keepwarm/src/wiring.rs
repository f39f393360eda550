//! `keepwarm serve`: from options to a running node, and back down in order.
//!
//! The listener is bound first, so that a port in use is told before memory is taken; the line on standard
//! output comes when requests are answered. A first signal ends the listener, lets accepted requests finish
//! and stops the node; a second one ends the process at once.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::time::Duration;

use keepwarm_api::{ApiState, Credentials, router};
use keepwarm_config::{BatchConfig, Config, ModelConfig, SingleNode};
use keepwarm_engine::chat::ChatBackend;
use keepwarm_engine::serve::Service;
use keepwarm_node::{Node, StartError};
use keepwarm_types::NodeName;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cli::ServeArgs;
use crate::commands::check::{load, node};
use crate::failure::Failure;
use crate::output::{note, print};

/// The node's name where no option says.
const NODE_DEFAULT: &str = "n1";
/// The node's part of the time in which to stop, at the end of it: a fifth. Connections have the rest.
const NODE_PART: u32 = 5;
/// What a second signal ends the process with: 128 + SIGTERM, as a shell would say.
const CODE_KILLED: i32 = 143;

/// Runs a node until a signal, the end of standard input (where that is asked for), or its failure.
pub(crate) async fn serve(args: ServeArgs) -> Result<(), Failure> {
    let (mut config, name) = configuration(&args)?;
    let stop = stop_signal(args.until_stdin_ends)?;
    let (listener, address) = bind(&config, &name).await?;
    for node in config.nodes.iter_mut().filter(|node| node.name == name) {
        node.http = address.to_string();
    }
    let credentials = Arc::new(Credentials::new(&config.tenants));
    let models = config.models.clone();
    let mut running = Node::start(config, &name).await.map_err(start_failure)?;
    let handle = running.handle();
    let relays = running.take_relays();
    // Reading and unpacking a model takes a second or more of this thread.
    let service =
        tokio::task::block_in_place(|| Service::start(&handle, &models)).map_err(Failure::config)?;
    let chat: Arc<dyn ChatBackend> = Arc::new(service);
    let router = router(ApiState { handle, chat, credentials });
    if let Some(relays) = relays {
        tokio::spawn(keepwarm_api::serve_relayed(relays, router.clone()));
    }
    print(&format!("ready http={address} node={name}\n"))?;
    tracing::info!(%address, node = %name, "ready");
    let grace = Duration::from_secs(args.stop_grace);
    let node_part = grace / NODE_PART;
    let mut stopped = stop.clone();
    let until = async move {
        // An error means that nobody can signal any more, which is a reason to stop too.
        let _ = stopped.wait_for(|stop| *stop).await;
        tracing::info!("stopping: requests under way may finish; a second signal ends the process at once");
    };
    let (cut, failed) = tokio::select! {
        served = keepwarm_api::serve(listener, router, until, grace - node_part) => match served {
            Ok(cut) => (cut, None),
            Err(error) => (0, Some(error.to_string())),
        },
        reason = running.failed() => (0, Some(reason)),
    };
    let again = running.superseded();
    let report = running.shutdown(node_part).await;
    tracing::info!(?report, cut, "stopped");
    match failed {
        Some(reason) if again => {
            tracing::warn!(%reason, "starting anew");
            Err(start_anew())
        }
        Some(reason) => Err(Failure::failed(format!("the node cannot go on: {reason}"))),
        None if cut + report.unfinished + report.checkpoints > 0 => Err(Failure::failed(format!(
            "stopped with {cut} connections, {} requests and {} checkpoints unfinished after {} s: a longer \
             --stop-grace lets them end",
            report.unfinished,
            report.checkpoints,
            grace.as_secs()
        ))),
        None => Ok(()),
    }
}

/// Becomes a new process of the same command line, under the same process id: a clean slate, and whoever watches this
/// process sees it go on. Comes back only if that failed.
fn start_anew() -> Failure {
    let mut arguments = std::env::args_os();
    let program = std::env::current_exe().ok().or_else(|| arguments.next().map(PathBuf::from));
    let Some(program) = program else {
        return Failure::failed("this program cannot be found to start it anew");
    };
    let error = process::Command::new(program).args(std::env::args_os().skip(1)).exec();
    Failure::failed(format!("cannot start anew: {error}"))
}

fn start_failure(error: StartError) -> Failure {
    match error {
        StartError::Cluster(ref cause) if cause.is_unavailable() => Failure::unavailable(error),
        StartError::UnknownNode { .. }
        | StartError::Cluster(_)
        | StartError::Device { .. }
        | StartError::Memory { .. } => Failure::config(error),
        StartError::Catalog(_) => Failure::unavailable(error),
        StartError::Actors(_) => Failure::failed(error),
    }
}

/// The configuration and which node of it this is.
fn configuration(args: &ServeArgs) -> Result<(Config, NodeName), Failure> {
    if let Some(path) = &args.config {
        let config = load(path)?;
        let name = node(&config, args.node.as_ref())?.name.clone();
        return Ok((config, name));
    }
    let default = || NODE_DEFAULT.parse().map_err(Failure::config);
    let name: NodeName = args.node.clone().map_or_else(default, Ok)?;
    let data_dir = match (&args.data_dir, args.ephemeral) {
        (_, true) => None,
        (Some(folder), false) => Some(folder.clone()),
        (None, false) => Some(data_dir_default(&name)?),
    };
    let models = args.model.as_deref().map(model).transpose()?.into_iter().collect();
    let config = Config::single(SingleNode {
        name: name.clone(),
        http: args.http.clone(),
        gpus: args.gpus.iter().map(|spec| spec.0.clone()).collect(),
        pinned: args.pinned,
        data_dir,
        models,
    });
    Ok((config, name))
}

/// `$XDG_DATA_HOME/keepwarm/NODE`, else under `~/.local/share`.
fn data_dir_default(name: &NodeName) -> Result<PathBuf, Failure> {
    let set =
        |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_DATA_HOME").or_else(|| set("HOME").map(|home| home.join(".local/share")));
    let base = base.ok_or_else(|| Failure::usage("there is no HOME: give --data-dir DIR, or --ephemeral"))?;
    Ok(base.join("keepwarm").join(name.as_str()))
}

/// The prefix of a model with random weights.
const TINY: &str = "tiny:";

/// A model from `--model`: a GGUF file, served under the file's name without its quantisation, or `tiny:SEED`.
pub(crate) fn model(text: &str) -> Result<ModelConfig, Failure> {
    let (name, source) = if text.starts_with(TINY) {
        ("tiny-random".to_owned(), text.to_owned())
    } else {
        let path = Path::new(text);
        if !path.is_file() {
            return Err(Failure::config(format!(
                "--model {text}: there is no such file; `keepwarm model fetch` gets one"
            )));
        }
        (model_name(path), format!("gguf:{text}"))
    };
    Ok(ModelConfig { name, source, instances: (1, 1), batch: BatchConfig::default() })
}

/// `SmolLM2-135M-Instruct.Q4_1.gguf` is served as `smollm2-135m-instruct`.
fn model_name(path: &Path) -> String {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().to_lowercase()).unwrap_or_default();
    let quantisation = |text: &str| {
        let rest =
            text.strip_prefix('q').or_else(|| text.strip_prefix('f')).or_else(|| text.strip_prefix("bf"));
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    match stem.rsplit_once(['.', '-']) {
        Some((name, last)) if quantisation(last) && !name.is_empty() => name.to_owned(),
        _ => stem,
    }
}

/// Binds the node's address. Without tenants there are no credentials, so only loopback is served.
async fn bind(config: &Config, name: &NodeName) -> Result<(TcpListener, SocketAddr), Failure> {
    let http = &node(config, Some(name))?.http;
    let resolved = tokio::net::lookup_host(http.as_str()).await;
    let addresses: Vec<_> = resolved
        .map_err(|error| Failure::config(format!("http '{http}': {error}: write HOST:PORT")))?
        .collect();
    if config.tenants.is_empty()
        && let Some(open) = addresses.iter().find(|address| !address.ip().is_loopback())
    {
        return Err(Failure::config(format!(
            "http '{http}' is {open}, beyond loopback: name at least one [[tenant]] in a --config file to serve it"
        )));
    }
    let listener = TcpListener::bind(&addresses[..]).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Failure::unavailable(format!(
            "http '{http}' is in use by another process: stop it, or choose another port (port 0 picks a free one)"
        )),
        _ => Failure::unavailable(format!("http '{http}' cannot be bound: {error}")),
    })?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Turns true at the first SIGTERM or SIGINT, or when standard input ends; a second signal ends the process.
fn stop_signal(until_stdin_ends: bool) -> Result<watch::Receiver<bool>, Failure> {
    let (stop, stopped) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        for signals in 0..2 {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                () = stdin_end(), if until_stdin_ends && signals == 0 => {}
            }
            let _ = stop.send(true);
        }
        note("keepwarm: a second signal: ended at once");
        process::exit(CODE_KILLED);
    });
    Ok(stopped)
}

async fn stdin_end() {
    let mut byte = [0];
    while matches!(tokio::io::stdin().read(&mut byte).await, Ok(1)) {}
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::failure::Kind;

    fn args(line: &str) -> ServeArgs {
        match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Serve(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn models_are_served_under_their_names() {
        for (file, name) in [
            ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
            ("llama-3-8b-f16.gguf", "llama-3-8b"),
            ("plain.gguf", "plain"),
            ("v1.final.gguf", "v1.final"),
        ] {
            assert_eq!(model_name(Path::new(file)), name);
        }
        assert_eq!(model("tiny:7").unwrap().source, "tiny:7");
        assert_eq!(model("/no/such.gguf").unwrap_err().kind(), Kind::Config);
    }

    #[test]
    fn options_make_a_cluster_of_one() {
        let (config, name) =
            configuration(&args("keepwarm serve --ephemeral --gpu host=64MiB --gpu host=32MiB --node a"))
                .unwrap();
        let node = config.node(&name).unwrap();
        assert_eq!((node.gpus.len(), node.data_dir.as_ref(), name.as_str()), (2, None, "a"));
    }

    #[tokio::test]
    async fn an_address_beyond_loopback_or_in_use_is_refused_with_what_to_do() {
        let refuse = async |http: &str| {
            let (config, name) =
                configuration(&args(&format!("keepwarm serve --ephemeral --http {http}"))).unwrap();
            bind(&config, &name).await.unwrap_err()
        };
        let open = refuse("0.0.0.0:0").await;
        assert!(open.kind() == Kind::Config && open.to_string().contains("[[tenant]]"), "{open}");
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let busy = refuse(&taken.local_addr().unwrap().to_string()).await;
        assert!(busy.kind() == Kind::Unavailable && busy.to_string().contains("in use"), "{busy}");
        assert_eq!(refuse("nonsense").await.kind(), Kind::Config);
    }
}
