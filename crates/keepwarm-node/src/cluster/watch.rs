//! The registry's news to the shards, and who hears whom to the registry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use keepwarm_core::registry::{Fitness, HealthReport, Member, NodeStatus, Registry, Unheard, leavers};
use keepwarm_transport::certificate::TlsPaths;
use keepwarm_transport::quic::QuicTransport;
use keepwarm_types::{Generation, Millis, ShardId};
use tokio::time::Instant;

use super::Cluster;
use crate::handle::Handle;
use crate::shard::ShardMsg;

/// How often the certificates' files are looked at.
const CERTIFICATES_EVERY: Duration = Duration::from_secs(2);
/// How often shards are told again who is to leave, though nothing has changed.
const TELL_AGAIN: Duration = Duration::from_secs(5);
/// How often this node tells the registry's leader whom it does not hear.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// Tells each shard its set, now and at every change.
pub(super) async fn follow(cluster: Arc<Cluster>, handle: Handle) {
    let mut map = cluster.map.clone();
    let mut told = 0;
    let mut gone = BTreeSet::new();
    let (mut leaving, mut retold) = (BTreeMap::new(), Instant::now());
    loop {
        let registry = map.borrow_and_update().clone();
        for shard in registry.shards_since(told) {
            let (Some(set), Some(actor)) = (registry.set(shard), handle.links().shard_at(shard)) else {
                continue;
            };
            let _ = actor.cast(ShardMsg::Set(Arc::new(set)));
        }
        if retold.elapsed() >= TELL_AGAIN {
            // A shard's actor that began anew does not know of it any more.
            (leaving, retold) = (BTreeMap::new(), Instant::now());
        }
        tell_who_leaves(&cluster, &handle, &registry, &mut leaving);
        told = registry.version();
        let down = registry.nodes().iter().filter(|node| node.status == NodeStatus::Down);
        let down: BTreeSet<_> = down.map(|node| (node.registration.node.clone(), node.incarnation)).collect();
        for (name, incarnation) in down.difference(&gone) {
            handle
                .note_failure(None, format!("node '{name}' (incarnation {incarnation}) is taken for failed"));
            // Nobody needs to wait for a process that has failed.
            if *name != cluster.member().node {
                cluster.transport().disconnect(name);
            }
        }
        gone = down;
        cluster.told.send_replace(Arc::clone(&registry));
        match fate(&cluster, &registry) {
            Fate::GoesOn => {}
            Fate::Replaced(why) => return handle.fail(why),
            Fate::Superseded(why) => return handle.supersede(why),
        }
        if let Ok(Err(_)) = tokio::time::timeout(TELL_AGAIN, map.changed()).await {
            return;
        }
    }
}

/// Tells the shards that this node leads who is to leave their sets, anew for each set.
fn tell_who_leaves(
    cluster: &Cluster,
    handle: &Handle,
    registry: &Registry,
    told: &mut BTreeMap<ShardId, (Generation, Member)>,
) {
    let me = cluster.member();
    let led = registry.shards().filter(|shard| registry.primary(*shard).as_ref() == Some(me));
    let leavers = leavers(registry, led, &handle.slow()).into_iter();
    let named = |(shard, member)| Some((shard, (registry.set(shard)?.generation, member)));
    let leaving: BTreeMap<_, _> = leavers.filter_map(named).collect();
    for (shard, (generation, member)) in &leaving {
        if told.get(shard).is_none_or(|(known, before)| known != generation || before != member)
            && let Some(actor) = handle.links().shard_at(*shard)
        {
            let _ = actor.cast(ShardMsg::Leaves(*generation, Some(member.clone())));
        }
    }
    for (shard, (generation, _)) in told.iter().filter(|(shard, _)| !leaving.contains_key(shard)) {
        if let Some(actor) = handle.links().shard_at(*shard) {
            let _ = actor.cast(ShardMsg::Leaves(*generation, None));
        }
    }
    *told = leaving;
}

/// What the registry has made of this process.
enum Fate {
    GoesOn,
    /// Another process has its name.
    Replaced(String),
    /// It was taken for failed, and nothing needs it as it is: it may join anew.
    Superseded(String),
}

fn fate(cluster: &Cluster, registry: &Registry) -> Fate {
    let me = cluster.member();
    let Some(state) = registry.node(&me.node) else { return Fate::GoesOn };
    if state.incarnation > me.incarnation {
        return Fate::Replaced(format!("another process has registered as node '{}'", me.node));
    }
    let has = |shard| registry.set(shard).is_some_and(|set| set.replicas.contains(me));
    if state.status == NodeStatus::Down && !registry.shards().any(has) {
        return Fate::Superseded(
            "the cluster took this process for failed and went on without it".to_owned(),
        );
    }
    Fate::GoesOn
}

/// Reports the peers that have been silent for too long.
pub(super) async fn report(cluster: Arc<Cluster>, suspect_after: Duration) {
    let mut ticks = tokio::time::interval(REPORT_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let started = Instant::now();
    loop {
        ticks.tick().await;
        let map = cluster.map();
        let now = Instant::now();
        let mut unheard = Vec::new();
        for peer in cluster.transport().peers() {
            let silent = now.saturating_duration_since(peer.last_heard.unwrap_or(started));
            if silent < suspect_after {
                continue;
            }
            // Of one that is down too: it may be heard again, and it matters by whom.
            if let Some(state) = map.node(&peer.node) {
                let ms = Millis(u64::try_from(silent.as_millis()).unwrap_or(u64::MAX));
                unheard.push(Unheard { node: peer.node, incarnation: state.incarnation, silent: ms });
            }
        }
        let me = cluster.member();
        cluster.registry().report(HealthReport {
            from: me.node.clone(),
            from_incarnation: me.incarnation,
            unheard,
            slow: cluster.node().map_or_else(Vec::new, |handle| handle.slow()),
            fitness: cluster.node().map_or(Fitness::WELL, |handle| handle.fitness()),
            ceded: cluster.ceded(),
        });
        cluster.reports.send_modify(|sent| *sent += 1);
    }
}

/// Takes new certificates into use when their files change; while they do not fit each other, the old ones stay.
pub(super) async fn renew(transport: Arc<QuicTransport>, files: TlsPaths) {
    let stamps = |files: &TlsPaths| {
        [&files.ca, &files.certificate, &files.key]
            .map(|path| std::fs::metadata(path).and_then(|file| file.modified()).ok())
    };
    let mut seen = stamps(&files);
    loop {
        tokio::time::sleep(CERTIFICATES_EVERY).await;
        let now = stamps(&files);
        if now == seen {
            continue;
        }
        match transport.reload() {
            Ok(()) => {
                tracing::info!("new certificates are in use");
                seen = now;
            }
            // A renewal replaces one file after the other: the next look finds them whole.
            Err(error) => tracing::warn!(%error, "the certificates have changed and do not fit yet"),
        }
    }
}
