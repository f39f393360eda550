//! What is wrong with a file, and where.

use std::fmt;
use std::path::PathBuf;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// The key, as a dotted path: `node[0].gpu[1].memory`; empty for the file itself.
    pub key: String,
    /// What is wrong and what is allowed.
    pub reason: String,
}

/// All that is wrong with a file, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The file, as it was named.
    pub file: String,
    /// At least one.
    pub errors: Vec<ConfigError>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{}:{}:{}: ", self.file, error.line, error.column)?;
            if !error.key.is_empty() {
                write!(f, "{}: ", error.key)?;
            }
            f.write_str(&error.reason)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Why a file gave no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It could not be read.
    #[error("cannot read {path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A bootstrap file starts another cluster than the one described beside it.
    #[error(
        "{path}: starts cluster '{has}', but cluster.toml beside it describes '{wanted}': one of the two files was \
         copied from another cluster; put back the one that belongs here"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Which cluster it starts.
        has: String,
        /// Which cluster is meant.
        wanted: String,
    },
    /// It is wrong.
    #[error(transparent)]
    Invalid(#[from] ConfigErrors),
}
