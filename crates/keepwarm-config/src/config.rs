//! The configuration as the rest of keepwarm uses it: typed, whole, valid.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use keepwarm_types::{Bytes, NodeName, ParseBytesError, ShardCount, TenantName};

/// A valid `cluster.toml`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Raised with each change.
    pub version: u64,
    /// BLAKE3 of the text; of the empty text for a node without a file.
    pub hash: String,
    /// The file's folder, absolute, from which its relative paths start; empty for a node without a file.
    pub folder: PathBuf,
    /// Name of the cluster.
    pub name: String,
    /// Copies of each session's bytes.
    pub replication: u32,
    /// Number of shards, fixed for the cluster's life.
    pub shards: ShardCount,
    /// What happens to writes when fewer than `replication` nodes can hold.
    pub degraded_writes: DegradedWrites,
    /// When a commit is safe.
    pub sync: SyncMode,
    /// How long a peer may be silent before it is suspected.
    pub suspect_after: Duration,
    /// How long a shard's last copy may be away before it counts as gone; none waits for an operator.
    pub give_up_after: Option<Duration>,
    /// How long a write may wait for its replicas before its outcome counts as unknown.
    pub write_deadline: Duration,
    /// Certificates; needed beyond loopback.
    pub tls: Option<TlsConfig>,
    /// The nodes.
    pub nodes: Vec<NodeConfig>,
    /// The tenants; none: loopback serves the tenant `default`.
    pub tenants: Vec<TenantConfig>,
    /// The models.
    pub models: Vec<ModelConfig>,
    /// Watermarks of HBM.
    pub hbm: TierConfig,
    /// Watermarks of pinned memory.
    pub pinned: TierConfig,
}

/// What happens to writes when fewer nodes than `replication` can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DegradedWrites {
    /// They are taken, and say so.
    Allow,
    /// They are refused.
    Refuse,
}

/// When a catalog commit is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncMode {
    /// Once synced to disk.
    Always,
    /// Synced every 100 ms: a power cut may take what came since.
    Interval,
}

/// Where certificates are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// The cluster's CA.
    pub ca: PathBuf,
    /// Folder of NODE.pem and NODE.key.
    pub dir: PathBuf,
}

/// A node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeConfig {
    /// Its name.
    pub name: NodeName,
    /// Where peers reach it.
    pub peer: Option<String>,
    /// Where clients reach it.
    pub http: String,
    /// Its failure domain.
    pub zone: Option<String>,
    /// Pinned memory.
    pub pinned: Bytes,
    /// Where its catalog lies; none keeps it in memory.
    pub data_dir: Option<PathBuf>,
    /// Whether it votes in the registry; the only node of a file always does.
    pub voter: bool,
    /// Its GPUs.
    pub gpus: Vec<GpuConfig>,
}

impl NodeConfig {
    /// Whether it holds copies of sessions; a node without pinned memory only votes.
    #[must_use]
    pub fn stores(&self) -> bool {
        self.pinned > Bytes::ZERO
    }
}

/// A GPU of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuConfig {
    /// Which device.
    pub device: DeviceKind,
    /// How much of its memory to reserve.
    pub memory: Bytes,
}

/// Which device a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceKind {
    /// Host memory that stands in for a GPU's.
    Host,
    /// A CUDA device by number.
    Cuda(u32),
    /// A MIG instance by its UUID.
    Mig(String),
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Mig(uuid) => f.write_str(uuid),
        }
    }
}

/// Why a text names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDeviceError {
    /// The device is of no known kind.
    #[error("'{0}' is not a device: use host, cuda:N or a MIG UUID (MIG-...)")]
    Kind(String),
    /// `--gpu` needs a size.
    #[error("'{0}' has no size: write DEVICE=SIZE, as in host=256MiB")]
    NoSize(String),
    /// The size is not one.
    #[error(transparent)]
    Size(#[from] ParseBytesError),
}

impl FromStr for DeviceKind {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseDeviceError::Kind(text.to_owned());
        if text == "host" {
            return Ok(Self::Host);
        }
        if let Some(number) = text.strip_prefix("cuda:") {
            return number.parse().map(Self::Cuda).map_err(|_| error());
        }
        match text.strip_prefix("MIG-") {
            Some(uuid) if !uuid.is_empty() && uuid.chars().all(|c| c.is_ascii_hexdigit() || c == '-') => {
                Ok(Self::Mig(text.to_owned()))
            }
            _ => Err(error()),
        }
    }
}

/// A GPU on the command line: `host=256MiB`, `cuda:0=60GiB`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec(pub GpuConfig);

impl FromStr for DeviceSpec {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (device, size) = text.split_once('=').ok_or_else(|| ParseDeviceError::NoSize(text.to_owned()))?;
        Ok(Self(GpuConfig { device: device.parse()?, memory: size.parse()? }))
    }
}

/// A tenant.
#[derive(Debug, Clone, PartialEq)]
pub struct TenantConfig {
    /// Its name.
    pub name: TenantName,
    /// SHA-256 of its bearer token.
    pub token_sha256: [u8; 32],
    /// Whether it may make admin calls.
    pub admin: bool,
    /// Share of each tier beyond which it evicts its own first, 0 to 1.
    pub share: f64,
    /// Most sessions.
    pub sessions_max: u64,
    /// Most bytes protected forever.
    pub forever_bytes_max: Bytes,
}

/// A model to serve.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Its name in requests.
    pub name: String,
    /// Where it comes from: `gguf:PATH`, or `tiny:SEED` for a model with random weights.
    pub source: String,
    /// Contexts to keep, least and most.
    pub instances: (u32, u32),
    /// How steps are batched.
    pub batch: BatchConfig,
}

/// How steps are batched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchConfig {
    /// Sequences in a step.
    pub max: u32,
    /// How long to wait for more.
    pub delay: Duration,
}

/// Watermarks of a tier, as shares of its capacity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TierConfig {
    /// Evict down to this ...
    pub low: f64,
    /// ... once this is exceeded.
    pub high: f64,
}

impl Default for TierConfig {
    fn default() -> Self {
        Self { low: 0.80, high: 0.92 }
    }
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self { max: 8, delay: Duration::from_micros(2000) }
    }
}

/// What a node without a file is told on the command line.
#[derive(Debug, Clone)]
pub struct SingleNode {
    /// Its name.
    pub name: NodeName,
    /// Where to answer HTTP.
    pub http: String,
    /// Its GPUs; one host GPU of 256 MiB where none is named.
    pub gpus: Vec<GpuConfig>,
    /// Pinned memory.
    pub pinned: Bytes,
    /// Where the catalog lies; none keeps it in memory.
    pub data_dir: Option<PathBuf>,
    /// Models to serve.
    pub models: Vec<ModelConfig>,
}

/// Shards of a node without a file: enough to keep one busy session's commits from another's.
const SINGLE_SHARDS: u64 = 64;
/// Silence before a peer is suspected, where the file does not say: a take-over is to end within a second.
pub(crate) const SUSPECT_AFTER: Duration = Duration::from_millis(400);
/// A write's wait for its replicas, where the file does not say: longer than a suspicion and a take-over.
pub(crate) const WRITE_DEADLINE: Duration = Duration::from_secs(5);

impl Config {
    /// A cluster of one that needs no file.
    #[must_use]
    pub fn single(node: SingleNode) -> Self {
        let default_gpu = || vec![GpuConfig { device: DeviceKind::Host, memory: Bytes(256 << 20) }];
        let gpus = if node.gpus.is_empty() { default_gpu() } else { node.gpus };
        Self {
            version: 0,
            hash: blake3::hash(b"").to_hex().to_string(),
            folder: PathBuf::new(),
            name: "single".to_owned(),
            replication: 1,
            shards: ShardCount::new(SINGLE_SHARDS).expect("a power of two"),
            degraded_writes: DegradedWrites::Allow,
            sync: SyncMode::Always,
            suspect_after: SUSPECT_AFTER,
            give_up_after: None,
            write_deadline: WRITE_DEADLINE,
            tls: None,
            nodes: vec![NodeConfig {
                name: node.name,
                peer: None,
                http: node.http,
                zone: None,
                pinned: node.pinned,
                data_dir: node.data_dir,
                voter: true,
                gpus,
            }],
            tenants: Vec::new(),
            models: node.models,
            hbm: TierConfig::default(),
            pinned: TierConfig::default(),
        }
    }

    /// The node `name`.
    #[must_use]
    pub fn node(&self, name: &NodeName) -> Option<&NodeConfig> {
        self.nodes.iter().find(|node| node.name == *name)
    }

    /// The nodes that vote in the registry, in the file's order.
    pub fn voters(&self) -> impl Iterator<Item = &NodeConfig> {
        self.nodes.iter().filter(|node| node.voter)
    }

    /// The nodes that hold copies of sessions, in the file's order.
    pub fn storing(&self) -> impl Iterator<Item = &NodeConfig> {
        self.nodes.iter().filter(|node| node.stores())
    }

    /// Whether there are several nodes: then they have peers, a registry and a bootstrap file.
    #[must_use]
    pub const fn is_cluster(&self) -> bool {
        self.nodes.len() > 1
    }

    /// A path beside the file: relative ones start at its folder. Paths in the configuration have been
    /// through this already, and stay as they are.
    #[must_use]
    pub fn path_of(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.folder.join(relative)
    }
}
