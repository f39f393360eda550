//! The guards of a shard's bytes, counted by name.

use std::collections::HashMap;

use keepwarm_core::session::BlockRef;
use keepwarm_core::shard::Answer;
use keepwarm_memory::Block;
use keepwarm_types::{Birth, InstanceId};

use crate::error::Error;

/// One guard per instance, and how many manifests, stages and inboxes name it.
struct Named {
    block: Block,
    names: u32,
}

/// All guards of one shard.
#[derive(Default)]
pub(super) struct Guards {
    named: HashMap<InstanceId, Named>,
}

impl Guards {
    /// Takes a guard with one name. An instance that is here already gets one name more, and the bytes that have just been
    /// verified: those that were here may be damaged.
    pub(super) fn take(&mut self, block: Block) {
        let instance = block.instance();
        let names = self.named.get(&instance).map_or(1, |named| named.names + 1);
        self.named.insert(instance, Named { block, names });
    }

    pub(super) fn retain(&mut self, instances: &[InstanceId]) {
        for instance in instances {
            if let Some(named) = self.named.get_mut(instance) {
                named.names += 1;
            }
        }
    }

    /// Takes a name away; an instance that is not here is none's.
    pub(super) fn release(&mut self, instances: &[InstanceId]) {
        for instance in instances {
            if let Some(named) = self.named.get_mut(instance) {
                named.names -= 1;
                if named.names == 0 {
                    self.named.remove(instance);
                }
            }
        }
    }

    /// A guard of an instance for a reader.
    fn share(&self, instance: InstanceId, birth: Birth) -> Result<Block, Error> {
        let lost = || Error::Internal(format!("no guard of instance {} that a manifest names", instance.0));
        self.named.get(&instance).map(|named| named.block.share(birth)).ok_or_else(lost)
    }

    /// Guards of these blocks, if all are here.
    pub(super) fn all(&self, blocks: &[BlockRef], birth: Birth) -> Option<Vec<Block>> {
        blocks.iter().map(|block| self.share(block.instance, birth).ok()).collect()
    }

    /// Guards of what an answer names, made for its reader.
    pub(super) fn of(&self, answer: &Answer) -> Result<Vec<Block>, Error> {
        match answer {
            Answer::Read(grant) => {
                let parts = grant.manifest.parts.iter().enumerate();
                let wanted = parts.filter(|(index, _)| grant.part.is_none_or(|part| part == *index));
                let blocks = wanted.flat_map(|(_, part)| &part.blocks);
                blocks.map(|block| self.share(block.instance, grant.manifest.birth)).collect()
            }
            Answer::Lease(grant) => {
                let instances = grant.manifest.instances();
                instances.map(|block| self.share(block.instance, grant.manifest.birth)).collect()
            }
            Answer::Plan(plan) => {
                plan.tail.iter().map(|tail| self.share(tail.instance, plan.birth)).collect()
            }
            _ => Ok(Vec::new()),
        }
    }
}
