//! The command line: every command and option, once.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use keepwarm_config::{DeviceKind, DeviceSpec};
use keepwarm_types::{Bytes, NodeName};
use uuid::Uuid;

/// Where client commands find a node, unless told otherwise: where `serve` answers by default.
const URL_DEFAULT: &str = "http://127.0.0.1:7000";

/// A session store for GPU inference.
#[derive(Debug, Parser)]
#[command(name = "keepwarm", version, about, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print one JSON document instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// How the log on standard error looks; what it has is set by RUST_LOG.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a node.
    Serve(Box<ServeArgs>),
    /// Watch conversations leave a GPU's memory, come back, and survive a kill; with figures and checks.
    Demo(DemoArgs),
    /// Write a cluster for this machine: cluster.toml, bootstrap file, authority and node certificates.
    Init(InitArgs),
    /// Certificates: who may be a node of the cluster.
    Cert {
        #[command(subcommand)]
        verb: CertVerb,
    },
    /// Check a cluster.toml, or this machine.
    Check(CheckArgs),
    /// GPUs of this machine.
    Gpu {
        #[command(subcommand)]
        verb: GpuVerb,
    },
    /// Show nodes, GPUs, memory and models.
    Status(Remote),
    /// List, show, move and end sessions.
    Sessions {
        #[command(flatten)]
        remote: Remote,
        #[command(subcommand)]
        verb: SessionVerb,
    },
    /// Talk with a model; a session id continues where it was left.
    Chat(ChatArgs),
    /// Put and get parts of one size, and say how fast that was.
    Bench(BenchArgs),
    /// Models on this machine.
    Model {
        #[command(subcommand)]
        verb: ModelVerb,
    },
}

/// Which server a client command asks.
#[derive(Debug, Clone, Args)]
pub(crate) struct Remote {
    /// Address of a node.
    #[arg(long, global = true, env = "KEEPWARM_URL", default_value = URL_DEFAULT)]
    pub(crate) url: String,
    /// The tenant's bearer token.
    #[arg(long, global = true, env = "KEEPWARM_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
}

/// Seconds in which to stop: a default answer of 512 tokens at some 12 tokens a second, and a part for the node.
const STOP_GRACE_S: u64 = 60;
/// A day: longer is surely a slip.
const STOP_GRACE_MAX_S: u64 = 86_400;

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The cluster's file; without one, a cluster of one from the options below.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["http", "data_dir", "ephemeral", "gpus", "pinned", "model"])]
    pub(crate) config: Option<PathBuf>,
    /// Which node of the file this is; the only one where absent.
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<NodeName>,
    /// Where to answer HTTP; port 0 picks one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7000")]
    pub(crate) http: String,
    /// Where the catalog lies: manifests and transcripts, so that sessions outlive the process.
    #[arg(long, value_name = "DIR", conflicts_with = "ephemeral")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Keep the catalog in memory: sessions end with the process.
    #[arg(long)]
    pub(crate) ephemeral: bool,
    /// A GPU and how much of its memory to take, as in host=256MiB; may be repeated.
    #[arg(long = "gpu", value_name = "DEVICE=SIZE")]
    pub(crate) gpus: Vec<DeviceSpec>,
    /// Page-locked host memory.
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub(crate) pinned: Bytes,
    /// A GGUF file to serve; or tiny:SEED, a tiny model with random weights.
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<String>,
    /// Seconds in which to stop: answers under way may end, then the node writes down what it took.
    #[arg(long, value_name = "SECONDS", default_value_t = STOP_GRACE_S, value_parser = clap::value_parser!(u64).range(1..=STOP_GRACE_MAX_S))]
    pub(crate) stop_grace: u64,
    /// Stop when standard input ends: whoever started this process and holds the other end is gone then.
    #[arg(long, hide = true)]
    pub(crate) until_stdin_ends: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// A GGUF file to use instead of fetching one; or tiny:SEED.
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<String>,
    /// The GPU of the first node, of the second, ...: cuda:0, or a MIG UUID. Nodes without one have host memory in its place.
    #[arg(long, value_name = "DEVICE")]
    pub(crate) gpu: Vec<DeviceKind>,
    /// End when all is shown, with 1 if a check failed, instead of serving on.
    #[arg(long)]
    pub(crate) exit: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// How many nodes, on this machine.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) nodes: u16,
    /// Where to write; nothing there is overwritten.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// HTTP is at this port + 1, + 2, ...; peers at + 101, + 102, ...
    #[arg(long, value_name = "PORT", default_value_t = 7000)]
    pub(crate) port_base: u16,
    /// Copies of each session's bytes; where absent 2, or 1 where there is one node.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) replication: Option<u32>,
    /// The cluster's name.
    #[arg(long, value_name = "NAME", default_value = "local")]
    pub(crate) cluster: String,
    /// A GGUF file for every node to serve; or tiny:SEED, a tiny model with random weights.
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<String>,
}

/// Days that an authority's certificate is valid: ten years.
pub(crate) const CA_DAYS: u32 = 3650;
/// Days that a node's certificate is valid: a year.
pub(crate) const NODE_DAYS: u32 = 365;
/// Most days: beyond, clocks and formats have other ideas than the certificate.
const DAYS_MAX: i64 = 36_500;

#[derive(Debug, Subcommand)]
pub(crate) enum CertVerb {
    /// Make the cluster's authority; or replace it while both are trusted; or end the trust in the old one.
    Ca(CaArgs),
    /// Issue a node's certificate and key; again to replace them.
    Node {
        /// The node, as cluster.toml names it.
        name: NodeName,
        #[command(flatten)]
        folder: CertFolder,
        /// How long it is valid.
        #[arg(long, default_value_t = NODE_DAYS, value_parser = clap::value_parser!(u32).range(1..=DAYS_MAX))]
        days: u32,
    },
    /// Show which certificates there are, and how long they are valid.
    Show {
        #[command(flatten)]
        folder: CertFolder,
    },
}

/// Where certificates lie.
#[derive(Debug, Args)]
pub(crate) struct CertFolder {
    /// The folder of ca.pem, ca.key, NODE.pem and NODE.key.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct CaArgs {
    #[command(flatten)]
    pub(crate) folder: CertFolder,
    /// The cluster that it vouches for.
    #[arg(long, value_name = "NAME", required_unless_present_any = ["rotate", "drop_old"])]
    pub(crate) cluster: Option<String>,
    /// How long it is valid.
    #[arg(long, default_value_t = CA_DAYS, value_parser = clap::value_parser!(u32).range(1..=DAYS_MAX))]
    pub(crate) days: u32,
    /// Put a new authority in front of the old one: both are trusted while nodes get new certificates.
    #[arg(long, conflicts_with = "drop_old")]
    pub(crate) rotate: bool,
    /// Trust the newest authority alone; refused while a node here still has an older one's certificate.
    #[arg(long)]
    pub(crate) drop_old: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The file to check.
    #[arg(required_unless_present = "host")]
    pub(crate) file: Option<PathBuf>,
    /// Look at this machine too: memory, locking, open files, devices, folders, addresses.
    #[arg(long)]
    pub(crate) host: bool,
    /// Which node of the file this machine is; the only one where absent.
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<NodeName>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum GpuVerb {
    /// Show the driver and its devices; with a file, what a node of it would reserve, and whether it can.
    Probe(ProbeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ProbeArgs {
    /// The cluster's file.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Which node of the file this machine is; the only one where absent.
    #[arg(long, value_name = "NAME", requires = "config")]
    pub(crate) node: Option<NodeName>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SessionVerb {
    /// List sessions, in the order of their ids.
    Ls {
        /// Only sessions with this label; may be repeated.
        #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
        labels: Vec<(String, String)>,
        /// At most so many.
        #[arg(long, default_value_t = 1000)]
        limit: usize,
    },
    /// Show one session.
    Show {
        /// Its id, or the name that it was bound by.
        id: String,
    },
    /// Where its bytes are and how they came there.
    Explain {
        /// Its id, or the name that it was bound by.
        id: String,
    },
    /// Write it to an archive.
    Export {
        /// Its id, or the name that it was bound by.
        id: String,
        /// The file to write; standard output where absent.
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Take an archive as a new session.
    Import {
        /// The archive.
        file: PathBuf,
        /// Another id than the archive's.
        #[arg(long)]
        id: Option<Uuid>,
    },
    /// End sessions and give their memory back.
    Rm {
        /// Their ids, or the names that they were bound by.
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("'{text}' is not NAME=VALUE")),
    }
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) remote: Remote,
    /// The session to continue, or to make: a UUID or any text.
    #[arg(long, value_name = "ID")]
    pub(crate) session: Option<String>,
    /// Which model; the first where absent.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 256)]
    pub(crate) max_tokens: u32,
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// What tiers colder than a GPU keep of a session that this makes; one that is there already must have the same.
    #[arg(long, value_name = "FORM")]
    pub(crate) cold: Option<Cold>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cold {
    /// The bytes as they are.
    Exact,
    /// Half of them, and nearly the same numbers.
    Fp8,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) remote: Remote,
    /// Size of a part.
    #[arg(long, default_value = "16MiB")]
    pub(crate) size: Bytes,
    /// How often each connection puts and gets.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) count: u32,
    /// Connections at once, each with a session of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) connections: u32,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelVerb {
    /// Fetch the demo's model into the cache, once, and print where it lies.
    Fetch,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Cli::command().debug_assert();
    }

    #[test]
    fn init_and_cert_take_the_options_of_the_contract() {
        let command = |line: &str| Cli::try_parse_from(line.split(' ')).unwrap().command;
        let Command::Init(args) = command("keepwarm init --dir d") else { panic!("not init") };
        assert_eq!((args.nodes, args.port_base, args.replication, args.model), (3, 7000, None, None));
        let line =
            "keepwarm init --nodes 5 --dir d --port-base 9000 --replication 3 --cluster c --model tiny:1";
        let Command::Init(args) = command(line) else { panic!("not init") };
        assert_eq!((args.nodes, args.port_base, args.replication), (5, 9000, Some(3)));
        assert_eq!((args.cluster.as_str(), args.model.as_deref()), ("c", Some("tiny:1")));
        let line = "keepwarm cert ca --dir d --cluster c --days 30";
        let Command::Cert { verb: CertVerb::Ca(args) } = command(line) else { panic!("not cert ca") };
        assert_eq!((args.cluster.as_deref(), args.days, args.rotate), (Some("c"), 30, false));
        let Command::Cert { verb: CertVerb::Node { name, days, .. } } =
            command("keepwarm cert node n1 --dir d")
        else {
            panic!("not cert node")
        };
        assert_eq!((name.as_str(), days), ("n1", 365));
        for good in [
            "keepwarm cert ca --rotate --dir d",
            "keepwarm cert ca --drop-old --dir d",
            "keepwarm cert show --dir d --json",
        ] {
            command(good);
        }
        for bad in [
            "keepwarm init",
            "keepwarm init --dir d --nodes 0",
            "keepwarm init --dir d --replication 0",
            "keepwarm init --dir d --port-base 70000",
            "keepwarm cert ca --dir d",
            "keepwarm cert ca --dir d --rotate --drop-old",
            "keepwarm cert ca --dir d --cluster c --days 0",
            "keepwarm cert node --dir d",
            "keepwarm cert node a/b --dir d",
            "keepwarm cert show",
        ] {
            assert!(Cli::try_parse_from(bad.split(' ')).is_err(), "{bad}");
        }
    }

    #[test]
    fn serve_takes_the_options_of_the_contract() {
        let line =
            "keepwarm serve --http 127.0.0.1:0 --ephemeral --gpu host=256MiB --gpu host=1GiB --pinned 2GiB";
        let Command::Serve(args) = Cli::try_parse_from(line.split(' ')).unwrap().command else {
            panic!("not serve");
        };
        assert_eq!((args.gpus.len(), args.pinned, args.ephemeral), (2, Bytes(2 << 30), true));
        for bad in [
            "keepwarm serve --gpu host",
            "keepwarm serve --gpu gpu7=1GiB",
            "keepwarm serve --pinned 5GB",
            "keepwarm serve --config c.toml --ephemeral",
            "keepwarm serve --data-dir d --ephemeral",
            "keepwarm check",
            "keepwarm sessions rm",
            "keepwarm bench --connections 0",
        ] {
            assert!(Cli::try_parse_from(bad.split(' ')).is_err(), "{bad}");
        }
    }
}
