//! What lives and what was called, as JSON for tests that count. Reads everything, changes nothing.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use serde::Serialize;

use crate::driver::Driver;
use crate::locks::lock;
use crate::memory::space::Place;
use crate::races::Race;

#[derive(Serialize)]
struct Statistics {
    calls: BTreeMap<&'static str, u64>,
    operations: u64,
    operations_done: u64,
    faults_injected: u64,
    live: Live,
    devices: Vec<DeviceFigures>,
    races: Races,
}

#[derive(Default, Serialize)]
struct Live {
    device_allocations: u64,
    device_bytes: u64,
    pinned_allocations: u64,
    pinned_bytes: u64,
    registered_ranges: u64,
    imported_allocations: u64,
    contexts: usize,
    streams: usize,
    events: usize,
    pools: usize,
    modules: usize,
    functions: usize,
}

#[derive(Serialize)]
struct DeviceFigures {
    name: String,
    memory: u64,
    free: u64,
    lost: u32,
}

#[derive(Serialize)]
struct Races {
    count: u64,
    histories_dropped: u64,
    found: Vec<Race>,
}

fn live(driver: &Driver) -> Live {
    let mut live = Live::default();
    for allocation in driver.space.all() {
        match allocation.place {
            Place::Device(_) => {
                live.device_allocations += 1;
                live.device_bytes += allocation.bytes as u64;
            }
            Place::Pinned => {
                live.pinned_allocations += 1;
                live.pinned_bytes += allocation.bytes as u64;
            }
            Place::Registered => live.registered_ranges += 1,
            Place::Imported(_) => live.imported_allocations += 1,
        }
    }
    live.contexts = driver.contexts.len();
    live.streams = driver.contexts.all().iter().map(|context| lock(&context.streams).made.len()).sum();
    live.events = driver.events.len();
    live.pools = driver.pools.len() - driver.devices.len();
    live.modules = driver.modules.len();
    live.functions = driver.functions.len();
    live
}

/// Everything, as one JSON object.
pub(crate) fn json(driver: &Driver) -> String {
    let (found, count, histories_dropped) = driver.races.found();
    let devices =
        driver.devices.iter().zip(&driver.machine.devices).map(|(device, described)| DeviceFigures {
            name: described.name.clone(),
            memory: described.memory,
            free: device.budget.free(),
            lost: device.lost.load(Ordering::Acquire),
        });
    let statistics = Statistics {
        calls: lock(&driver.calls).clone(),
        operations: driver.operations.load(Ordering::Relaxed),
        operations_done: driver.operations_done.load(Ordering::Relaxed),
        faults_injected: lock(&driver.faults).injected,
        live: live(driver),
        devices: devices.collect(),
        races: Races { count, histories_dropped, found },
    };
    serde_json::to_string(&statistics).unwrap_or_default()
}
