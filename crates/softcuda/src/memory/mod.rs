//! Memory as the devices see it: one reservation of address space, cut into an area per device, one for
//! page-locked host memory and one for memory opened from other processes. A device address is a host address.

pub(crate) mod area;
pub(crate) mod pool;
pub(crate) mod space;

/// Bytes of device memory that no operation has written since their allocation.
pub const POISON_ALLOCATED: u8 = 0xCB;
/// Bytes of device memory after their release.
pub const POISON_FREED: u8 = 0xFD;
/// Bytes of page-locked memory that nobody has written since its allocation.
pub const POISON_PINNED: u8 = 0xC9;
/// Alignment and granularity of every allocation, as on a GPU.
pub(crate) const ALIGNMENT: usize = 512;
/// Address space that stays empty behind each allocation, so that what runs over an end meets no neighbour.
pub(crate) const RED_ZONE: usize = 512;
