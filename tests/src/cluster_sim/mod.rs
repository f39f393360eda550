//! A seeded simulation of a cluster: the real replication core on every node and the real registry, random clients,
//! and everything that goes wrong between them.
//!
//! Time is virtual and everything runs on one thread, so a seed is a history. What clients were promised is kept by
//! [`promises`]; what must hold is in [`invariants`], and each [`Bug`] shows that they would notice.
//!
//! Bugs that it found in the core, each by a seed of its day (a seed is another history after any change of the core):
//!
//! - a comparison that came late dropped a session acknowledged since (74, 289); a late install put an older state in
//!   a newer one's place: a primary's messages are numbered;
//! - a session sent whole as it was before a change undid the receiver's acknowledgement of that change (159, 906);
//! - a placement by a new primary, made while the session's transcript waited for a full disk, kept a transcript that
//!   then never came there (980, 2719);
//! - a change that others might have was taken back, with its bytes leaked, once they had left the set (4163);
//! - an end under way could not be sent whole, as the catalog had nothing of the session any more: its learner was
//!   never promoted (92, 860);
//! - the news of a commit was sent once: where it got lost, superseded bytes stayed (157, 198);
//! - a session whose holder had no room was never copied again (163);
//! - bytes that came twice, or were here already, kept a name too many (2, 13, 21); bytes fetched across an office's
//!   end leaked, and those of a doubted placement were freed under their manifest;
//! - a fetch left one holder too many (7, 12); an end's time differed between its writer and who was sent it (5, 11).

pub mod authority;
pub mod bug;
pub mod client;
pub mod disk;
pub mod faults;
pub mod invariants;
pub mod keys;
pub mod memory;
pub mod mischief;
pub mod network;
pub mod node;
pub mod promises;
pub mod shell;
pub mod world;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Waker};

pub use bug::Bug;
use client::Client;
use invariants::serves::{SERVES_WITHIN_MS, late};
use keepwarm_core::shard::Refusal;
use keepwarm_types::SessionKey;
use world::{Shared, World};

/// Clients at once.
const CLIENTS: u64 = 4;
/// Happenings after which a run that has not ended is stuck.
const STEPS_MAX: u64 = 500_000;
/// Virtual time for what was staged, and for what came for nothing, to be dropped; clocks may be slow.
const QUIET_MS: u64 = (keepwarm_core::shard::STAGE_TTL.0 + 61_000) * 12 / 10;

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub seed: u64,
    pub bug: Option<Bug>,
    /// Print all that happens.
    pub verbose: bool,
    /// Keep what happened last, for the report.
    pub traced: bool,
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    pub steps: u64,
    /// Until all was served again; the quiet after it is not counted.
    pub virtual_ms: u64,
    pub answered: BTreeMap<&'static str, u64>,
}

/// Runs one seed.
///
/// # Errors
/// The first thing that must not be, what led to it, and the command that shows it again.
pub fn run(options: &Options) -> Result<Ran, String> {
    let first = attempt(options);
    if first.is_err() && !options.traced && options.bug.is_none() {
        // The same once more, this time with a history.
        return attempt(&Options { traced: true, ..options.clone() });
    }
    first
}

fn attempt(options: &Options) -> Result<Ran, String> {
    let world = Shared(Rc::new(RefCell::new(World::new(options.clone()))));
    let mut clients: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
    for number in 1..=CLIENTS {
        clients.push(Box::pin(Client::new(world.clone(), number).run()));
    }
    drive(&world, clients)?;
    let last = world.clone();
    drive(&world, vec![Box::pin(async move { serve_again(last).await })])?;
    let ran = world.with(|world| Ran {
        steps: world.steps,
        virtual_ms: world.now.0 - world::BEGIN.0,
        answered: world.answered.clone(),
    });
    let last = world.clone();
    drive(&world, vec![Box::pin(async move { be_quiet(last).await })])?;
    Ok(ran)
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

/// Nothing goes wrong any more: every session is served, and written, within a bounded time.
async fn serve_again(world: Shared) {
    let mut client = Client::new(world.clone(), CLIENTS + 1);
    let by = world.with(|world| world.now) + keepwarm_types::Millis(SERVES_WITHIN_MS);
    for key in world.with(|world| world.keys).all() {
        while let Err(refusal) = served(&client, &key).await {
            if world.with(|world| world.now > by || world.violation.is_some()) {
                world.with(|world| {
                    let why = late(world, &key, &refusal.map_or("no answer".to_owned(), |no| no.to_string()));
                    world.check(Err(why));
                });
                return;
            }
            world.pause(100).await;
        }
        if let Some(manifest) = client.look(&key).await {
            client.append(&key, &manifest, None, true).await;
        }
    }
}

/// Whether a read is answered with what is, be it that nothing is there to read.
async fn served(client: &Client, key: &SessionKey) -> Result<(), Option<Refusal>> {
    match client.read(key).await {
        Err(Some(
            Refusal::UnknownSession
            | Refusal::Deleted { .. }
            | Refusal::Expired { .. }
            | Refusal::Cold { .. }
            | Refusal::UnwrittenPart(_)
            | Refusal::Lost { .. },
        )) => Ok(()),
        other => other,
    }
}

/// Long after, everything is as it should be, and nothing is left over.
async fn be_quiet(world: Shared) {
    world.pause(QUIET_MS).await;
    world.with(|world| {
        let checked = invariants::settled(world);
        world.check(checked);
    });
    let client = Client::new(world.clone(), CLIENTS + 2);
    for key in world.with(|world| world.keys).all() {
        let _ = client.read(&key).await;
    }
}

fn report(world: &Shared, violation: &str) -> String {
    world.with(|world| {
        let seed = world.options.seed;
        let bug = world.options.bug.map(|bug| format!(" --bug {bug:?}")).unwrap_or_default();
        let trace = world.trace();
        format!(
            "{violation}\nthe last of what happened:\n{trace}again: cargo xtask sim --cluster --seed {seed}{bug} --verbose"
        )
    })
}
