//! Bodies that are being received, by shard: what is written to a shard that goes to another node is refused at its end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use keepwarm_types::ShardId;

/// How many of each shard; as many as clients have permits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Uploads(Arc<Mutex<HashMap<ShardId, usize>>>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(crate) struct Upload(Uploads, ShardId);

impl Uploads {
    pub(crate) fn begin(&self, shard: ShardId) -> Upload {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(shard).or_default() += 1;
        Upload(self.clone(), shard)
    }

    pub(crate) fn any(&self, shard: ShardId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&shard)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let mut shards = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = shards.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                shards.remove(&self.1);
            }
        }
    }
}
