//! `keepwarm gpu probe`: what GPUs there are, what a node would take of them, and why one cannot be used.

use keepwarm_config::{Config, DeviceKind, NodeConfig};
use keepwarm_memory::{CudaDriver, CudaFound, CudaSelector, MpsLimits, Nvml, NvmlDevice};
use keepwarm_node::{WORKSPACE_MAX, cuda_selector};
use keepwarm_types::Bytes;
use serde::Serialize;

use super::check;
use crate::cli::ProbeArgs;
use crate::failure::Failure;
use crate::output::{Output, Table};

/// What the Multi-Process Service reads: the most that a client may pin of each device.
const MPS_LIMIT: &str = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT";
/// Which devices the driver shows; the only way to a MIG instance.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// A device that the driver shows.
#[derive(Debug, Serialize)]
struct Probed {
    device: String,
    name: String,
    uuid: String,
    memory_bytes: u64,
    /// Where it could be asked.
    free_bytes: Option<u64>,
    /// The most that an arena may have: all of its memory, or what the Multi-Process Service allows.
    limit_bytes: u64,
    /// Processes that compute on it, and the bytes that they use, where the management library sees them.
    processes: Option<usize>,
    used_by_processes: Option<u64>,
    compute_capability: String,
    usable: bool,
    /// What speaks against it.
    reason: Option<String>,
}

/// An instance of a GPU that is cut into several (MIG).
#[derive(Debug, Serialize)]
struct Instance {
    /// For `device` in the file.
    uuid: String,
    /// Of which GPU.
    gpu: String,
    memory_bytes: Option<u64>,
    /// Whether the driver shows it to this process.
    visible: bool,
}

/// What a node of the file would take.
#[derive(Debug, Serialize)]
struct Wanted {
    key: String,
    device: String,
    bytes: u64,
    fits: bool,
    why: String,
}

#[derive(Debug, Serialize)]
struct Probe {
    /// 1000 times the major plus ten times the minor version of CUDA.
    driver_version: Option<u32>,
    /// Why there is no driver to ask.
    driver: Option<String>,
    /// The version that NVIDIA's management library tells, or why it tells nothing. Nothing needs it.
    management: String,
    /// What it did not answer.
    unanswered: Vec<String>,
    devices: Vec<Probed>,
    instances: Vec<Instance>,
    reserved: Vec<Wanted>,
    /// What of the environment decides about devices.
    environment: Vec<String>,
}

pub(crate) fn probe(args: &ProbeArgs, output: Output) -> Result<(), Failure> {
    let config = args.config.as_deref().map(check::load).transpose()?;
    let node = config.as_ref().map(|config| check::node(config, args.node.as_ref())).transpose()?;
    let environment = [VISIBLE, MPS_LIMIT].iter().filter_map(|name| {
        let value = std::env::var(name).ok()?;
        Some(format!("{name}={value}"))
    });
    let nvml = Nvml::look();
    let (management, unanswered) = match &nvml {
        Nvml::NotThere(why) => (why.clone(), Vec::new()),
        Nvml::There(report) => (format!("driver {}", report.driver), report.unanswered.clone()),
    };
    let (limits, mps) = match MpsLimits::from_environment() {
        Ok(limits) => (limits, None),
        Err(error) => (MpsLimits::default(), Some(error.to_string())),
    };
    let mut probe = Probe {
        driver_version: None,
        driver: None,
        management,
        unanswered: unanswered.into_iter().chain(mps).collect(),
        devices: Vec::new(),
        instances: Vec::new(),
        reserved: Vec::new(),
        environment: environment.collect(),
    };
    let driver = match CudaDriver::load() {
        Ok(driver) => Some(driver),
        Err(error) => {
            probe.driver = Some(error.to_string());
            None
        }
    };
    if let Some(driver) = &driver {
        probe.driver_version = driver.version().ok();
        match driver.devices() {
            Ok(devices) => {
                probe.devices = devices.iter().map(|found| probed(driver, found, &nvml, &limits)).collect();
                probe.instances = instances(&nvml, &devices);
            }
            Err(error) => probe.driver = Some(error.to_string()),
        }
    }
    if let (Some(config), Some(node)) = (&config, node) {
        probe.reserved = reserved(driver.as_ref(), config, node, &limits);
    }
    output.show(&probe, text)?;
    match probe.reserved.iter().filter(|wanted| !wanted.fits).count() {
        0 => Ok(()),
        count => Err(Failure::config(format!("{count} of the node's reservations cannot be made"))),
    }
}

/// Instances that the management library knows; those that the driver hides need `CUDA_VISIBLE_DEVICES`.
fn instances(nvml: &Nvml, devices: &[CudaFound]) -> Vec<Instance> {
    let Nvml::There(report) = nvml else { return Vec::new() };
    let of = |gpu: &NvmlDevice| {
        let one = |instance: &NvmlDevice| Instance {
            uuid: instance.uuid.clone(),
            gpu: gpu.uuid.clone(),
            memory_bytes: instance.memory.map(|memory| memory.total.0),
            visible: devices.iter().any(|found| nvml.device(&found.uuid) == Some(instance)),
        };
        gpu.instances.iter().map(one).collect::<Vec<_>>()
    };
    report.gpus.iter().flat_map(of).collect()
}

fn probed(driver: &CudaDriver, found: &CudaFound, nvml: &Nvml, limits: &MpsLimits) -> Probed {
    let managed = nvml.device(&found.uuid);
    let free = driver.free(&CudaSelector::Number(found.number));
    let reason = match (&free, found.claim()) {
        (Err(error), _) => Some(error.to_string()),
        (Ok(_), Err(error)) => Some(error.to_string()),
        (Ok(_), Ok(_)) if !found.pools => Some("it has no stream-ordered memory pools".to_owned()),
        (Ok(_), Ok(_)) => None,
    };
    let (major, minor) = found.capability;
    Probed {
        device: format!("cuda:{}", found.number),
        name: found.name.clone(),
        uuid: found.uuid.clone(),
        memory_bytes: found.memory.0,
        free_bytes: free.ok().map(|(free, _)| free.0),
        limit_bytes: found.budget(limits).0,
        processes: managed.map(|device| device.processes.len()),
        used_by_processes: managed.map(|device| {
            device.processes.iter().filter_map(|process| process.used).map(|used| used.0).sum()
        }),
        compute_capability: format!("{major}.{minor}"),
        usable: reason.is_none(),
        reason,
    }
}

/// What the node takes, by the keys that say so.
fn reserved(
    driver: Option<&CudaDriver>,
    config: &Config,
    node: &NodeConfig,
    limits: &MpsLimits,
) -> Vec<Wanted> {
    let mut reserved = Vec::new();
    for (index, gpu) in node.gpus.iter().enumerate() {
        let key = format!("gpu[{index}].memory");
        let (fits, why) = match (cuda_selector(&gpu.device), driver) {
            (None, _) => (true, "the host's memory in a GPU's place".to_owned()),
            (Some(_), None) => (false, "there is no driver".to_owned()),
            (Some(selector), Some(driver)) => arena(driver, &selector, gpu.memory, limits),
        };
        reserved.push(Wanted { key, device: gpu.device.to_string(), bytes: gpu.memory.0, fits, why });
    }
    let locked = node.gpus.iter().any(|gpu| gpu.device != DeviceKind::Host);
    let by = if locked { "page-locked by the driver, for all GPUs" } else { "locked where the limit allows" };
    let why = format!("cold copies, and what is on its way; {by}");
    let bytes = node.pinned.0;
    reserved.push(Wanted { key: "pinned".to_owned(), device: "host".to_owned(), bytes, fits: true, why });
    if locked && !config.models.is_empty() {
        let why = format!(
            "where the built-in engine works for its GPUs, as much as each has, {WORKSPACE_MAX} at most"
        );
        let of = |gpu: &keepwarm_config::GpuConfig| match gpu.device {
            DeviceKind::Host => 0,
            _ => gpu.memory.0.min(WORKSPACE_MAX.0),
        };
        let bytes = node.gpus.iter().map(of).sum();
        reserved.push(Wanted { key: "model".to_owned(), device: "host".to_owned(), bytes, fits: true, why });
    }
    reserved
}

fn arena(driver: &CudaDriver, selector: &CudaSelector, wanted: Bytes, limits: &MpsLimits) -> (bool, String) {
    let budget = driver.find(selector).map(|found| (found.budget(limits), found.memory));
    if let Ok((limit, memory)) = budget
        && wanted > limit
        && limit < memory
    {
        return (false, format!("{MPS_LIMIT} allows {limit}: ask for less, or raise it"));
    }
    match driver.free(selector) {
        Ok((free, total)) if wanted <= free => {
            (true, format!("the arena, once, at start; {free} of {total} are free"))
        }
        Ok((free, total)) => (false, format!("only {free} of {total} are free: ask for less")),
        Err(error) => (false, error.to_string()),
    }
}

fn text(probe: &Probe) -> String {
    let mut text = match (&probe.driver, probe.driver_version) {
        (Some(error), _) => format!("driver: {error}\n"),
        (None, Some(version)) => {
            format!(
                "driver: CUDA {}.{}, {} devices\n",
                version / 1000,
                version % 1000 / 10,
                probe.devices.len()
            )
        }
        (None, None) => "driver: it does not tell its version\n".to_owned(),
    };
    text.push_str(&format!("management library: {}\n", probe.management));
    for line in probe.unanswered.iter().chain(&probe.environment) {
        text.push_str(&format!("{line}\n"));
    }
    if !probe.devices.is_empty() {
        let mut table = Table::new([
            "device",
            "name",
            "uuid",
            "memory",
            "free",
            "at most",
            "processes",
            "capability",
            "usable",
        ]);
        for found in &probe.devices {
            table.row([
                found.device.clone(),
                found.name.clone(),
                found.uuid.clone(),
                Bytes(found.memory_bytes).to_string(),
                shown(found.free_bytes),
                Bytes(found.limit_bytes).to_string(),
                found.processes.map_or_else(
                    || "-".to_owned(),
                    |count| format!("{count}, {}", shown(found.used_by_processes)),
                ),
                found.compute_capability.clone(),
                found.reason.clone().map_or_else(|| "yes".to_owned(), |reason| format!("no: {reason}")),
            ]);
        }
        text.push_str(&table.render());
    }
    if !probe.instances.is_empty() {
        let mut table = Table::new(["instance", "of", "memory", "visible"]);
        for instance in &probe.instances {
            table.row([
                instance.uuid.clone(),
                instance.gpu.clone(),
                shown(instance.memory_bytes),
                if instance.visible { "yes".to_owned() } else { format!("no: set {VISIBLE}") },
            ]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    if !probe.reserved.is_empty() {
        let mut table = Table::new(["key", "device", "reserved", "", "why"]);
        for wanted in &probe.reserved {
            table.row([
                wanted.key.clone(),
                wanted.device.clone(),
                Bytes(wanted.bytes).to_string(),
                if wanted.fits { "fits" } else { "does not fit" }.to_owned(),
                wanted.why.clone(),
            ]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    text
}

fn shown(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".to_owned(), |bytes| Bytes(bytes).to_string())
}
