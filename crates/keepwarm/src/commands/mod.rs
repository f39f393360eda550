//! The commands that ask a node, or look at a file or this machine.

pub(crate) mod bench;
pub(crate) mod cert;
pub(crate) mod chat;
pub(crate) mod check;
pub(crate) mod gpu;
pub(crate) mod init;
pub(crate) mod model;
pub(crate) mod sessions;
pub(crate) mod status;

use keepwarm_client::Client;

use crate::cli::Remote;
use crate::failure::Failure;

/// The client of a command.
pub(crate) fn client(remote: &Remote) -> Result<Client, Failure> {
    Ok(Client::builder(&remote.url).token(remote.token.clone()).build()?)
}
