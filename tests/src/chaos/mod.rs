//! Chaos on real processes: nodes are killed, restarted and stopped while clients write and read; afterwards the
//! history of all calls must keep the promises of GUARANTEES.md.

pub mod checker;
pub(crate) mod clients;
pub mod cluster;
pub mod content;
pub mod history;
pub mod report;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::join_all;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::process::Signal;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use checker::{Promise, Violation};
use clients::{Asked, Process, Shared, Writer, reader};
use cluster::Cluster;
use history::History;
use report::{FaultReport, Report, longest, millis};

/// Nodes of the cluster.
const NODES: u16 = 3;
/// Writers, each with a session of its own.
const WRITERS: usize = 6;
/// Readers of all sessions.
const READERS: usize = 3;
/// Longest wait for anything that must happen.
const DEADLINE: Duration = Duration::from_secs(60);
/// Longest time between a kill and the start that follows at once.
const RESTART_MS_MAX: u64 = 200;
/// Writes of each session that must be acknowledged until a fault counts as survived.
const PROGRESS: u64 = 5;
/// Between two looks at a condition.
const POLL: Duration = Duration::from_millis(20);
/// Between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// What is done to processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; it comes back once the others have taken over.
    Kill,
    /// SIGKILL, and started again within 200 ms.
    Restart,
    /// SIGSTOP until others have taken over, then SIGCONT.
    Pause,
    /// SIGKILL to all, then all are started.
    All,
}

impl Fault {
    pub const ALL: [Self; 4] = [Self::Kill, Self::Restart, Self::Pause, Self::All];

    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Restart => "restart",
            Self::Pause => "pause",
            Self::All => "all",
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().find(|fault| fault.word() == text).copied();
        known.ok_or_else(|| format!("there is no fault '{text}'; there are kill, restart, pause, all"))
    }
}

/// What no cluster survives: the checker must see that promises were broken. A test of the test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// All nodes are killed, and the checker is not told: bytes are gone for no reason that it knows.
    UntoldKill,
    /// All nodes get their disks of some writes ago back: what was acknowledged since is gone.
    OldDisks,
}

impl Plant {
    pub const ALL: [Self; 2] = [Self::UntoldKill, Self::OldDisks];

    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::UntoldKill => "untold-kill",
            Self::OldDisks => "old-disks",
        }
    }
}

impl FromStr for Plant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().find(|plant| plant.word() == text).copied();
        known.ok_or_else(|| format!("there is no '{text}' to plant; there are untold-kill, old-disks"))
    }
}

/// How long faults are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// None begins after so many seconds.
    Seconds(u64),
    /// So many of them.
    Rounds(u64),
}

/// A run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The keepwarm binary.
    pub program: PathBuf,
    pub seed: u64,
    pub length: Length,
    /// Each of these comes before one comes again.
    pub faults: Vec<Fault>,
    /// Comes first.
    pub plant: Option<Plant>,
}

impl Options {
    /// What makes the same faults again.
    #[must_use]
    pub fn command(&self) -> String {
        let faults: Vec<_> = self.faults.iter().map(|fault| fault.word()).collect();
        let length = match self.length {
            Length::Seconds(seconds) => format!("--seconds {seconds}"),
            Length::Rounds(rounds) => format!("--rounds {rounds}"),
        };
        let plant = self.plant.map(|plant| format!(" --plant {}", plant.word())).unwrap_or_default();
        format!("cargo xtask chaos --seed {} {length} --faults {}{plant}", self.seed, faults.join(","))
    }
}

struct Run<'s> {
    cluster: Cluster,
    shared: &'s Shared<Process>,
    rng: ChaCha8Rng,
    faults: Vec<FaultReport>,
}

/// Runs it; an error is one of the run itself, such as a program that is not there.
///
/// # Errors
/// What kept the run from its work.
pub async fn run(options: &Options) -> Result<Report, String> {
    let kept = tempfile::Builder::new().prefix("keepwarm-chaos-").tempdir();
    let kept = kept.map_err(|error| format!("no temporary folder: {error}"))?;
    let cluster = Cluster::start(&options.program, kept.path(), NODES).await?;
    let nodes = cluster.nodes.iter().map(|node| Process::new(&node.name, &node.url));
    let shared = Shared::new(nodes.collect::<Result<_, _>>()?, History::default());
    let mut run =
        Run { cluster, shared: &shared, rng: ChaCha8Rng::seed_from_u64(options.seed), faults: Vec::new() };
    let stood = run.play(options).await.err();
    let stood = stood.map(|what| Violation {
        promise: Promise::StoodStill,
        session: None,
        at_ms: millis(shared.history.now()),
        what,
    });
    let ended = run.cluster.kill_all().await;
    let faults = std::mem::take(&mut run.faults);
    drop(run);
    ended?;
    shared.history.whole()?;
    let broken = shared.history.with(checker::check);
    let mut report = Report {
        seed: options.seed,
        command: options.command(),
        seconds: shared.history.now().as_secs_f64(),
        counts: shared.history.counts(),
        faults,
        broken: 0,
        violations: Vec::new(),
        folder: None,
    };
    report.found(stood.into_iter().chain(broken).collect());
    if !report.passed() {
        let folder = kept.keep();
        report.folder = Some(folder.clone());
        keep(&folder, &shared, &report).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    Ok(report)
}

/// Writes what is needed to understand a failure beside the logs.
fn keep(folder: &Path, shared: &Shared<Process>, report: &Report) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::new(std::fs::File::create(folder.join("history.jsonl"))?);
    shared
        .history
        .with(|records, _| records.iter().try_for_each(|record| writeln!(file, "{}", record.json())))?;
    file.flush()?;
    std::fs::write(folder.join("report.json"), serde_json::to_vec_pretty(report)?)
}

fn rng(options: &Options, stream: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    rng.set_stream(stream as u64 + 1);
    rng
}

impl Run<'_> {
    async fn play(&mut self, options: &Options) -> Result<(), String> {
        self.whole().await?;
        let shared = self.shared;
        let making = (0..WRITERS).map(|number| Writer::new(shared, number, rng(options, number)));
        let writers = timeout(DEADLINE, join_all(making)).await;
        let writers = writers.map_err(|_| format!("no first writes within {} s", DEADLINE.as_secs()))?;
        let writers = writers.into_iter().collect::<Result<Vec<_>, _>>()?;
        let sessions: Vec<_> = writers.iter().map(Writer::session).collect();
        let writing = join_all(writers.into_iter().map(Writer::run));
        let reading = join_all(
            (0..READERS).map(|number| reader(shared, number, &sessions, rng(options, WRITERS + number))),
        );
        let attack = async {
            let done = tokio::select! {
                done = self.attack(options) => done,
                () = tell_progress(shared) => Ok(()),
            };
            shared.stop.store(true, Ordering::SeqCst);
            done
        };
        let (done, _, _) = tokio::join!(attack, writing, reading);
        done?;
        last_look(shared, &sessions).await
    }

    async fn attack(&mut self, options: &Options) -> Result<(), String> {
        let begun = Instant::now();
        self.goes_on().await?;
        if let Some(plant) = options.plant {
            self.plant(plant).await?;
        }
        let mut bag: Vec<Fault> = Vec::new();
        for round in 0.. {
            let over = match options.length {
                Length::Seconds(seconds) => begun.elapsed() >= Duration::from_secs(seconds),
                Length::Rounds(rounds) => round >= rounds,
            };
            self.shared.history.whole()?;
            if over {
                break;
            }
            if bag.is_empty() {
                bag.clone_from(&options.faults);
                bag.shuffle(&mut self.rng);
            }
            let Some(fault) = bag.pop() else { break };
            self.fault(fault).await?;
        }
        Ok(())
    }

    /// Does what no promise covers.
    async fn plant(&mut self, plant: Plant) -> Result<(), String> {
        say(&format!("planted: {}", plant.word()));
        let all: Vec<_> = (0..self.cluster.nodes.len()).collect();
        match plant {
            Plant::UntoldKill => self.cluster.kill_all().await?,
            Plant::OldDisks => {
                self.kill(&all).await?;
                self.cluster.copy_disks().map_err(|error| error.to_string())?;
                self.cluster.start_all().await?;
                self.goes_on().await?;
                self.kill(&all).await?;
                self.cluster.put_copies_back().map_err(|error| error.to_string())?;
            }
        }
        self.cluster.start_all().await?;
        self.goes_on().await?;
        self.whole().await
    }

    /// Does one thing to the nodes, and waits until all is well again.
    async fn fault(&mut self, fault: Fault) -> Result<(), String> {
        let node = self.rng.random_range(0..self.cluster.nodes.len());
        let pause = Duration::from_millis(self.rng.random_range(0..RESTART_MS_MAX / 2));
        let all: Vec<_> = (0..self.cluster.nodes.len()).collect();
        let hit = if fault == Fault::All { all } else { vec![node] };
        let nodes: Vec<_> = hit.iter().map(|node| self.cluster.nodes[*node].name.clone()).collect();
        let begin = self.shared.history.now();
        say(&format!("{:>6.1} s  {} {}", begin.as_secs_f64(), fault.word(), nodes.join(",")));
        let within = |what: String| format!("after {} of {}: {what}", fault.word(), nodes.join(","));
        let restarted = self.hurt(fault, &hit, pause).await.map_err(within)?;
        self.goes_on().await.map_err(within)?;
        self.whole().await.map_err(within)?;
        let end = self.shared.history.now();
        let waited = |success: fn(&history::Record) -> bool| {
            millis(self.shared.history.with(|records, _| longest(records, (begin, end), success)))
        };
        self.faults.push(FaultReport {
            fault: fault.word().to_owned(),
            nodes,
            begin_ms: millis(begin),
            restart_ms: restarted.map(millis),
            whole_after_ms: millis(end - begin),
            longest_unwritable_ms: waited(report::written),
            longest_unreadable_ms: waited(report::read),
        });
        Ok(())
    }

    /// The fault itself; how long a restart took.
    async fn hurt(
        &mut self,
        fault: Fault,
        hit: &[usize],
        pause: Duration,
    ) -> Result<Option<Duration>, String> {
        match fault {
            Fault::Kill => {
                self.kill(hit).await?;
                self.goes_on().await?;
                self.cluster.start_all().await?;
            }
            Fault::Restart => {
                let begun = Instant::now();
                self.kill(hit).await?;
                sleep(pause).await;
                self.cluster.spawn(hit[0])?;
                let took = begun.elapsed();
                self.cluster.ready(hit[0]).await?;
                return Ok(Some(took));
            }
            Fault::Pause => {
                self.cluster.signal(hit[0], Signal::STOP)?;
                let over = self.taken_over(hit[0]).await;
                let on = if over.is_ok() { self.goes_on().await } else { Ok(()) };
                self.cluster.signal(hit[0], Signal::CONT)?;
                over.and(on)?;
            }
            Fault::All => {
                self.kill(hit).await?;
                self.cluster.start_all().await?;
            }
        }
        Ok(None)
    }

    /// Kills nodes, and notes it for the checker.
    async fn kill(&mut self, hit: &[usize]) -> Result<(), String> {
        let begin = self.shared.history.now();
        self.cluster.kill(hit).await?;
        let nodes = hit.iter().map(|node| self.cluster.nodes[*node].name.clone()).collect();
        self.shared.history.killed(nodes, begin);
        Ok(())
    }

    /// Waits until each session has some more acknowledged writes.
    async fn goes_on(&self) -> Result<(), String> {
        let from = self.shared.progress.lock().unwrap().clone();
        let behind = || -> BTreeMap<Uuid, u64> {
            let now = self.shared.progress.lock().unwrap();
            let more = |session: &Uuid| now[session] - from.get(session).copied().unwrap_or(0);
            now.keys().filter(|session| more(session) < PROGRESS).map(|one| (*one, more(one))).collect()
        };
        self.until(
            async || behind().is_empty(),
            || {
                let behind = behind();
                let last = behind.keys().next().and_then(|session| {
                    self.shared.history.with(|records, _| {
                        let of = |record: &&history::Record| record.session == *session;
                        records.iter().rev().find(of).map(|record| record.json().to_string())
                    })
                });
                format!(
                    "writes stand still, of these sessions: {behind:?}; the last call: {}",
                    last.unwrap_or_default()
                )
            },
        )
        .await
    }

    /// Waits until no shard has this node as its primary.
    async fn taken_over(&self, node: usize) -> Result<(), String> {
        let name = self.shared.nodes[node].name();
        let other = &self.shared.nodes[(node + 1) % self.shared.nodes.len()].client;
        let gone = async || {
            let shards = other.shards().await.map(|map| map.shards);
            let owned =
                |shard: &keepwarm_client::Shard| shard.replicas.first().is_some_and(|first| first == name);
            shards.is_ok_and(|shards| !shards.is_empty() && !shards.iter().any(owned))
        };
        self.until(gone, || format!("nobody took over from {name}")).await
    }

    /// Waits until every node is up and every promised copy is there.
    async fn whole(&self) -> Result<(), String> {
        let mut last = String::new();
        let begun = Instant::now();
        while begun.elapsed() < DEADLINE {
            let mut well = true;
            for node in &self.shared.nodes {
                let name = node.name();
                match node.client.cluster().await {
                    Ok(cluster)
                        if cluster.nodes.len() == self.shared.nodes.len()
                            && cluster
                                .nodes
                                .iter()
                                .all(|node| node.status == "up" && node.pinned.is_some())
                            && (cluster.under_replicated_shards, cluster.under_replicated_sessions)
                                == (0, 0) => {}
                    other => {
                        (well, last) = (false, format!("{name} says {other:?}"));
                        break;
                    }
                }
            }
            if well {
                return Ok(());
            }
            sleep(POLL).await;
        }
        Err(format!("copies stay missing for {} s: {last}", DEADLINE.as_secs()))
    }

    async fn until(&self, done: impl AsyncFn() -> bool, what: impl Fn() -> String) -> Result<(), String> {
        let begun = Instant::now();
        while !done().await {
            if begun.elapsed() > DEADLINE {
                return Err(format!("{} s: {}", DEADLINE.as_secs(), what()));
            }
            sleep(POLL).await;
        }
        Ok(())
    }
}

/// After all faults, every session and its bytes are asked for through every node.
pub(crate) async fn last_look<N: Asked>(shared: &Shared<N>, sessions: &[Uuid]) -> Result<(), String> {
    const CLIENT: &str = "last look";
    for session in sessions {
        for (node, asked) in shared.nodes.iter().enumerate() {
            let name = asked.name();
            let begun = Instant::now();
            let answered = async || {
                shared.look(CLIENT, node, *session).await.is_some()
                    && shared.read(CLIENT, node, *session).await
            };
            while !answered().await {
                if begun.elapsed() > DEADLINE {
                    return Err(format!(
                        "{name} does not give session {session} after all faults have ended"
                    ));
                }
                sleep(POLL).await;
            }
        }
    }
    Ok(())
}

/// A line now and then, for whoever waits.
async fn tell_progress(shared: &Shared<Process>) {
    loop {
        sleep(PROGRESS_EVERY).await;
        let counts = shared.history.counts();
        say(&format!(
            "{:>6.1} s  {} acknowledged, {} unknown, {} reads",
            shared.history.now().as_secs_f64(),
            counts.acknowledged,
            counts.unknown,
            counts.reads
        ));
    }
}

#[expect(clippy::print_stdout, reason = "whoever waits for a run is told where it is")]
fn say(line: &str) {
    println!("{line}");
}
