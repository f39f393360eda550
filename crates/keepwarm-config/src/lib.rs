//! `cluster.toml`: text to a validated [`Config`], with errors that name file, line, key and what to do.
//!
//! Reading reports every error of a file at once. Nothing here opens sockets or devices: whether an address
//! can be bound or a GPU is there is for the process that starts.

mod bootstrap;
mod config;
mod error;
mod local;
mod read;
mod section;
mod warning;

pub use bootstrap::Bootstrap;
pub use config::{
    BatchConfig, Config, DegradedWrites, DeviceKind, DeviceSpec, GpuConfig, ModelConfig, NodeConfig,
    ParseDeviceError, SingleNode, SyncMode, TenantConfig, TierConfig, TlsConfig,
};
pub use error::{ConfigError, ConfigErrors, LoadError};
pub use local::{LocalCluster, LocalError};
