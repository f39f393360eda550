//! From text to [`Config`]: every key of the format, once.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use keepwarm_types::{Bytes, NodeName, ShardCount, TenantName};
use toml::de::DeTable;

use crate::config::{
    BatchConfig, Config, DegradedWrites, GpuConfig, ModelConfig, NodeConfig, SyncMode, TenantConfig,
    TierConfig, TlsConfig,
};
use crate::error::{ConfigErrors, LoadError};
use crate::section::{Notes, Section};

/// Nodes of a cluster.
const NODES_MAX: u64 = 4096;
/// Copies of a session.
const REPLICATION_MAX: u64 = 8;
/// Contexts of a model.
const INSTANCES_MAX: u64 = 64;
/// Sequences in a step.
const BATCH_MAX: u64 = 256;
/// How long a step may wait for more sequences, in microseconds.
const DELAY_US_MAX: u64 = 1_000_000;
/// Sessions of a tenant, where the file does not say.
const SESSIONS_DEFAULT: u64 = 1_000_000;
/// Shards, where the file does not say.
const SHARDS_DEFAULT: u64 = 1024;

impl Config {
    /// Reads a file's text; `file` is how errors name it.
    ///
    /// # Errors
    /// [`ConfigErrors`] with everything that is wrong, in the file's order.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigErrors> {
        let notes = Notes::new(text);
        let fail = |notes: Notes<'_>| ConfigErrors { file: file.to_owned(), errors: notes.into_errors() };
        let table = match DeTable::parse(text) {
            Ok(table) => table,
            Err(error) => {
                notes.note(error.span().unwrap_or(0..0), "", error.message());
                return Err(fail(notes));
            }
        };
        let root = Section::root(&notes, table.get_ref());
        let config = read(&root, text);
        match config {
            Some(config) if !notes.any() => Ok(config),
            _ => Err(fail(notes)),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let text =
            std::fs::read_to_string(path).map_err(|cause| LoadError::Io { path: path.to_owned(), cause })?;
        Ok(Self::parse(&path.display().to_string(), &text)?)
    }
}

fn read(root: &Section<'_, '_>, text: &str) -> Option<Config> {
    root.only(&["version", "cluster", "tls", "node", "tenant", "model", "tiers"]);
    if !root.has("version") {
        root.missing("version");
    }
    let version = root.number("version", 1..u64::MAX);
    let cluster = root.section("cluster");
    if cluster.is_none() && !root.has("cluster") {
        root.missing("cluster");
    }
    let (hbm, pinned) = tiers(root);
    let nodes: Vec<_> = root.sections("node").iter().filter_map(node).collect();
    if !root.has("node") {
        root.missing("node");
    }
    let tenants: Vec<_> = root.sections("tenant").iter().filter_map(tenant).collect();
    let models: Vec<_> = root.sections("model").iter().filter_map(model).collect();
    let tls = root.section("tls").and_then(|tls| tls_config(&tls));
    check_unique(root, &nodes, &tenants, &models);
    check_loopback(root, &nodes, tenants.is_empty());
    let cluster = cluster?;
    cluster.only(&["name", "replication", "shards", "degraded_writes", "sync"]);
    let name = cluster.string("name");
    if !cluster.has("name") {
        cluster.missing("name");
    }
    if name.is_some_and(|name| !keepwarm_types::valid_name(name)) {
        cluster.bad("name", "is not a name: 1 to 64 letters, digits, '.', '_' or '-'");
    }
    let replication = cluster.number("replication", 1..REPLICATION_MAX + 1);
    if replication.is_some_and(|copies| copies > nodes.len().max(1) as u64) {
        cluster.bad(
            "replication",
            format!("{} copies need as many nodes; the file has {}", replication?, nodes.len()),
        );
    }
    let shards = match cluster
        .number("shards", 1..65_537)
        .map_or_else(|| ShardCount::new(SHARDS_DEFAULT), ShardCount::new)
    {
        Ok(shards) => Some(shards),
        Err(error) => {
            cluster.bad("shards", error.to_string());
            None
        }
    };
    let degraded = cluster.word("degraded_writes", &["allow", "refuse"]);
    let sync = cluster.word("sync", &["always", "interval"]);
    Some(Config {
        version: version?,
        hash: blake3::hash(text.as_bytes()).to_hex().to_string(),
        name: name?.to_owned(),
        replication: u32::try_from(replication.unwrap_or(1)).ok()?,
        shards: shards?,
        degraded_writes: if degraded == Some(1) { DegradedWrites::Refuse } else { DegradedWrites::Allow },
        sync: if sync == Some(1) { SyncMode::Interval } else { SyncMode::Always },
        tls,
        nodes,
        tenants,
        models,
        hbm,
        pinned,
    })
}

fn required<T>(section: &Section<'_, '_>, key: &str, value: Option<T>) -> Option<T> {
    if value.is_none() && !section.has(key) {
        section.missing(key);
    }
    value
}

fn size(section: &Section<'_, '_>, key: &str) -> Option<Bytes> {
    let size: Bytes = section.parsed(key)?;
    if size < Bytes(1 << 20) {
        section.bad(key, format!("{size} is too small: at least 1MiB"));
        return None;
    }
    Some(size)
}

fn address<'a>(section: &Section<'a, '_>, key: &str) -> Option<&'a str> {
    let text = section.string(key)?;
    let valid = match text.rsplit_once(':') {
        Some((host, port)) => !host.is_empty() && port.parse::<u16>().is_ok(),
        None => false,
    };
    if !valid {
        section.bad(key, format!("'{text}' is not HOST:PORT"));
        return None;
    }
    Some(text)
}

fn node(section: &Section<'_, '_>) -> Option<NodeConfig> {
    section.only(&["name", "peer", "http", "zone", "pinned", "data_dir", "voter", "gpu"]);
    let name: Option<NodeName> = required(section, "name", section.parsed("name"));
    let http = required(section, "http", address(section, "http"));
    let pinned = required(section, "pinned", size(section, "pinned"));
    let gpus: Vec<_> = section.sections("gpu").iter().filter_map(gpu).collect();
    let peer = address(section, "peer").map(str::to_owned);
    let (zone, data_dir, voter) = (section.string("zone"), section.string("data_dir"), section.flag("voter"));
    Some(NodeConfig {
        name: name?,
        peer,
        http: http?.to_owned(),
        zone: zone.map(str::to_owned),
        pinned: pinned?,
        data_dir: data_dir.map(PathBuf::from),
        voter: voter.unwrap_or(false),
        gpus,
    })
}

fn gpu(section: &Section<'_, '_>) -> Option<GpuConfig> {
    section.only(&["device", "memory"]);
    let device = required(section, "device", section.parsed("device"));
    let memory = required(section, "memory", size(section, "memory"));
    Some(GpuConfig { device: device?, memory: memory? })
}

fn tenant(section: &Section<'_, '_>) -> Option<TenantConfig> {
    section.only(&["name", "token_sha256", "admin", "share", "sessions_max", "forever_bytes_max"]);
    let name: Option<TenantName> = required(section, "name", section.parsed("name"));
    let token = required(section, "token_sha256", section.string("token_sha256"));
    let token = token.and_then(|hex| {
        let bytes = hex_bytes(hex);
        if bytes.is_none() {
            section.bad("token_sha256", "must have 64 hexadecimal digits: `printf %s TOKEN | sha256sum`");
        }
        bytes
    });
    let forever = section.parsed("forever_bytes_max");
    let (admin, share) = (section.flag("admin"), section.share("share"));
    let sessions_max = section.number("sessions_max", 1..u64::MAX);
    Some(TenantConfig {
        name: name?,
        token_sha256: token?,
        admin: admin.unwrap_or(false),
        share: share.unwrap_or(1.0),
        sessions_max: sessions_max.unwrap_or(SESSIONS_DEFAULT),
        forever_bytes_max: forever.unwrap_or(Bytes::ZERO),
    })
}

fn hex_bytes(hex: &str) -> Option<[u8; 32]> {
    blake3::Hash::from_hex(hex).ok().map(|hash| *hash.as_bytes())
}

fn model(section: &Section<'_, '_>) -> Option<ModelConfig> {
    section.only(&["name", "engine", "source", "instances", "batch"]);
    let name = required(section, "name", section.string("name"));
    section.word("engine", &["builtin"]);
    let source = required(section, "source", section.string("source"));
    if source.is_some_and(|source| !source.starts_with("gguf:") && !source.starts_with("tiny:")) {
        section.bad("source", "must be gguf:PATH, or tiny:SEED for a model with random weights");
    }
    let instances = section.section("instances").map_or((1, 1), |range| {
        range.only(&["min", "max"]);
        let min = range.number("min", 1..INSTANCES_MAX + 1).unwrap_or(1);
        let max = range.number("max", 1..INSTANCES_MAX + 1).unwrap_or(min);
        if max < min {
            range.bad("max", format!("{max} is less than min = {min}"));
        }
        (min, max)
    });
    let default = BatchConfig::default();
    let batch = section.section("batch").map_or(default, |batch| {
        batch.only(&["max", "delay_us"]);
        let max = batch.number("max", 1..BATCH_MAX + 1).and_then(|max| u32::try_from(max).ok());
        let delay = batch.number("delay_us", 0..DELAY_US_MAX + 1).map(Duration::from_micros);
        BatchConfig { max: max.unwrap_or(default.max), delay: delay.unwrap_or(default.delay) }
    });
    let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Some(ModelConfig {
        name: name?.to_owned(),
        source: source?.to_owned(),
        instances: (small(instances.0), small(instances.1)),
        batch,
    })
}

fn tls_config(section: &Section<'_, '_>) -> Option<TlsConfig> {
    section.only(&["ca", "dir"]);
    let ca = required(section, "ca", section.string("ca"));
    let dir = required(section, "dir", section.string("dir"));
    Some(TlsConfig { ca: ca?.into(), dir: dir?.into() })
}

fn tiers(root: &Section<'_, '_>) -> (TierConfig, TierConfig) {
    let Some(section) = root.section("tiers") else { return Default::default() };
    section.only(&["hbm", "pinned"]);
    let tier = |key: &str| {
        let default = TierConfig::default();
        let Some(tier) = section.section(key) else { return default };
        tier.only(&["low", "high"]);
        let low = tier.share("low").unwrap_or(default.low);
        let high = tier.share("high").unwrap_or(default.high);
        if low >= high {
            tier.bad("low", format!("{low} must be less than high = {high}"));
        }
        TierConfig { low, high }
    };
    (tier("hbm"), tier("pinned"))
}

fn check_unique(
    root: &Section<'_, '_>,
    nodes: &[NodeConfig],
    tenants: &[TenantConfig],
    models: &[ModelConfig],
) {
    if nodes.len() as u64 > NODES_MAX {
        root.bad("node", format!("{} nodes are more than {NODES_MAX}", nodes.len()));
    }
    let twice = |key: &str, names: Vec<&str>| {
        let mut seen = HashSet::new();
        for name in names {
            if !seen.insert(name.to_owned()) {
                root.bad(key, format!("'{name}' is named twice"));
            }
        }
    };
    twice("node", nodes.iter().map(|node| node.name.as_str()).collect());
    twice("tenant", tenants.iter().map(|tenant| tenant.name.as_str()).collect());
    twice("model", models.iter().map(|model| model.name.as_str()).collect());
}

/// Without tenants there are no credentials, so only loopback may be served.
fn check_loopback(root: &Section<'_, '_>, nodes: &[NodeConfig], open: bool) {
    for (index, node) in nodes.iter().enumerate().filter(|_| open) {
        if !is_loopback(&node.http) {
            let reason = format!(
                "'{}' is not a loopback address: name at least one [[tenant]] to serve it",
                node.http
            );
            root.notes.note(root.span("node"), format!("node[{index}].http"), reason);
        }
    }
}

fn is_loopback(address: &str) -> bool {
    if let Ok(address) = address.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests;
