//! Links between two CUDA devices (CUDA Driver API, "Peer Context Memory Access").
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::Arc;

use super::CudaDevice;
use super::driver::{CudaError, call};
use super::lane::{self, Side};
use super::scratch::Shown;
use crate::device::event::Progress;
use crate::device::link::{Link, LinkEnd, LinkError, source_gone};

/// `CUDA_ERROR_PEER_ACCESS_UNSUPPORTED`.
const UNSUPPORTED: u32 = 217;
/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`: by another link, or another library of the process.
const ALREADY_ENABLED: u32 = 704;
/// `CUDA_ERROR_TOO_MANY_PEERS`: the hardware has no room for one more.
const TOO_MANY: u32 = 711;

/// Why a device's memory is not to be reached.
enum Barred {
    /// There is no way.
    No(String),
    Failed(CudaError),
}

impl From<CudaError> for Barred {
    fn from(error: CudaError) -> Self {
        Self::Failed(error)
    }
}

/// Lets one device's copies write into another's memory.
fn reach(source: &Side, target: &Side) -> Result<(), Barred> {
    let (from, to) = (&source.context, &target.context);
    let driver = from.driver();
    let mut can: c_int = 0;
    call!(driver, can_peer(&raw mut can, from.device(), to.device()))?;
    if can != 1 {
        return Err(Barred::No("the driver shows no peer access between them".to_owned()));
    }
    from.enter()?;
    match call!(driver, enable_peer(to.number(), 0)) {
        Ok(()) => Ok(()),
        Err(error) => match error.code() {
            Some(ALREADY_ENABLED) => Ok(()),
            Some(UNSUPPORTED | TOO_MANY) => Err(Barred::No(error.to_string())),
            _ => Err(error.into()),
        },
    }
}

fn end(device: &CudaDevice) -> LinkEnd {
    LinkEnd {
        name: device.name.clone(),
        health: Arc::clone(&device.side.health),
        context: device.side.context.number(),
    }
}

/// Makes a link, with its streams and threads.
pub(super) fn open(source: &CudaDevice, target: &CudaDevice) -> Result<Link, LinkError> {
    let (from, to) = (end(source), end(target));
    from.serves()?;
    to.serves()?;
    let names = || (from.name.clone(), to.name.clone());
    let failed = |error: CudaError| {
        let (from, to) = names();
        LinkError::Failed { from, to, why: error.to_string() }
    };
    reach(&source.side, &target.side).map_err(|barred| match barred {
        Barred::No(why) => {
            let (from, to) = names();
            LinkError::NotPossible { from, to, why }
        }
        Barred::Failed(error) => failed(error),
    })?;
    let (progress, scratch) = (Arc::<Progress>::default(), Arc::<Shown>::default());
    // Plain copies: no kernels of the source have a part in them.
    let issues = Side { kernels: None, ..source.side.clone() };
    let name = format!("{}-{}", from.name, to.name);
    let queue =
        lane::start(&name, (&issues, source_gone), &target.side, &progress, &scratch).map_err(failed)?;
    Ok(Link { source: from, target: to, queue, progress, scratch })
}
