//! The second tier of simulation: whole nodes, their actors, registry and QUIC links, in one process, in a network and
//! a time that a seed decides (turmoil).
//!
//! A seed gives the same network and the same faults at the same times. Disks and devices have threads of their own, so
//! two runs of a seed may still order those differently; that is what the first tier (`cluster_sim`) is exact about.

mod network;
mod node;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use turmoil::{Builder, Sim};
use uuid::Uuid;

use crate::chaos::checker::check;
use crate::chaos::clients::{Asked, Shared, Writer, reader};
use crate::chaos::history::{Counts, History};
use crate::chaos::last_look;
use node::{Door, Files, address, name};

/// Nodes of the cluster.
const NODES: usize = 3;
/// Writers, each with a session of its own, and readers of all.
const WRITERS: usize = 3;
const READERS: usize = 2;
/// Faults of a run.
const FAULTS: u32 = 5;
/// A step of virtual time.
const TICK: Duration = Duration::from_millis(1);
/// Longest virtual time until everything serves, at the start and after faults.
const CALM_MAX: Duration = Duration::from_secs(30);
/// And longest real time: on a busy machine, disks and devices have done little in a virtual second.
const CALM_REAL_MAX: Duration = Duration::from_secs(30);
/// Writes of each session that must be acknowledged until that is so.
const PROGRESS: u64 = 3;
/// Virtual seconds a real second: disks and devices work in real time, and must not seem to stand still.
const SPEED: u32 = 8;

/// A run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub seed: u64,
    /// Tell what happens.
    pub verbose: bool,
}

/// What a run was.
#[derive(Debug, Clone, Copy)]
pub struct Ran {
    pub counts: Counts,
    pub virtual_ms: u64,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The process is gone, and starts again after so long.
    Crash(usize, Duration),
    /// Two nodes do not reach each other.
    Cut(usize, usize),
    /// The first does not reach the second.
    OneWay(usize, usize),
    /// A node reaches nobody.
    Alone(usize),
    /// Datagrams between two nodes wait, and come all at once.
    Held(usize, usize),
    /// So many of a hundred datagrams are lost.
    Lossy(u32),
}

impl Fault {
    fn draw(rng: &mut ChaCha8Rng) -> Self {
        let one = rng.random_range(0..NODES);
        let other = (one + rng.random_range(1..NODES)) % NODES;
        match rng.random_range(0..7) {
            0 | 1 => Self::Crash(one, Duration::from_millis(rng.random_range(20..2000))),
            2 => Self::Cut(one, other),
            3 => Self::OneWay(one, other),
            4 => Self::Alone(one),
            5 => Self::Held(one, other),
            _ => Self::Lossy(rng.random_range(1..15)),
        }
    }
}

struct Run<'s> {
    sim: Sim<'s>,
    micros: Arc<AtomicU64>,
    shared: Arc<Shared<Arc<Door>>>,
    rng: ChaCha8Rng,
    begun: Instant,
    verbose: bool,
}

/// Runs a seed.
///
/// # Errors
/// What was broken, and how to see it again.
pub fn run(options: Options) -> Result<Ran, String> {
    let again = |what: String| {
        format!("{what}\nrun it again: cargo xtask sim --shells --verbose --seed {}", options.seed)
    };
    let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
    let files = Arc::new(Files::create(folder.path(), NODES as u16));
    let mut sim = Builder::new()
        .rng_seed(options.seed)
        .tick_duration(TICK)
        .min_message_latency(Duration::from_micros(100))
        .max_message_latency(Duration::from_millis(4))
        .udp_capacity(1 << 16)
        // What ends a run is told by name before this: it may wait for real time at each fault.
        .simulation_duration(CALM_REAL_MAX * SPEED * (FAULTS + 3))
        .build();
    let doors: Vec<_> = (0..NODES).map(Door::new).collect();
    for (number, door) in doors.iter().enumerate() {
        let (files, door) = (Arc::clone(&files), Arc::clone(door));
        sim.host(IpAddr::from(address(number)), move || Arc::clone(&files).run(number, Arc::clone(&door)));
    }
    let micros = Arc::new(AtomicU64::new(0));
    let shared = Arc::new(Shared::new(doors, History::told(Arc::clone(&micros))));
    sim.client("clients", clients(Arc::clone(&shared), options.seed));
    let rng = ChaCha8Rng::seed_from_u64(options.seed);
    let mut run = Run {
        sim,
        micros,
        shared: Arc::clone(&shared),
        rng,
        begun: Instant::now(),
        verbose: options.verbose,
    };
    let stood = run.play();
    let virtual_ms = u64::try_from(run.sim.elapsed().as_millis()).unwrap_or(u64::MAX);
    let broken = shared.history.with(check);
    if options.verbose {
        shared.history.with(|records, _| records.iter().for_each(|record| say(&record.json().to_string())));
    }
    let told = stood.err().into_iter().chain(broken.iter().map(ToString::to_string));
    let told: Vec<_> = told.take(8).collect();
    if !told.is_empty() {
        return Err(again(told.join("\n")));
    }
    Ok(Ran { counts: shared.history.counts(), virtual_ms })
}

fn rng(seed: u64, stream: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream as u64 + 1);
    rng
}

/// Those who use the cluster, until they are told to stop; then all is looked at once more.
async fn clients(shared: Arc<Shared<Arc<Door>>>, seed: u64) -> turmoil::Result {
    let shared = &*shared;
    let mut writers = Vec::new();
    for number in 0..WRITERS {
        // The nodes may still be starting.
        let writer = loop {
            match Writer::new(shared, number, rng(seed, number)).await {
                Ok(writer) => break writer,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        writers.push(writer);
    }
    let sessions: Vec<Uuid> = writers.iter().map(Writer::session).collect();
    let writing = join_all(writers.into_iter().map(Writer::run));
    let reading =
        join_all((0..READERS).map(|number| reader(shared, number, &sessions, rng(seed, WRITERS + number))));
    tokio::join!(writing, reading);
    Ok(last_look(shared, &sessions).await?)
}

impl Run<'_> {
    fn play(&mut self) -> Result<(), String> {
        self.goes_on("the start")?;
        for _ in 0..FAULTS {
            let calm = Duration::from_millis(self.rng.random_range(0..800));
            self.pass(calm)?;
            let fault = Fault::draw(&mut self.rng);
            if self.verbose {
                say(&format!("{:?}: {fault:?}", self.sim.elapsed()));
            }
            self.fault(fault)?;
            if self.rng.random() {
                self.goes_on(&format!("{fault:?}"))?;
            }
        }
        self.goes_on("all faults")?;
        self.shared.stop.store(true, Ordering::SeqCst);
        let calm = self.calm();
        while !self.step()? {
            if self.is_too_long(calm) {
                let last = self.last_call();
                return Err(format!("the clients did not end; the last call: {last:?}"));
            }
        }
        Ok(())
    }

    /// The virtual and the real time now, from which on all is calm.
    fn calm(&self) -> (Duration, Instant) {
        (self.sim.elapsed(), Instant::now())
    }

    fn is_too_long(&self, (begun, really): (Duration, Instant)) -> bool {
        self.sim.elapsed() - begun > CALM_MAX && really.elapsed() > CALM_REAL_MAX
    }

    fn last_call(&self) -> Option<serde_json::Value> {
        self.shared.history.with(|records, _| records.last().map(|last| last.json()))
    }

    /// A step of time; whether all clients have ended.
    fn step(&mut self) -> Result<bool, String> {
        let ended = self.sim.step().map_err(|error| format!("a host ended: {error}"))?;
        let elapsed = self.sim.elapsed();
        self.micros.store(u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX), Ordering::SeqCst);
        // Time goes on here as the machine's does, only faster; a condition is never waited for this way.
        std::thread::sleep((elapsed / SPEED).saturating_sub(self.begun.elapsed()));
        self.start_anew();
        Ok(ended)
    }

    /// A node that the others took for gone ends, with all that it held, and begins again as a new process.
    fn start_anew(&mut self) {
        let shared = Arc::clone(&self.shared);
        for (number, door) in shared.nodes.iter().enumerate().filter(|(_, door)| door.wants_anew()) {
            if self.verbose {
                say(&format!("{:?}: {} starts anew", self.sim.elapsed(), door.name()));
            }
            shared.history.killed(vec![door.name().to_owned()], shared.history.now());
            self.sim.crash(IpAddr::from(address(number)));
            self.sim.bounce(IpAddr::from(address(number)));
        }
    }

    fn pass(&mut self, time: Duration) -> Result<(), String> {
        let until = self.sim.elapsed() + time;
        while self.sim.elapsed() < until {
            self.step()?;
        }
        Ok(())
    }

    fn fault(&mut self, fault: Fault) -> Result<(), String> {
        let at = |node| IpAddr::from(address(node));
        let time = Duration::from_millis(self.rng.random_range(50..2500));
        match fault {
            Fault::Crash(node, down) => {
                let begin = self.shared.history.now();
                self.sim.crash(at(node));
                self.shared.history.killed(vec![name(node).to_string()], begin);
                self.pass(down)?;
                self.sim.bounce(at(node));
            }
            Fault::Cut(one, other) => {
                self.sim.partition(at(one), at(other));
                self.pass(time)?;
                self.sim.repair(at(one), at(other));
            }
            Fault::OneWay(from, to) => {
                self.sim.partition_oneway(at(from), at(to));
                self.pass(time)?;
                self.sim.repair_oneway(at(from), at(to));
            }
            Fault::Alone(node) => {
                let others = (0..NODES).filter(|other| *other != node);
                others.clone().for_each(|other| self.sim.partition(at(node), at(other)));
                self.pass(time)?;
                others.for_each(|other| self.sim.repair(at(node), at(other)));
            }
            Fault::Held(one, other) => {
                self.sim.hold(at(one), at(other));
                self.pass(time)?;
                self.sim.release(at(one), at(other));
            }
            Fault::Lossy(percent) => {
                self.sim.set_fail_rate(f64::from(percent) / 100.0);
                self.pass(time)?;
                self.sim.set_fail_rate(0.0);
            }
        }
        Ok(())
    }

    /// Waits until each session has some more acknowledged writes.
    fn goes_on(&mut self, after: &str) -> Result<(), String> {
        let calm = self.calm();
        let from = self.shared.progress.lock().unwrap().clone();
        loop {
            let now: BTreeMap<Uuid, u64> = self.shared.progress.lock().unwrap().clone();
            let more = |session: &Uuid| now[session] - from.get(session).copied().unwrap_or(0);
            if now.len() == WRITERS && now.keys().all(|session| more(session) >= PROGRESS) {
                return Ok(());
            }
            if self.is_too_long(calm) {
                let last = self.last_call();
                let nodes: Vec<_> = self.shared.nodes.iter().map(|node| node.name().to_owned()).collect();
                return Err(format!(
                    "{CALM_MAX:?} after {after} writes stand still at {nodes:?}: {now:?}; the last call: {last:?}"
                ));
            }
            self.step()?;
        }
    }
}

#[expect(clippy::print_stdout, reason = "whoever asked for it is told what happens")]
fn say(line: &str) {
    println!("{line}");
}
