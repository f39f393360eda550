//! From text to [`Config`]: every key of the format, once.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use keepwarm_types::{Bytes, NodeName, ShardCount, TenantName};
use toml::de::DeTable;

use crate::config::{
    BatchConfig, Config, DegradedWrites, DeviceKind, GpuConfig, ModelConfig, NodeConfig, SUSPECT_AFTER,
    SyncMode, TenantConfig, TierConfig, TlsConfig, WRITE_DEADLINE,
};
use crate::error::{ConfigErrors, LoadError};
use crate::section::{Notes, Section};

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
/// Least size of a memory that is reserved.
const SIZE_MIN: Bytes = Bytes(1 << 20);
/// Silence of a peer before it is suspected, in milliseconds: a tenth of a second is a few heartbeats.
const SUSPECT_MS: Range<u64> = 100..60_001;
/// Absence of a last copy before it counts as gone, in seconds: up to 30 days.
const GIVE_UP_S: Range<u64> = 1..30 * 24 * 3600 + 1;
/// A write's wait for its replicas, in milliseconds: up to ten minutes.
const WRITE_MS: Range<u64> = 100..600_001;
/// What a model's source begins with where it is a file.
const GGUF: &str = "gguf:";
/// What a model's source begins with where its weights are random.
const TINY: &str = "tiny:";

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
            Some(config) if !notes.any() => Ok(config.beside(Path::new(file))),
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

    /// Lets the relative paths of the file start at its folder rather than wherever the process was started.
    fn beside(mut self, file: &Path) -> Self {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        self.folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        let folder = self.folder.clone();
        if let Some(tls) = &mut self.tls {
            *tls = TlsConfig { ca: folder.join(&tls.ca), dir: folder.join(&tls.dir) };
        }
        for data_dir in self.nodes.iter_mut().filter_map(|node| node.data_dir.as_mut()) {
            *data_dir = folder.join(&*data_dir);
        }
        for model in &mut self.models {
            if let Some(path) = model.source.strip_prefix(GGUF) {
                model.source = format!("{GGUF}{}", folder.join(path).display());
            }
        }
        self
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
    let mut nodes = Placed::read(root, "node", node);
    if !root.has("node") {
        root.missing("node");
    }
    if let ([(_, only)], 1) = (&mut nodes.items[..], nodes.tables) {
        only.voter = true;
    }
    let tenants = Placed::read(root, "tenant", tenant);
    let models = Placed::read(root, "model", model);
    let tls = root.section("tls").and_then(|tls| tls_config(&tls));
    rules::unique(root, &nodes, &tenants, &models);
    rules::loopback(&nodes, tenants.tables == 0, !root.has("tls"));
    rules::voters(root, &nodes);
    rules::certificates(&nodes, tls.as_ref());
    let cluster = cluster?;
    cluster.only(&[
        "name",
        "replication",
        "shards",
        "degraded_writes",
        "sync",
        "suspect_after_ms",
        "give_up_after_s",
        "write_deadline_ms",
    ]);
    let name = cluster.string("name");
    if !cluster.has("name") {
        cluster.missing("name");
    }
    if name.is_some_and(|name| !keepwarm_types::valid_name(name)) {
        cluster.bad("name", "is not a name: 1 to 64 letters, digits, '.', '_' or '-'");
    }
    let replication = cluster.number("replication", 1..REPLICATION_MAX + 1);
    rules::copies(root, &cluster, &nodes, replication.unwrap_or(1));
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
    let suspect_after = cluster.number("suspect_after_ms", SUSPECT_MS).map(Duration::from_millis);
    let give_up_after = cluster.number("give_up_after_s", GIVE_UP_S).map(Duration::from_secs);
    let write_deadline = cluster.number("write_deadline_ms", WRITE_MS).map(Duration::from_millis);
    Some(Config {
        version: version?,
        hash: blake3::hash(text.as_bytes()).to_hex().to_string(),
        folder: PathBuf::new(),
        name: name?.to_owned(),
        replication: u32::try_from(replication.unwrap_or(1)).ok()?,
        shards: shards?,
        degraded_writes: if degraded == Some(1) { DegradedWrites::Refuse } else { DegradedWrites::Allow },
        sync: if sync == Some(1) { SyncMode::Interval } else { SyncMode::Always },
        suspect_after: suspect_after.unwrap_or(SUSPECT_AFTER),
        give_up_after,
        write_deadline: write_deadline.unwrap_or(WRITE_DEADLINE),
        tls,
        nodes: nodes.into_values(),
        tenants: tenants.into_values(),
        models: models.into_values(),
        hbm,
        pinned,
    })
}

/// What an array of tables was read into, each with its table, so that rules across them can name lines.
struct Placed<'a, 't, T> {
    items: Vec<(Section<'a, 't>, T)>,
    /// How many tables there are, read or not.
    tables: usize,
}

impl<'a, 't, T> Placed<'a, 't, T> {
    fn read(root: &Section<'a, 't>, key: &str, one: impl Fn(&Section<'a, 't>) -> Option<T>) -> Self {
        let sections = root.sections(key);
        let tables = sections.len();
        let read = |section: Section<'a, 't>| one(&section).map(|value| (section, value));
        Self { items: sections.into_iter().filter_map(read).collect(), tables }
    }

    /// Whether all could be read; where not, a count of them says nothing.
    fn is_whole(&self) -> bool {
        self.tables > 0 && self.items.len() == self.tables
    }

    fn into_values(self) -> Vec<T> {
        self.items.into_iter().map(|(_, value)| value).collect()
    }
}

fn required<T>(section: &Section<'_, '_>, key: &str, value: Option<T>) -> Option<T> {
    if value.is_none() && !section.has(key) {
        section.missing(key);
    }
    value
}

fn size(section: &Section<'_, '_>, key: &str) -> Option<Bytes> {
    let size: Bytes = section.parsed(key)?;
    if size < SIZE_MIN {
        section.bad(key, format!("{size} is too small: at least {SIZE_MIN}"));
        return None;
    }
    Some(size)
}

/// A node's pinned memory: none for one that only votes.
fn pinned(section: &Section<'_, '_>, voter: bool) -> Option<Bytes> {
    if section.quiet::<Bytes>("pinned") != Some(Bytes::ZERO) {
        return size(section, "pinned");
    }
    if voter && !section.has("gpu") {
        return Some(Bytes::ZERO);
    }
    let reason = format!(
        "0B is too small: at least {SIZE_MIN}, except on a node that only votes: voter = true, no [[node.gpu]]"
    );
    section.bad("pinned", reason);
    None
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
    let voter = section.flag("voter").unwrap_or(false);
    let pinned = required(section, "pinned", pinned(section, voter));
    let mut gpus: Vec<GpuConfig> = Vec::new();
    for section in section.sections("gpu") {
        let Some(gpu) = gpu(&section) else { continue };
        match gpus.iter().position(|other| other.device == gpu.device && gpu.device != DeviceKind::Host) {
            Some(first) => {
                section.bad("device", format!("{} is gpu[{first}] of this node already", gpu.device))
            }
            None => gpus.push(gpu),
        }
    }
    let peer = address(section, "peer").map(str::to_owned);
    let (zone, data_dir) = (section.string("zone"), section.string("data_dir"));
    Some(NodeConfig {
        name: name?,
        peer,
        http: http?.to_owned(),
        zone: zone.map(str::to_owned),
        pinned: pinned?,
        data_dir: data_dir.map(PathBuf::from),
        voter,
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
    if source.is_some_and(|source| !source.starts_with(GGUF) && !source.starts_with(TINY)) {
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

mod rules;
#[cfg(test)]
mod tests;
