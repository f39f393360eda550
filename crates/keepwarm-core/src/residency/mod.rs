//! One tier's memory: LRU, watermarks, protection, shares; for gpu and pinned alike.
