//! `cluster.toml`: text to a validated [`Config`], with errors that name file, line, key and what to do.
//!
//! Reading reports every error of a file at once. Nothing here opens sockets or devices: whether an address
//! can be bound or a GPU is there is for the process that starts.

mod config;
mod error;
mod read;
mod section;

pub use config::{
    BatchConfig, Config, DegradedWrites, DeviceKind, DeviceSpec, GpuConfig, ModelConfig, NodeConfig,
    ParseDeviceError, SingleNode, SyncMode, TenantConfig, TierConfig, TlsConfig,
};
pub use error::{ConfigError, ConfigErrors, LoadError};
