//! The demo's servers: processes of this same binary, started, killed and ended by their id.
//!
//! A server ends with the demo, however that ends: it is killed when its [`Server`] is dropped, and stops by
//! itself when its standard input closes, which the system does for a demo that was killed. It has a process
//! group of its own, so that Ctrl-C in the terminal reaches the demo alone.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use keepwarm_client::Client;
use keepwarm_types::Bytes;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::failure::Failure;

/// How long a server may take to load its model and be ready.
const START_MAX: Duration = Duration::from_secs(60);
/// How long it may take to stop before it is killed.
const STOP_MAX: Duration = Duration::from_secs(10);
/// Longest part of a log that an error repeats.
const LOG_LINES: usize = 12;

/// How to start a server.
#[derive(Debug, Clone)]
pub(crate) struct ServerSpec {
    /// What `serve` takes, beside where it listens.
    arguments: Vec<OsString>,
    /// Where its log goes.
    log: PathBuf,
}

impl ServerSpec {
    /// A node of a cluster, as its file has it.
    pub(crate) fn node(config: &Path, name: &str, log: PathBuf) -> Self {
        let arguments = ["--config".into(), config.into(), "--node".into(), name.into()];
        Self { arguments: arguments.to_vec(), log }
    }

    /// A node alone, with one host GPU, at a port that is free.
    pub(crate) fn alone(folder: &Path, memory: Bytes, model: &str, log: PathBuf) -> Self {
        let gpu = format!("host={}", memory.0);
        let pinned = memory.0.to_string();
        let mut arguments: Vec<OsString> = ["--http", "127.0.0.1:0", "--data-dir"].map(Into::into).to_vec();
        arguments.push(folder.into());
        arguments.extend(["--gpu", &gpu, "--pinned", &pinned, "--model", model].map(Into::into));
        Self { arguments, log }
    }
}

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    stdin: Option<ChildStdin>,
    _stdout: BufReader<ChildStdout>,
    client: Client,
}

impl Server {
    /// Starts a server and waits until it is ready.
    pub(crate) async fn start(spec: &ServerSpec) -> Result<Self, Failure> {
        let program = std::env::current_exe()
            .map_err(|error| Failure::failed(format!("this program's file: {error}")))?;
        let log = File::options().create(true).append(true).open(&spec.log)?;
        let mut command = Command::new(program);
        command.args(["serve", "--until-stdin-ends"]).args(&spec.arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).process_group(0).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| Failure::failed(format!("the server: {error}")))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().ok_or_else(|| Failure::failed("the server has no output"))?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        let read = tokio::time::timeout(START_MAX, stdout.read_line(&mut line)).await;
        let address = line.trim().strip_prefix("ready http=").and_then(|rest| rest.split(' ').next());
        match (read, address) {
            (Ok(Ok(_)), Some(address)) => {
                let client = Client::new(&format!("http://{address}"))?;
                Ok(Self { child, stdin, _stdout: stdout, client })
            }
            (Ok(read), _) => {
                let ended =
                    if read.is_ok_and(|bytes| bytes == 0) { "it ended" } else { "it said something else" };
                Err(Failure::failed(format!("the server did not get ready: {ended}\n{}", tail(&spec.log))))
            }
            (Err(_), _) => Err(Failure::failed(format!(
                "the server was not ready within {} s\n{}",
                START_MAX.as_secs(),
                tail(&spec.log)
            ))),
        }
    }

    /// The process's number; none once it has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    pub(crate) const fn client(&self) -> &Client {
        &self.client
    }

    /// SIGKILL: the process has no chance to write, flush or say anything.
    pub(crate) async fn kill(mut self) -> Result<(), Failure> {
        Ok(self.child.kill().await?)
    }

    /// Lets it finish what it accepted, and ends it where that takes too long.
    pub(crate) async fn stop(mut self) -> Result<(), Failure> {
        drop(self.stdin.take());
        if tokio::time::timeout(STOP_MAX, self.child.wait()).await.is_err() {
            self.child.kill().await?;
        }
        Ok(())
    }

    /// Resolves when the process has ended, with how.
    pub(crate) async fn ended(&mut self) -> String {
        match self.child.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        }
    }
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
