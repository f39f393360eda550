//! Result codes of the driver API, with their names and texts. Knows nothing of who returns them.

use std::ffi::CStr;

/// A `CUresult` other than success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Code(pub u32);

/// What a call answers.
pub(crate) type Answer<T> = Result<T, Code>;

impl Code {
    /// A parameter is out of its range.
    pub(crate) const INVALID_VALUE: Self = Self(1);
    /// The device's memory or a limit of this library is used up.
    pub(crate) const OUT_OF_MEMORY: Self = Self(2);
    /// `cuInit` was not called, or failed.
    pub(crate) const NOT_INITIALIZED: Self = Self(3);
    /// There is no device.
    pub(crate) const NO_DEVICE: Self = Self(100);
    /// There is no device of that ordinal.
    pub(crate) const INVALID_DEVICE: Self = Self(101);
    /// A module's image is neither PTX text nor readable.
    pub(crate) const INVALID_IMAGE: Self = Self(200);
    /// No context is current, or it is gone.
    pub(crate) const INVALID_CONTEXT: Self = Self(201);
    /// Memory could not be mapped.
    pub(crate) const MAP_FAILED: Self = Self(205);
    /// The two devices cannot reach each other's memory.
    pub(crate) const PEER_ACCESS_UNSUPPORTED: Self = Self(217);
    /// The machine refused what was asked of it.
    pub(crate) const OPERATING_SYSTEM: Self = Self(304);
    /// A handle names nothing that lives.
    pub(crate) const INVALID_HANDLE: Self = Self(400);
    /// A name was not found.
    pub(crate) const NOT_FOUND: Self = Self(500);
    /// Work is not done yet.
    pub(crate) const NOT_READY: Self = Self(600);
    /// An access outside of live memory; sticky.
    pub(crate) const ILLEGAL_ADDRESS: Self = Self(700);
    /// Peer access is enabled already.
    pub(crate) const PEER_ACCESS_ALREADY_ENABLED: Self = Self(704);
    /// Peer access is not enabled.
    pub(crate) const PEER_ACCESS_NOT_ENABLED: Self = Self(705);
    /// The context was destroyed.
    pub(crate) const CONTEXT_IS_DESTROYED: Self = Self(709);
    /// That memory is registered already.
    pub(crate) const HOST_MEMORY_ALREADY_REGISTERED: Self = Self(712);
    /// That memory is not registered.
    pub(crate) const HOST_MEMORY_NOT_REGISTERED: Self = Self(713);
    /// Not allowed here, such as a driver call in a host function.
    pub(crate) const NOT_PERMITTED: Self = Self(800);
    /// Not supported by this device.
    pub(crate) const NOT_SUPPORTED: Self = Self(801);
    /// Something else.
    pub(crate) const UNKNOWN: Self = Self(999);

    /// Its name and text, if the driver API has it.
    pub(crate) fn describe(number: u32) -> Option<(&'static CStr, &'static CStr)> {
        TABLE.iter().find(|(code, ..)| *code == number).map(|(_, name, text)| (*name, *text))
    }
}

const TABLE: &[(u32, &CStr, &CStr)] = &[
    (0, c"CUDA_SUCCESS", c"no error"),
    (1, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
    (2, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
    (3, c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
    (4, c"CUDA_ERROR_DEINITIALIZED", c"driver shutting down"),
    (34, c"CUDA_ERROR_STUB_LIBRARY", c"CUDA driver is a stub library"),
    (46, c"CUDA_ERROR_DEVICE_UNAVAILABLE", c"device is busy or unavailable"),
    (100, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"),
    (101, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
    (200, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
    (201, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
    (205, c"CUDA_ERROR_MAP_FAILED", c"mapping of buffer object failed"),
    (214, c"CUDA_ERROR_ECC_UNCORRECTABLE", c"uncorrectable ECC error encountered"),
    (217, c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", c"peer access is not supported between these two devices"),
    (218, c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed"),
    (220, c"CUDA_ERROR_NVLINK_UNCORRECTABLE", c"uncorrectable NVLink error detected during the execution"),
    (
        222,
        c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        c"the provided PTX was compiled with an unsupported toolchain",
    ),
    (304, c"CUDA_ERROR_OPERATING_SYSTEM", c"OS call failed or operation not supported on this OS"),
    (400, c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
    (401, c"CUDA_ERROR_ILLEGAL_STATE", c"the operation cannot be performed in the present state"),
    (500, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
    (600, c"CUDA_ERROR_NOT_READY", c"device not ready"),
    (700, c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
    (701, c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", c"too many resources requested for launch"),
    (702, c"CUDA_ERROR_LAUNCH_TIMEOUT", c"the launch timed out and was terminated"),
    (704, c"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", c"peer access is already enabled"),
    (705, c"CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", c"peer access has not been enabled"),
    (709, c"CUDA_ERROR_CONTEXT_IS_DESTROYED", c"context is destroyed"),
    (710, c"CUDA_ERROR_ASSERT", c"device-side assert triggered"),
    (712, c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", c"part or all of the memory is already registered"),
    (
        713,
        c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        c"pointer does not correspond to a registered memory region",
    ),
    (714, c"CUDA_ERROR_HARDWARE_STACK_ERROR", c"hardware stack error"),
    (715, c"CUDA_ERROR_ILLEGAL_INSTRUCTION", c"an illegal instruction was encountered"),
    (716, c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address"),
    (719, c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
    (800, c"CUDA_ERROR_NOT_PERMITTED", c"operation not permitted"),
    (801, c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
    (802, c"CUDA_ERROR_SYSTEM_NOT_READY", c"system not yet initialized"),
    (
        803,
        c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        c"system has unsupported display driver / cuda driver combination",
    ),
    (805, c"CUDA_ERROR_MPS_CONNECTION_FAILED", c"MPS client failed to connect to the MPS control daemon"),
    (999, c"CUDA_ERROR_UNKNOWN", c"unknown error"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_names() {
        assert_eq!(Code::describe(700).map(|(name, _)| name), Some(c"CUDA_ERROR_ILLEGAL_ADDRESS"));
        assert_eq!(Code::describe(0).map(|(_, text)| text), Some(c"no error"));
        assert_eq!(Code::describe(12_345), None);
    }

    #[test]
    fn the_table_is_sorted_and_without_repeats() {
        assert!(TABLE.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
