//! One process per device: a name that the first one takes. Owns the name while it lives.

use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use super::driver::{CudaError, CudaFound};

/// A device that is this process's alone, among those that claim.
#[derive(Debug)]
pub struct CudaClaim(#[expect(dead_code, reason = "held for its name")] UnixListener);

impl CudaFound {
    /// Keeps every other process of this machine from claiming the device while the claim lives. It ends with the process,
    /// however that ends: it is a socket's name in Linux's abstract name space, which belongs to a network name space,
    /// so containers that share a GPU and no network do not see each other's.
    ///
    /// # Errors
    /// [`CudaError::Taken`] where somebody has it, [`CudaError::System`].
    pub fn claim(&self) -> Result<CudaClaim, CudaError> {
        let name = format!("keepwarm-gpu-{}", self.uuid);
        let address = SocketAddr::from_abstract_name(name).map_err(CudaError::System)?;
        UnixListener::bind_addr(&address).map(CudaClaim).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => {
                CudaError::Taken { device: format!("cuda:{}", self.number), uuid: self.uuid.clone() }
            }
            _ => CudaError::System(error),
        })
    }
}
