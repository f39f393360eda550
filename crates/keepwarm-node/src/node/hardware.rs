//! What a node's configuration asks of its machine: GPUs, page-locked memory, and the regions that engines work in.

use std::sync::Arc;

use keepwarm_config::{Config, DeviceKind, GpuConfig, NodeConfig};
use keepwarm_memory::{
    Arena, ArenaSettings, CUDA_PATIENCE, CudaClaim, CudaDevice, CudaDriver, CudaError, CudaSelector, Device,
    FaultPlan, HostDevice,
};
use keepwarm_types::Bytes;

use super::start::StartError;
use crate::gpu::Board;
use crate::router::gpu_index;

/// The most that an engine on the CPU gets of the host's memory to work on behalf of one GPU: some 32 turns of 64 MiB.
pub const WORKSPACE_MAX: Bytes = Bytes(2 << 30);

/// Reserved memory and running devices.
pub(super) struct Hardware {
    pub(super) pinned: Arena,
    pub(super) boards: Vec<Arc<Board>>,
    pub(super) faults: Vec<Arc<FaultPlan>>,
}

/// Reserves a node's memory and opens its devices.
///
/// # Errors
/// [`StartError::Memory`] and [`StartError::Device`]; each names the key.
pub(super) fn open(config: &Config, node: &NodeConfig) -> Result<Hardware, StartError> {
    let device = |key: String, value: String, cause| {
        let cause = Box::new(cause);
        StartError::Device { node: node.name.clone(), key, value, cause }
    };
    let memory =
        |what: &str, cause| StartError::Memory { node: node.name.clone(), what: what.to_owned(), cause };
    let (mut boards, mut faults, mut driver, mut locker) = (Vec::new(), Vec::new(), None, None);
    for (index, gpu) in node.gpus.iter().enumerate() {
        let plan = Arc::new(FaultPlan::default());
        let settings = ArenaSettings::new(format!("hbm:{index}"), gpu.memory);
        let board = match cuda_selector(&gpu.device) {
            None => {
                let opened = HostDevice::new(&settings, Arc::clone(&plan));
                let opened = opened.map_err(|cause| memory(&format!("gpu[{index}].memory"), cause))?;
                Board::new(gpu_index(index), Arc::new(opened))
            }
            Some(selector) => {
                let refused = |cause: CudaError| match cause.is_about_memory() {
                    true => device(format!("gpu[{index}].memory"), gpu.memory.to_string(), cause),
                    false => device(format!("gpu[{index}].device"), gpu.device.to_string(), cause),
                };
                let (opened, claim) = cuda(&mut driver, &selector, &settings, &plan).map_err(refused)?;
                let workspace = workspace(config, index, gpu, &opened)
                    .map_err(|cause| device("model".to_owned(), "builtin".to_owned(), cause))?;
                locker.get_or_insert_with(|| Arc::clone(&opened));
                Board::new(gpu_index(index), opened).claimed(claim).working_in(workspace)
            }
        };
        boards.push(Arc::new(board));
        faults.push(plan);
    }
    let settings = ArenaSettings::new("pinned", node.pinned);
    let pinned = match locker {
        Some(cuda) => cuda
            .page_locked(&settings)
            .map_err(|cause| device("pinned".to_owned(), node.pinned.to_string(), cause))?,
        None => Arena::reserve(&settings.locked()).map_err(|cause| memory("pinned", cause))?,
    };
    if let Err(reason) = pinned.locked() {
        tracing::warn!(%reason, "pinned memory is not locked");
    }
    Ok(Hardware { pinned, boards, faults })
}

/// Which CUDA device a configuration means; none for the host's.
#[must_use]
pub fn cuda_selector(device: &DeviceKind) -> Option<CudaSelector> {
    match device {
        DeviceKind::Host => None,
        DeviceKind::Cuda(number) => Some(CudaSelector::Number(*number)),
        DeviceKind::Mig(uuid) => Some(CudaSelector::Uuid(uuid.clone())),
    }
}

fn cuda(
    driver: &mut Option<CudaDriver>,
    selector: &CudaSelector,
    settings: &ArenaSettings,
    faults: &Arc<FaultPlan>,
) -> Result<(Arc<CudaDevice>, CudaClaim), CudaError> {
    let driver = match driver {
        Some(driver) => driver,
        None => driver.insert(CudaDriver::load()?),
    };
    let found = driver.find(selector)?;
    let claim = found.claim()?;
    let device = CudaDevice::open(driver, selector, settings, Arc::clone(faults), CUDA_PATIENCE)?;
    tracing::info!(device = %selector, name = found.name, uuid = found.uuid, memory = %settings.bytes, "GPU opened");
    Ok((Arc::new(device), claim))
}

/// Where engines that compute on the CPU work for a GPU whose memory they cannot touch; none where none runs here.
fn workspace(
    config: &Config,
    index: usize,
    gpu: &GpuConfig,
    device: &CudaDevice,
) -> Result<Option<Arena>, CudaError> {
    if config.models.is_empty() || device.arena().is_on_host() {
        return Ok(None);
    }
    let bytes = Bytes(gpu.memory.0.min(WORKSPACE_MAX.0));
    device.page_locked(&ArenaSettings::new(format!("engine:{index}"), bytes)).map(Some)
}
