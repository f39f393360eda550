//! Why a command ended without doing its work, and the exit code that says so (sysexits.h).

use std::fmt;
use std::process::ExitCode;

use keepwarm_client::ClientError;

/// What kind of failure it was, as scripts can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anything else: 1.
    Failed,
    /// The command line asks for something that cannot be: 2, as clap has it.
    Usage,
    /// The server is not there, or its address or data folder cannot be had: 69, `EX_UNAVAILABLE`.
    Unavailable,
    /// The configuration is wrong: 78, `EX_CONFIG`.
    Config,
}

impl Kind {
    const fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Unavailable => 69,
            Self::Config => 78,
        }
    }
}

/// A command's failure.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: Kind,
    message: String,
}

impl Failure {
    pub(crate) fn new(kind: Kind, message: impl fmt::Display) -> Self {
        Self { kind, message: message.to_string() }
    }

    pub(crate) fn failed(message: impl fmt::Display) -> Self {
        Self::new(Kind::Failed, message)
    }

    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(Kind::Usage, message)
    }

    pub(crate) fn config(message: impl fmt::Display) -> Self {
        Self::new(Kind::Config, message)
    }

    pub(crate) fn unavailable(message: impl fmt::Display) -> Self {
        Self::new(Kind::Unavailable, message)
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.kind.code())
    }

    #[cfg(test)]
    pub(crate) const fn kind(&self) -> Kind {
        self.kind
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let kind = match &error {
            ClientError::Usage(_) => Kind::Usage,
            error if error.is_unavailable() => Kind::Unavailable,
            _ => Kind::Failed,
        };
        Self::new(kind, error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::failed(error)
    }
}
