//! `keepwarm check`: a cluster.toml, and whether this machine can run it.

use std::path::Path;

use keepwarm_config::{Bootstrap, Config, DeviceKind, NodeConfig};
use keepwarm_memory::{CudaDriver, CudaFound, CudaSelector};
use keepwarm_node::cuda_selector;
use keepwarm_types::{Bytes, NodeName};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use super::cert::{Folder, node_files};
use crate::cli::CheckArgs;
use crate::failure::Failure;
use crate::output::{Output, Table};

/// Open files that a node may need: 4,096 connections, the catalog, its log.
const FILES_WANTED: u64 = 4096 + 64;

/// How a check of the machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    Warning,
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub(super) struct Finding {
    pub(super) subject: String,
    pub(super) verdict: Verdict,
    pub(super) detail: String,
}

#[derive(Debug, Serialize)]
struct Report {
    file: Option<String>,
    cluster: Option<String>,
    nodes: Vec<String>,
    tenants: usize,
    models: Vec<String>,
    /// What is valid but weak.
    warnings: Vec<String>,
    host: Vec<Finding>,
}

/// Reads a file; what is wrong with it is a failure with code 78.
pub(crate) fn load(path: &Path) -> Result<Config, Failure> {
    Config::load(path).map_err(Failure::config)
}

/// The node that is meant: by its name, or the only one.
pub(crate) fn node<'c>(config: &'c Config, name: Option<&NodeName>) -> Result<&'c NodeConfig, Failure> {
    let known = || config.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ");
    match (name, &config.nodes[..]) {
        (Some(name), _) => config.node(name).ok_or_else(|| {
            Failure::config(format!("--node {name}: the file has no such node; it has: {}", known()))
        }),
        (None, [only]) => Ok(only),
        (None, _) => Err(Failure::usage(format!("--node: say which node this is: {}", known()))),
    }
}

pub(crate) fn run(args: &CheckArgs, output: Output) -> Result<(), Failure> {
    let config = args.file.as_deref().map(load).transpose()?;
    let host = match (args.host, &config) {
        (false, _) => Vec::new(),
        (true, None) => examine(None),
        (true, Some(config)) => {
            let node = node(config, args.node.as_ref())?;
            let mut findings = examine(Some(node));
            findings.extend(cluster(config, node));
            findings
        }
    };
    let names = |config: &Config| config.nodes.iter().map(|node| node.name.to_string()).collect();
    let report = Report {
        file: args.file.as_ref().map(|path| path.display().to_string()),
        cluster: config.as_ref().map(|config| config.name.clone()),
        nodes: config.as_ref().map(names).unwrap_or_default(),
        tenants: config.as_ref().map_or(0, |config| config.tenants.len()),
        models: config
            .iter()
            .flat_map(|config| config.models.iter().map(|model| model.name.clone()))
            .collect(),
        warnings: config.as_ref().map(Config::warnings).unwrap_or_default(),
        host,
    };
    output.show(&report, text)?;
    let errors = report.host.iter().filter(|finding| finding.verdict == Verdict::Error).count();
    if errors > 0 {
        return Err(Failure::config(format!("{errors} of the machine's checks failed")));
    }
    Ok(())
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    if let (Some(file), Some(cluster)) = (&report.file, &report.cluster) {
        let models = if report.models.is_empty() { "none".to_owned() } else { report.models.join(", ") };
        text.push_str(&format!(
            "{file}: fine: cluster {cluster}, nodes {}, {} tenants, models {models}\n",
            report.nodes.join(", "),
            report.tenants
        ));
    }
    for warning in &report.warnings {
        text.push_str(&format!("warning: {warning}\n"));
    }
    let mut table = Table::default();
    for finding in &report.host {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Error => "error",
        };
        table.row([verdict.to_owned(), finding.subject.clone(), finding.detail.clone()]);
    }
    text + &table.render()
}

fn examine(node: Option<&NodeConfig>) -> Vec<Finding> {
    let mut findings = vec![files()];
    let pinned = node.map_or(Bytes::ZERO, |node| node.pinned);
    findings.push(locking(pinned));
    let hbm: Bytes = node
        .iter()
        .flat_map(|node| &node.gpus)
        .filter(|gpu| gpu.device == DeviceKind::Host)
        .map(|gpu| gpu.memory)
        .sum();
    findings.push(memory(pinned.0.saturating_add(hbm.0)));
    if let Some(node) = node {
        findings.extend(node.gpus.iter().enumerate().map(|(index, gpu)| device(index, &gpu.device)));
        findings.extend(node.data_dir.as_deref().map(folder));
        findings.push(address(&node.http));
    }
    findings
}

pub(super) fn finding(subject: &str, verdict: Verdict, detail: impl Into<String>) -> Finding {
    Finding { subject: subject.to_owned(), verdict, detail: detail.into() }
}

fn files() -> Finding {
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < FILES_WANTED => finding(
            "open files",
            Verdict::Warning,
            format!(
                "the limit is {limit}: under full load a node opens {FILES_WANTED}; raise it with `ulimit -n`"
            ),
        ),
        Some(limit) => finding("open files", Verdict::Ok, format!("up to {limit}")),
        None => finding("open files", Verdict::Ok, "no limit"),
    }
}

fn locking(pinned: Bytes) -> Finding {
    match getrlimit(Resource::Memlock).current {
        Some(limit) if limit < pinned.0.max(1) => finding(
            "memory locking",
            Verdict::Warning,
            format!(
                "the limit is {}, pinned memory is {pinned}: it will not be locked and may be swapped out; \
                 raise it with `ulimit -l` or systemd's LimitMEMLOCK",
                Bytes(limit)
            ),
        ),
        Some(limit) => finding("memory locking", Verdict::Ok, format!("up to {}", Bytes(limit))),
        None => finding("memory locking", Verdict::Ok, "no limit"),
    }
}

/// A line of /proc/meminfo, in bytes.
fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn memory(wanted: u64) -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    match meminfo(&text, "MemAvailable") {
        None => finding("memory", Verdict::Warning, "/proc/meminfo does not say how much is available"),
        Some(available) if available < wanted => finding(
            "memory",
            Verdict::Error,
            format!("{} are to be reserved, {} are available", Bytes(wanted), Bytes(available)),
        ),
        Some(available) => finding(
            "memory",
            Verdict::Ok,
            format!("{} to reserve of {} available", Bytes(wanted), Bytes(available)),
        ),
    }
}

fn device(index: usize, device: &DeviceKind) -> Finding {
    let subject = format!("gpu[{index}]");
    match cuda_selector(device) {
        None => finding(&subject, Verdict::Ok, "host memory"),
        Some(selector) => cuda(&subject, &selector),
    }
}

fn cuda(subject: &str, selector: &CudaSelector) -> Finding {
    match CudaDriver::load().and_then(|driver| driver.find(selector)) {
        Ok(found) => {
            let CudaFound { name, uuid, memory, capability: (major, minor), .. } = found;
            let what = format!("{selector}: {name} ({uuid}), {memory}, compute capability {major}.{minor}");
            finding(subject, Verdict::Ok, what)
        }
        Err(error) => finding(subject, Verdict::Error, format!("{selector}: {error}")),
    }
}

fn folder(path: &Path) -> Finding {
    let probe = || -> std::io::Result<()> {
        std::fs::create_dir_all(path)?;
        tempfile::tempfile_in(path).map(drop)
    };
    match probe() {
        Ok(()) => finding("data_dir", Verdict::Ok, format!("{} can be written", path.display())),
        Err(error) => finding("data_dir", Verdict::Error, format!("{}: {error}", path.display())),
    }
}

fn address(http: &str) -> Finding {
    match std::net::TcpListener::bind(http) {
        Ok(_) => finding("http", Verdict::Ok, format!("{http} is free")),
        Err(error) => finding("http", Verdict::Error, format!("{http}: {error}")),
    }
}

/// What a node of several needs beside a machine: its peers' port, its certificates, the bootstrap file.
fn cluster(config: &Config, node: &NodeConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(node.peer.as_deref().filter(|_| config.is_cluster()).map(peer));
    if let Some(tls) = &config.tls {
        findings.extend(node_files(&Folder::of(tls), &config.name, &node.name));
    }
    findings.extend(bootstrap(config, node));
    findings
}

fn peer(address: &str) -> Finding {
    match std::net::UdpSocket::bind(address) {
        Ok(_) => finding("peer", Verdict::Ok, format!("{address} (UDP) is free")),
        Err(error) => finding("peer", Verdict::Error, format!("{address} (UDP): {error}")),
    }
}

/// The bootstrap file is there until the cluster has started; later nodes and other machines need none.
fn bootstrap(config: &Config, node: &NodeConfig) -> Option<Finding> {
    let path = config.path_of(Bootstrap::FILE);
    let found = match Bootstrap::of(config) {
        Ok(found) => found?,
        Err(error) => return Some(finding("bootstrap", Verdict::Error, error.to_string())),
    };
    let gone: Vec<_> =
        found.voters.iter().filter(|name| config.node(name).is_none()).map(|name| name.as_str()).collect();
    Some(if !gone.is_empty() {
        let detail = format!(
            "{}: names {}, which cluster.toml has not: a cluster that has not started yet cannot start so",
            path.display(),
            gone.join(", ")
        );
        finding("bootstrap", Verdict::Warning, detail)
    } else if found.voters.contains(&node.name) {
        finding("bootstrap", Verdict::Ok, format!("{} may start the cluster", node.name))
    } else {
        finding("bootstrap", Verdict::Ok, format!("{} joins; others start the cluster", node.name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Kind;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24609024 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(23_000_000 * 1024));
        assert_eq!(meminfo(text, "Mem"), None);
    }

    #[test]
    fn a_wrong_file_is_a_configuration_error_that_names_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cluster.toml");
        std::fs::write(&path, "version = 1\n[cluster]\nname = \"x\"\nreplicas = 2\n").unwrap();
        let failure = load(&path).unwrap_err();
        assert_eq!(failure.kind(), Kind::Config);
        assert!(failure.to_string().contains("cluster.toml:4"), "{failure}");
        assert_eq!(load(Path::new("/no/such/file")).unwrap_err().kind(), Kind::Config);
    }

    #[test]
    fn a_machine_that_cannot_hold_the_arenas_is_an_error() {
        assert_eq!(memory(u64::MAX).verdict, Verdict::Error);
        assert_eq!(memory(1).verdict, Verdict::Ok);
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(address(&taken.local_addr().unwrap().to_string()).verdict, Verdict::Error);
        let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(peer(&taken.local_addr().unwrap().to_string()).verdict, Verdict::Error);
        assert_eq!(device(0, &DeviceKind::Cuda(0)).verdict, Verdict::Error);
        assert_eq!(folder(Path::new("/proc/no")).verdict, Verdict::Error);
    }
}
