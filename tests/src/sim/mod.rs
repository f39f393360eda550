//! A seeded simulation of one node: the real core, random clients, a small arena, a disk that fails, crashes.
//!
//! Time is virtual and everything runs on one thread, so a seed is a history. What clients were promised is
//! kept by an [`oracle`]; what must hold is in [`invariants`], and each [`Bug`] shows that they would notice.

pub mod bug;
pub mod client;
pub mod disk;
pub mod invariants;
pub mod memory;
pub mod node;
pub mod oracle;
pub mod world;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Waker};

pub use bug::Bug;
use client::{Client, all_keys};
use world::{Shared, World};

/// Clients at once.
const CLIENTS: u64 = 5;
/// Things that each does.
const THINGS: u64 = 40;
/// Happenings after which a run that has not ended is stuck.
const STEPS_MAX: u64 = 200_000;
/// Virtual time for what was staged to be dropped, after the clients are done.
const QUIET_MS: u64 = keepwarm_core::shard::STAGE_TTL.0 + 5_000;

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub seed: u64,
    /// Crash once, after this happening, and let nothing else go wrong.
    pub crash_at: Option<u64>,
    pub bug: Option<Bug>,
    pub verbose: bool,
}

/// What a run came to.
#[derive(Debug, Clone)]
pub struct Ran {
    pub steps: u64,
    pub virtual_ms: u64,
    pub answered: BTreeMap<&'static str, u64>,
}

/// Runs one seed.
///
/// # Errors
/// The first thing that must not be, what led to it, and the command that shows it again.
pub fn run(options: &Options) -> Result<Ran, String> {
    let world = Shared(Rc::new(RefCell::new(World::new(options.clone()))));
    let begun = world.with(|world| world.now);
    let mut clients: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
    for number in 1..=CLIENTS {
        clients.push(Box::pin(Client::new(world.clone(), number).run(THINGS)));
    }
    drive(&world, clients)?;
    let last = world.clone();
    drive(&world, vec![Box::pin(async move { settle(last).await })])?;
    Ok(world.with(|world| Ran {
        steps: world.steps,
        virtual_ms: world.now.0 - begun.0,
        answered: world.answered.clone(),
    }))
}

/// Lets time go on until all clients are done.
fn drive(world: &Shared, mut clients: Vec<Pin<Box<dyn Future<Output = ()>>>>) -> Result<(), String> {
    let mut context = Context::from_waker(Waker::noop());
    loop {
        clients.retain_mut(|client| client.as_mut().poll(&mut context).is_pending());
        if let Some(violation) = world.with(|world| world.violation.take()) {
            return Err(report(world, &violation));
        }
        if clients.is_empty() {
            return Ok(());
        }
        let (went, steps) = world.with(|world| (world.step(), world.steps));
        if !went || steps > STEPS_MAX {
            return Err(report(world, "clients wait for what never comes"));
        }
    }
}

/// After the faults: the node is up, everything serves, nothing is lost, nothing is left over.
async fn settle(world: Shared) {
    while world.with(|world| world.node.is_none()) {
        world.pause(50).await;
    }
    world.with(|world| world.disk.full = false);
    world.pause(QUIET_MS).await;
    let mut client = Client::new(world.clone(), CLIENTS + 1);
    let mut manifests = Vec::new();
    for key in all_keys() {
        client.read(&key).await;
        manifests.extend(client.look(&key).await);
    }
    world.pause(100).await;
    world.with(|world| {
        let checked = invariants::given_back::check(world, &manifests);
        world.check(checked);
    });
    let absent = all_keys().into_iter().find(|key| !manifests.iter().any(|manifest| manifest.key == *key));
    if let Some(key) = absent {
        client.create(&key).await;
    }
}

fn report(world: &Shared, violation: &str) -> String {
    world.with(|world| {
        let options = &world.options;
        let crash = options.crash_at.map(|at| format!(" --crash-at {at}")).unwrap_or_default();
        format!(
            "{violation}\nthe last of what happened:\n{}again: cargo xtask sim --seed {}{crash} --verbose",
            world.trace(),
            options.seed
        )
    })
}
