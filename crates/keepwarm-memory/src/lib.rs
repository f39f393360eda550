//! Arenas, block guards, devices, checksums: the only unsafe code.
