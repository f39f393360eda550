//! What operators see, over HTTP.

use keepwarm_core::registry::{NodeState, NodeStatus};
use keepwarm_node::{ArenaInfo, ClusterInfo, GpuInfo, GpuState, NodeEvent, NodeInfo, ScratchInfo, ShardInfo};
use serde_json::{Value, json};

use super::time::rfc3339;

fn arena(arena: &ArenaInfo) -> Value {
    json!({
        "reserved_bytes": arena.reserved.0,
        "used_bytes": arena.used.0,
        "largest_free_bytes": arena.largest_free.0,
        "fragmentation": arena.fragmentation,
    })
}

fn scratch(info: &ScratchInfo) -> Value {
    json!({
        "stream": info.stream,
        "reserved_bytes": info.reserved.0,
        "reserved_high_bytes": info.reserved_high.0,
        "used_bytes": info.used.0,
        "used_high_bytes": info.used_high.0,
    })
}

pub(crate) fn gpu(info: &GpuInfo) -> Value {
    let (state, reason) = match &info.state {
        GpuState::Up => ("up", None),
        GpuState::Fenced(reason) => ("fenced", Some(reason)),
    };
    let contexts = info.contexts.iter().map(|context| {
        json!({"model": context.model, "busy": context.busy, "idle": context.idle, "bytes": context.bytes.0})
    });
    json!({
        "gpu": info.index.0,
        "device": info.device,
        "state": state,
        "reason": reason,
        "arena": arena(&info.arena),
        "sessions": info.sessions,
        "leases": info.leases,
        "scratch": info.scratch.iter().map(scratch).collect::<Vec<_>>(),
        "contexts": contexts.collect::<Vec<_>>(),
        "dirty_bytes": info.dirty.0,
    })
}

pub(crate) fn node(info: &NodeInfo) -> Value {
    json!({
        "name": info.name.to_string(),
        "status": info.status,
        "incarnation": info.incarnation.0,
        "http": info.http,
        "gpus": info.gpus.iter().map(gpu).collect::<Vec<_>>(),
        "pinned": {
            "arena": arena(&info.pinned.arena),
            "locked": info.pinned.locked.is_ok(),
            "reason": info.pinned.locked.as_ref().err(),
            "sessions": info.pinned.sessions,
        },
        "safe_to_stop": info.safe_to_stop.is_ok(),
        "reason": info.safe_to_stop.as_ref().err(),
    })
}

pub(crate) fn cluster(info: &ClusterInfo, nodes: &[Value]) -> Value {
    json!({
        "name": info.name,
        "nodes": nodes,
        "shards": info.shards,
        "replication": info.replication,
        "under_replicated_shards": info.under_replicated_shards,
        "under_replicated_sessions": info.under_replicated_sessions,
        "spec": {"version": info.spec_version, "hash": info.spec_hash},
        "registry_leader": info.registry_leader.as_ref().map(ToString::to_string),
    })
}

pub(crate) fn shard(info: &ShardInfo) -> Value {
    json!({
        "shard": info.id.0,
        "generation": info.generation.0,
        "replicas": info.replicas.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "learner": info.learner.as_ref().map(ToString::to_string),
        "sessions": info.sessions,
    })
}

/// A node that did not answer itself, as the registry has it.
pub(crate) fn known(state: &NodeState) -> Value {
    json!({
        "name": state.registration.node.to_string(),
        "status": status(state.status),
        "incarnation": state.incarnation.0,
        "http": state.registration.http,
    })
}

/// The word for a node's status.
pub(crate) const fn status(status: NodeStatus) -> &'static str {
    match status {
        NodeStatus::Up => "up",
        NodeStatus::Draining => "draining",
        NodeStatus::Down => "down",
    }
}

/// An event as the tenant `tenant` may see it; an admin sees all.
pub(crate) fn event(event: &NodeEvent) -> Value {
    json!({
        "at": rfc3339(event.at),
        "kind": event.kind,
        "session": event.session.as_ref().map(|key| key.id.to_string()),
        "detail": event.detail,
        "bytes": event.bytes.0,
        "duration_ms": event.duration.0,
    })
}

#[cfg(test)]
mod tests {
    use keepwarm_types::{Bytes, GpuIndex};

    use super::*;

    #[test]
    fn a_gpu_shows_the_temporary_memory_of_its_streams() {
        let pools = ScratchInfo {
            stream: "links",
            reserved: Bytes(4),
            reserved_high: Bytes(5),
            used: Bytes(2),
            used_high: Bytes(3),
        };
        let info = GpuInfo {
            index: GpuIndex(1),
            device: "cuda:1".to_owned(),
            state: GpuState::Up,
            arena: ArenaInfo::default(),
            sessions: 0,
            leases: 0,
            scratch: vec![pools],
            contexts: Vec::new(),
            dirty: Bytes(0),
        };
        let shown = json!([{
            "stream": "links", "reserved_bytes": 4, "reserved_high_bytes": 5, "used_bytes": 2, "used_high_bytes": 3,
        }]);
        assert_eq!(gpu(&info)["scratch"], shown);
        assert_eq!(
            gpu(&GpuInfo { scratch: Vec::new(), ..info })["scratch"],
            json!([]),
            "a host device has none"
        );
    }
}
