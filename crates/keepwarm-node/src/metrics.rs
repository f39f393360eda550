//! The node's metrics, by the names of the API's contract; Prometheus text on demand.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use keepwarm_core::residency::EvictReason;
use keepwarm_types::{Bytes, Source, Tier};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::growth::Growth;
use crate::handle::ScratchInfo;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BySource {
    source: &'static str,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResult {
    result: &'static str,
    reason: &'static str,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByEviction {
    tier: &'static str,
    reason: &'static str,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCode {
    code: String,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByTier {
    tier: String,
    kind: &'static str,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByStream {
    tier: String,
    stream: &'static str,
    kind: &'static str,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTier {
    tier: String,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByState {
    state: &'static str,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByModel {
    model: String,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByContext {
    model: String,
    gpu: u32,
    state: &'static str,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByMove {
    from: String,
    to: String,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPlace {
    r#where: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPeer {
    peer: String,
}
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPeerClass {
    peer: String,
    class: &'static str,
}

type Seconds = Family<BySource, Histogram, fn() -> Histogram>;

/// From 100 us to some 100 s.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.0001, 2.0, 21))
}

/// Every metric of the node.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    restore_seconds: Seconds,
    ttft_seconds: Seconds,
    lookups: Family<ByResult, Counter>,
    prefill_avoided: Counter,
    lag_bytes: Gauge,
    lag_seconds: Gauge<f64, std::sync::atomic::AtomicU64>,
    sessions: Family<ByState, Gauge>,
    tier_bytes: Family<ByTier, Gauge>,
    scratch_bytes: Family<ByStream, Gauge>,
    tier_seconds_to_full: Family<OfTier, Gauge<f64, std::sync::atomic::AtomicU64>>,
    growth: Mutex<HashMap<String, Growth>>,
    evictions: Family<ByEviction, Counter>,
    rejects: Family<ByCode, Counter>,
    leases: Family<ByState, Gauge>,
    contexts: Family<ByContext, Gauge>,
    queue_depth: Family<ByModel, Gauge>,
    batch_size: Family<ByModel, Histogram, fn() -> Histogram>,
    moves: Family<ByMove, Counter>,
    checksum_failures: Family<ByPlace, Counter>,
    under_replicated: Gauge,
    relayed: Counter,
    registry_leader: Gauge,
    peer_rtt_seconds: Family<ByPeer, Gauge<f64, std::sync::atomic::AtomicU64>>,
    peer_bytes: Family<ByPeerClass, Gauge>,
}

fn batch_sizes() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 9))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            restore_seconds: Family::new_with_constructor(seconds),
            ttft_seconds: Family::new_with_constructor(seconds),
            lookups: Family::default(),
            prefill_avoided: Counter::default(),
            lag_bytes: Gauge::default(),
            lag_seconds: Gauge::default(),
            sessions: Family::default(),
            tier_bytes: Family::default(),
            scratch_bytes: Family::default(),
            tier_seconds_to_full: Family::default(),
            growth: Mutex::default(),
            evictions: Family::default(),
            rejects: Family::default(),
            leases: Family::default(),
            contexts: Family::default(),
            queue_depth: Family::default(),
            batch_size: Family::new_with_constructor(batch_sizes),
            moves: Family::default(),
            checksum_failures: Family::default(),
            under_replicated: Gauge::default(),
            relayed: Counter::default(),
            registry_leader: Gauge::default(),
            peer_rtt_seconds: Family::default(),
            peer_bytes: Family::default(),
        };
        let mut registry = Registry::with_prefix("keepwarm");
        let r = &mut registry;
        r.register("restore_seconds", "Time to bring a session into HBM", metrics.restore_seconds.clone());
        r.register("ttft_seconds", "Time to first token", metrics.ttft_seconds.clone());
        r.register("lookups", "Activations by what they found", metrics.lookups.clone());
        r.register(
            "prefill_tokens_avoided",
            "Tokens that were not computed again",
            metrics.prefill_avoided.clone(),
        );
        r.register(
            "checkpoint_lag_bytes",
            "Bytes of ended turns without a pinned copy",
            metrics.lag_bytes.clone(),
        );
        r.register("checkpoint_lag_seconds", "Duration of the last checkpoint", metrics.lag_seconds.clone());
        r.register("sessions", "Sessions by state", metrics.sessions.clone());
        r.register("tier_bytes", "Arena bytes by tier and kind", metrics.tier_bytes.clone());
        r.register(
            "scratch_bytes",
            "Temporary memory of a GPU's streams, beside its arena, by kind",
            metrics.scratch_bytes.clone(),
        );
        r.register(
            "tier_seconds_to_full",
            "Time until a tier is full at its recent growth; 1e9 where it does not grow",
            metrics.tier_seconds_to_full.clone(),
        );
        r.register("evictions", "Sessions evicted by tier and reason", metrics.evictions.clone());
        r.register("rejects", "Requests refused by code", metrics.rejects.clone());
        r.register("leases", "Leases by state", metrics.leases.clone());
        r.register("contexts", "Contexts by model, GPU and state", metrics.contexts.clone());
        r.register("queue_depth", "Requests that wait for a model", metrics.queue_depth.clone());
        r.register("batch_size", "Sequences in a step", metrics.batch_size.clone());
        r.register("moves_bytes", "Bytes moved between tiers", metrics.moves.clone());
        r.register("checksum_failures", "Blocks refused by checksum", metrics.checksum_failures.clone());
        r.register(
            "under_replicated_sessions",
            "Sessions owned here with fewer copies than promised",
            metrics.under_replicated.clone(),
        );
        r.register("relayed", "Requests relayed to their owner", metrics.relayed.clone());
        r.register(
            "registry_leader",
            "1 where this node leads the registry",
            metrics.registry_leader.clone(),
        );
        r.register("peer_rtt_seconds", "Round trip to a peer", metrics.peer_rtt_seconds.clone());
        r.register("peer_bytes_total", "Bytes to and from a peer by class", metrics.peer_bytes.clone());
        metrics.registry = registry;
        metrics
    }
}

impl Metrics {
    /// A request went to its owner.
    pub fn relayed(&self) {
        self.relayed.inc();
    }

    /// What this node knows of copies and leads.
    pub fn set_cluster(&self, under_replicated: i64, leads: bool) {
        self.under_replicated.set(under_replicated);
        self.registry_leader.set(i64::from(leads));
    }

    /// What a peer's link shows.
    pub fn set_peer(&self, peer: &str, rtt: Option<Duration>, bytes: &[(&'static str, u64)]) {
        if let Some(rtt) = rtt {
            self.peer_rtt_seconds.get_or_create(&ByPeer { peer: peer.to_owned() }).set(rtt.as_secs_f64());
        }
        for (class, bytes) in bytes {
            let labels = ByPeerClass { peer: peer.to_owned(), class };
            self.peer_bytes.get_or_create(&labels).set(i64::try_from(*bytes).unwrap_or(i64::MAX));
        }
    }

    /// Everything, as Prometheus (OpenMetrics) text.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            tracing::error!("the metrics could not be written as text");
        }
        text
    }

    /// A session came into HBM.
    pub fn restored(&self, source: Source, took: Duration) {
        self.restore_seconds.get_or_create(&BySource { source: source.word() }).observe(took.as_secs_f64());
    }

    /// Bytes moved between tiers, or (`hbm:0` to `hbm:1`) between GPUs.
    pub fn moved(&self, from: &str, to: &str, bytes: Bytes) {
        self.moves.get_or_create(&ByMove { from: from.to_owned(), to: to.to_owned() }).inc_by(bytes.0);
    }

    /// An answer's first token.
    pub fn ttft(&self, source: Source, took: Duration) {
        self.ttft_seconds.get_or_create(&BySource { source: source.word() }).observe(took.as_secs_f64());
    }

    /// An activation's look-up.
    pub fn lookup(&self, result: &'static str, reason: &'static str) {
        self.lookups.get_or_create(&ByResult { result, reason }).inc();
    }

    /// Tokens that were not computed again.
    pub fn prefill_avoided(&self, tokens: u64) {
        self.prefill_avoided.inc_by(tokens);
    }

    /// A checkpoint began (positive) or ended (negative).
    pub fn checkpoint(&self, bytes: i64) {
        self.lag_bytes.inc_by(bytes);
    }

    /// How long a checkpoint took.
    pub fn checkpoint_took(&self, took: Duration) {
        self.lag_seconds.set(took.as_secs_f64());
    }

    /// Sessions of a state, as counted now.
    pub fn set_sessions(&self, state: &'static str, count: i64) {
        self.sessions.get_or_create(&ByState { state }).set(count);
    }

    /// An arena's figures.
    pub fn set_tier(&self, tier: &str, figures: &crate::handle::ArenaInfo) {
        for (kind, bytes) in
            [("used", figures.used), ("reserved", figures.reserved), ("largest_free", figures.largest_free)]
        {
            let gauge = self.tier_bytes.get_or_create(&ByTier { tier: tier.to_owned(), kind }).clone();
            gauge.set(i64::try_from(bytes.0).unwrap_or(i64::MAX));
        }
        let mut growth = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        let growth = growth.entry(tier.to_owned()).or_default();
        let seconds = growth.seconds_to_full(Instant::now(), figures.used, figures.reserved);
        self.tier_seconds_to_full.get_or_create(&OfTier { tier: tier.to_owned() }).set(seconds);
    }

    /// Figures of a GPU's scratch pools.
    pub fn set_scratch(&self, tier: &str, scratch: &[ScratchInfo]) {
        for pools in scratch {
            for (kind, bytes) in [
                ("reserved", pools.reserved),
                ("reserved_high", pools.reserved_high),
                ("used", pools.used),
                ("used_high", pools.used_high),
            ] {
                let labels = ByStream { tier: tier.to_owned(), stream: pools.stream, kind };
                self.scratch_bytes.get_or_create(&labels).set(i64::try_from(bytes.0).unwrap_or(i64::MAX));
            }
        }
    }

    /// Leases running.
    pub fn set_leases(&self, count: i64) {
        self.leases.get_or_create(&ByState { state: "running" }).set(count);
    }

    /// A session left a tier.
    pub fn evicted(&self, tier: Tier, why: EvictReason) {
        self.evictions.get_or_create(&ByEviction { tier: tier.word(), reason: why.word() }).inc();
    }

    /// A request was refused.
    pub fn reject(&self, code: &str) {
        self.rejects.get_or_create(&ByCode { code: code.to_owned() }).inc();
    }

    /// Contexts of a model on a GPU.
    pub fn set_contexts(&self, model: &str, gpu: u16, state: &'static str, count: i64) {
        self.contexts
            .get_or_create(&ByContext { model: model.to_owned(), gpu: gpu.into(), state })
            .set(count);
    }

    /// Requests that wait for a model.
    pub fn set_queue_depth(&self, model: &str, depth: i64) {
        self.queue_depth.get_or_create(&ByModel { model: model.to_owned() }).set(depth);
    }

    /// Sequences in a step.
    pub fn batch(&self, model: &str, sequences: usize) {
        self.batch_size.get_or_create(&ByModel { model: model.to_owned() }).observe(sequences as f64);
    }

    /// A block did not have its checksum.
    pub fn checksum_failed(&self, at: &'static str) {
        self.checksum_failures.get_or_create(&ByPlace { r#where: at }).inc();
    }
}

#[cfg(test)]
mod tests {
    use keepwarm_memory::ScratchFigures;

    use super::*;

    /// What API.md promises of every node.
    const CONTRACT: [&str; 18] = [
        "restore_seconds_count{source=\"pinned\"}",
        "ttft_seconds_count{source=\"hbm\"}",
        "lookups_total{result=\"hit\",reason=\"resident\"}",
        "prefill_tokens_avoided_total",
        "checkpoint_lag_bytes",
        "checkpoint_lag_seconds",
        "sessions{state=\"warm\"}",
        "tier_bytes{tier=\"pinned\",kind=\"largest_free\"}",
        "tier_seconds_to_full{tier=\"pinned\"}",
        "scratch_bytes{tier=\"hbm:0\",stream=\"links\",kind=\"used_high\"} 9",
        "evictions_total{tier=\"pinned\",reason=",
        "rejects_total{code=\"leased\"} 1",
        "leases{state=\"running\"}",
        "contexts{model=\"m\",gpu=\"0\",state=\"busy\"}",
        "queue_depth{model=\"m\"}",
        "batch_size_count{model=\"m\"}",
        "moves_bytes_total{from=\"pinned\",to=\"hbm\"} 10",
        "checksum_failures_total{where=\"read\"} 1",
    ];

    #[test]
    fn the_contracts_names_are_there() {
        let metrics = Metrics::default();
        let arena = crate::handle::ArenaInfo {
            reserved: Bytes(100),
            used: Bytes(10),
            largest_free: Bytes(90),
            fragmentation: 0.0,
        };
        metrics.restored(Source::Pinned, Duration::from_millis(3));
        metrics.moved("pinned", "hbm", Bytes(10));
        metrics.ttft(Source::Hbm, Duration::from_millis(3));
        metrics.lookup("hit", "resident");
        metrics.set_sessions("warm", 1);
        metrics.set_tier("pinned", &arena);
        let pool = |bytes| ScratchFigures { used_high: Bytes(bytes), ..ScratchFigures::default() };
        metrics.set_scratch("hbm:0", &[ScratchInfo::sum("links", &[pool(4), pool(5)])]);
        metrics.evicted(Tier::Pinned, EvictReason::Room);
        metrics.reject("leased");
        metrics.set_leases(1);
        metrics.set_contexts("m", 0, "busy", 1);
        metrics.set_queue_depth("m", 1);
        metrics.batch("m", 1);
        metrics.checksum_failed("read");
        let text = metrics.encode();
        for name in CONTRACT {
            let line = format!("\nkeepwarm_{name}");
            assert!(text.contains(&line), "{name} is not in:\n{text}");
        }
    }
}
