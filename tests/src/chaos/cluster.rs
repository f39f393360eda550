//! A cluster of node processes on this machine: started, killed, stopped and continued, each by its id.
//!
//! The processes end with this one: they are killed when the [`Cluster`] is dropped, and where this process is killed they
//! end by themselves, since their standard input closes (one that is stopped then ends once it is continued).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

/// How long a process may take until it says that it is ready.
const READY_MAX: Duration = Duration::from_secs(60);
/// How long `init`, and a killed process, may take to end.
const END_MAX: Duration = Duration::from_secs(20);
/// Ports of a cluster: HTTP above the base, peers from a hundred above it on.
const PORTS: u16 = 200;
/// Lowest base.
const BASE_MIN: u16 = 20_000;
/// How many bases are tried.
const BASES: u16 = 60;
/// What nodes write into their logs, where the environment does not say.
const LOG: &str = "info,openraft=off";

/// One process.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub url: String,
    child: Option<Child>,
    /// Kept open: a node that starts anew says again that it is ready.
    out: Option<BufReader<ChildStdout>>,
}

/// All processes, and the folder of their files and logs.
#[derive(Debug)]
pub struct Cluster {
    program: PathBuf,
    folder: PathBuf,
    /// What the environments of nodes have beside this process's own.
    environment: Vec<(String, Vec<(String, String)>)>,
    pub nodes: Vec<Node>,
}

/// A base whose ports are free; they may be taken before they are bound, which fails loudly.
fn free_base(nodes: u16) -> Result<u16, String> {
    let free = |base: u16| {
        (1..=nodes).all(|n| {
            std::net::TcpListener::bind(("127.0.0.1", base + n)).is_ok()
                && std::net::UdpSocket::bind(("127.0.0.1", base + 100 + n)).is_ok()
        })
    };
    // Processes that look at the same time begin at different places.
    let start = (std::process::id() % u32::from(BASES)) as u16;
    (0..BASES)
        .map(|n| BASE_MIN + (start + n) % BASES * PORTS)
        .find(|base| free(*base))
        .ok_or_else(|| format!("no {nodes} free ports in {BASE_MIN}..{}", BASE_MIN + BASES * PORTS))
}

/// Copies a folder with all that is in it.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

impl Cluster {
    /// Makes a cluster in `folder` with `init` of the program, and starts its nodes.
    ///
    /// # Errors
    /// What `init` or a node said.
    pub async fn start(program: &Path, folder: &Path, nodes: u16) -> Result<Self, String> {
        Self::start_changed(program, folder, nodes, |_, file| file, Vec::new()).await
    }

    /// The same with a changed `cluster.toml`, and with more in the environments of nodes, by name.
    ///
    /// # Errors
    /// What `init` or a node said.
    pub async fn start_changed(
        program: &Path,
        folder: &Path,
        nodes: u16,
        change: impl FnOnce(&Path, String) -> String,
        environment: Vec<(String, Vec<(String, String)>)>,
    ) -> Result<Self, String> {
        let base = free_base(nodes)?;
        let mut init = Command::new(program);
        init.args(["init", "--nodes", &nodes.to_string(), "--port-base", &base.to_string(), "--dir"]);
        let made = timeout(END_MAX, init.arg(folder.join("cluster")).kill_on_drop(true).output());
        let made = made.await.map_err(|_| format!("init took more than {} s", END_MAX.as_secs()))?;
        let made = made.map_err(|error| format!("{}: {error}", program.display()))?;
        if !made.status.success() {
            return Err(format!("init: {}", String::from_utf8_lossy(&made.stderr)));
        }
        let file = folder.join("cluster/cluster.toml");
        let text = std::fs::read_to_string(&file).map_err(|error| error.to_string())?;
        let small = text.replace("256MiB", "16MiB").replace("512MiB", "64MiB");
        std::fs::write(&file, change(folder, small)).map_err(|error| error.to_string())?;
        let node = |n: u16| Node {
            name: format!("n{n}"),
            url: format!("http://127.0.0.1:{}", base + n),
            child: None,
            out: None,
        };
        let mut cluster = Self {
            program: program.to_owned(),
            folder: folder.to_owned(),
            environment,
            nodes: (1..=nodes).map(node).collect(),
        };
        cluster.start_all().await?;
        Ok(cluster)
    }

    /// Starts a node; it is not ready yet.
    ///
    /// # Errors
    /// Why it did not start.
    pub fn spawn(&mut self, node: usize) -> Result<(), String> {
        let name = self.nodes[node].name.clone();
        let log = self.folder.join(format!("{name}.log"));
        let log = std::fs::File::options().create(true).append(true).open(log);
        let more = self.environment.iter().filter(|(node, _)| *node == name).flat_map(|(_, more)| more);
        let child = Command::new(&self.program)
            .envs(more.map(|(key, value)| (key, value)))
            .args(["serve", "--until-stdin-ends", "--node", &name, "--config"])
            .arg(self.folder.join("cluster/cluster.toml"))
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| LOG.to_owned()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.map_err(|error| error.to_string())?)
            .process_group(0)
            .kill_on_drop(true)
            .spawn();
        self.nodes[node].child = Some(child.map_err(|error| format!("{name}: {error}"))?);
        Ok(())
    }

    /// Waits until a node that was started says that it is ready.
    ///
    /// # Errors
    /// What it said instead.
    pub async fn ready(&mut self, node: usize) -> Result<(), String> {
        let node = &mut self.nodes[node];
        let name = &node.name;
        let out = node.child.as_mut().and_then(|child| child.stdout.take());
        let mut out = BufReader::new(out.ok_or_else(|| format!("{name} was not started"))?);
        let mut line = String::new();
        let read = timeout(READY_MAX, out.read_line(&mut line)).await;
        node.out = Some(out);
        match read {
            Ok(Ok(_)) if line.starts_with("ready http=") => Ok(()),
            Ok(_) => {
                Err(format!("{name} ended, or said '{}', before it was ready: see its log", line.trim()))
            }
            Err(_) => Err(format!("{name} was not ready within {} s: see its log", READY_MAX.as_secs())),
        }
    }

    /// Starts all nodes that do not run, at once, and waits until they are ready.
    ///
    /// # Errors
    /// As [`Self::ready`].
    pub async fn start_all(&mut self) -> Result<(), String> {
        let down: Vec<_> = (0..self.nodes.len()).filter(|node| self.nodes[*node].child.is_none()).collect();
        for node in &down {
            self.spawn(*node)?;
        }
        for node in down {
            self.ready(node).await?;
        }
        Ok(())
    }

    /// SIGKILL to each of these before any is waited for.
    ///
    /// # Errors
    /// The system's.
    pub async fn kill(&mut self, nodes: &[usize]) -> Result<(), String> {
        for node in nodes {
            if let Some(child) = &mut self.nodes[*node].child {
                child.start_kill().map_err(|error| error.to_string())?;
            }
        }
        for node in nodes {
            if let Some(mut child) = self.nodes[*node].child.take() {
                let ended = timeout(END_MAX, child.wait()).await;
                let ended = ended.map_err(|_| {
                    format!("{} was killed, and runs {} s later", self.nodes[*node].name, END_MAX.as_secs())
                })?;
                ended.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// Kills all that run, and waits until they have ended.
    ///
    /// # Errors
    /// As [`Self::kill`].
    pub async fn kill_all(&mut self) -> Result<(), String> {
        let all: Vec<_> = (0..self.nodes.len()).collect();
        self.kill(&all).await
    }

    /// Where a cluster's nodes keep what they keep on disk.
    fn disks(&self) -> PathBuf {
        self.folder.join("cluster")
    }

    /// Copies all disks; no node may run.
    ///
    /// # Errors
    /// The system's.
    pub fn copy_disks(&self) -> std::io::Result<()> {
        copy(&self.disks(), &self.folder.join("copy"))
    }

    /// Puts the copies back in place of the disks; no node may run.
    ///
    /// # Errors
    /// The system's.
    pub fn put_copies_back(&self) -> std::io::Result<()> {
        std::fs::remove_dir_all(self.disks())?;
        std::fs::rename(self.folder.join("copy"), self.disks())
    }

    /// SIGSTOP or SIGCONT.
    ///
    /// # Errors
    /// The system's; a node that does not run.
    pub fn signal(&self, node: usize, signal: Signal) -> Result<(), String> {
        let node = &self.nodes[node];
        let id = node.child.as_ref().and_then(Child::id).and_then(|id| Pid::from_raw(id.try_into().ok()?));
        let id = id.ok_or_else(|| format!("{} does not run", node.name))?;
        kill_process(id, signal).map_err(|error| format!("{}: {error}", node.name))
    }
}
