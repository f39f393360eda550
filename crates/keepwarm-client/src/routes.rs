//! Where a call goes: the shard map as a node told it, and who is asked when a node does not answer. Owns the map.
//!
//! Any node answers for any session; one that does not own it asks the owner and says so (`Keepwarm-Relayed-By`). A client
//! that knows the owner saves that way, and has somewhere to go when the node that it was made for is down. The map is
//! asked for after the first answer about a session, and again when an answer shows that it is out of date.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Url;
use uuid::Uuid;

use crate::cluster::{ShardMap, shard_of};

/// Time between two askings for the map: a node that took a shard over is in the next one.
const MAP_PAUSE: Duration = Duration::from_millis(250);
/// Nodes of a map that are kept: more than any cluster that the registry was measured with.
const NODES_MAX: usize = 4096;

/// The map, in addresses.
#[derive(Debug, Default)]
struct Map {
    /// Each shard's replicas, the owner first, by their places in `nodes`.
    replicas: Vec<Vec<usize>>,
    nodes: Vec<Url>,
}

#[derive(Debug, Default)]
struct Known {
    map: Arc<Map>,
    /// An answer, or none, showed that the map is not how things are.
    stale: bool,
    asked: Option<Instant>,
}

/// The ways to a cluster.
#[derive(Debug)]
pub(crate) struct Routes {
    /// The node that the client was made for, and others that were named beside it.
    seeds: Vec<Url>,
    /// Whether the map is used; else all goes to the seeds.
    straight: bool,
    known: Mutex<Known>,
}

impl Routes {
    /// `seeds` has at least one.
    pub(crate) fn new(seeds: Vec<Url>, straight: bool) -> Self {
        Self { seeds, straight, known: Mutex::default() }
    }

    /// The node that the client was made for.
    pub(crate) fn base(&self) -> &Url {
        &self.seeds[0]
    }

    /// Whom to ask, the best first: the session's owner, its other replicas, the seeds, then any node.
    pub(crate) fn candidates(&self, session: Option<Uuid>) -> Vec<Url> {
        let map = Arc::clone(&self.lock().map);
        let shard = session.and_then(|id| shard_of(map.replicas.len(), id));
        let replicas = shard.and_then(|shard| map.replicas.get(shard.0 as usize)).into_iter().flatten();
        let replicas = replicas.filter_map(|node| map.nodes.get(*node));
        let mut candidates: Vec<Url> = Vec::new();
        for url in replicas.chain(&self.seeds).chain(&map.nodes) {
            if !candidates.contains(url) {
                candidates.push(url.clone());
            }
        }
        candidates
    }

    /// An answer about a session came, by way of a node that is not the owner or from the owner itself.
    pub(crate) fn answered(&self, relayed: bool) {
        let mut known = self.lock();
        known.stale |= relayed || known.asked.is_none();
    }

    /// A node did not serve. Where nothing is known of others, there is nothing to doubt.
    pub(crate) fn failed(&self) {
        let mut known = self.lock();
        known.stale |= !known.map.nodes.is_empty();
    }

    /// Whether to ask for the map now; who is told so does it, the others go on with what is known.
    pub(crate) fn is_due(&self) -> bool {
        let mut known = self.lock();
        let now = Instant::now();
        let due = self.straight
            && known.stale
            && known.asked.is_none_or(|asked| now.duration_since(asked) >= MAP_PAUSE);
        if due {
            known.asked = Some(now);
        }
        due
    }

    /// The map that a node gave. A node whose address no other machine could use is left out of it.
    pub(crate) fn learn(&self, told: &ShardMap) {
        let mut nodes = Vec::new();
        let mut places = BTreeMap::new();
        for (name, http) in told.nodes.iter().take(NODES_MAX) {
            if let Some(url) = address(http) {
                places.insert(name.as_str(), nodes.len());
                nodes.push(url);
            }
        }
        let mut replicas = vec![Vec::new(); told.shards.len()];
        for shard in &told.shards {
            let known = shard.replicas.iter().filter_map(|name| places.get(name.as_str()).copied());
            if let Some(place) = replicas.get_mut(shard.shard as usize) {
                *place = known.collect();
            }
        }
        let mut known = self.lock();
        known.map = Arc::new(Map { replicas, nodes });
        known.stale = false;
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The URL of a node's `http`; none of one that listens everywhere, which says nothing about where it is.
fn address(http: &str) -> Option<Url> {
    let url: Url = format!("http://{http}").parse().ok()?;
    let host = url.host_str()?.trim_matches(['[', ']']);
    let everywhere = host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_unspecified());
    (!everywhere && url.port_or_known_default() != Some(0)).then_some(url)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Shard;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    fn shard(shard: u32, replicas: &[&str]) -> Shard {
        let replicas = replicas.iter().map(|name| (*name).to_owned()).collect();
        Shard { shard, generation: 1, replicas, learner: None, sessions: None }
    }

    fn told(nodes: &[(&str, &str)], shards: Vec<Shard>) -> ShardMap {
        let nodes = nodes.iter().map(|(name, http)| ((*name).to_owned(), (*http).to_owned())).collect();
        ShardMap { shards, nodes }
    }

    /// Ids whose last 16 bits lie in the first and in the second half.
    const LOW: Uuid = Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001);
    const HIGH: Uuid = Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_8001);

    #[test]
    fn the_owner_is_asked_first_then_its_replicas_then_whoever_is_there() {
        let routes = Routes::new(vec![url("http://seed:1")], true);
        assert_eq!(routes.candidates(Some(LOW)), [url("http://seed:1")]);
        routes.learn(&told(
            &[("a", "10.0.0.1:7000"), ("b", "10.0.0.2:7000"), ("c", "10.0.0.3:7000")],
            vec![shard(0, &["b", "a"]), shard(1, &["c", "b"])],
        ));
        let [a, b, c] = [1, 2, 3].map(|n| url(&format!("http://10.0.0.{n}:7000")));
        let seed = url("http://seed:1");
        assert_eq!(routes.candidates(Some(LOW)), [b.clone(), a.clone(), seed.clone(), c.clone()]);
        assert_eq!(routes.candidates(Some(HIGH)), [c.clone(), b.clone(), seed.clone(), a.clone()]);
        assert_eq!(routes.candidates(None), [seed, a, b, c]);
    }

    #[test]
    fn a_map_is_asked_for_when_it_is_doubted_and_not_at_once_again() {
        let routes = Routes::new(vec![url("http://seed:1")], true);
        routes.failed();
        assert!(!routes.is_due(), "a node alone failed");
        routes.answered(false);
        assert!(routes.is_due(), "the first answer came");
        routes.answered(true);
        assert!(!routes.is_due(), "another call asks at the same time");
        routes.learn(&told(&[("a", "10.0.0.1:7000")], vec![shard(0, &["a"])]));
        routes.lock().asked = None;
        assert!(!routes.is_due(), "the map is known");
        for doubt in [|routes: &Routes| routes.answered(true), Routes::failed] {
            doubt(&routes);
            assert!(routes.is_due());
            routes.learn(&told(&[("a", "10.0.0.1:7000")], vec![shard(0, &["a"])]));
            routes.lock().asked = None;
        }
        let fixed = Routes::new(vec![url("http://seed:1")], false);
        fixed.answered(true);
        assert!(!fixed.is_due());
    }

    #[test]
    fn addresses_that_lead_nowhere_are_left_out() {
        for nowhere in ["0.0.0.0:7000", "[::]:7000", "127.0.0.1:0", "", "a b:1"] {
            assert_eq!(address(nowhere), None, "{nowhere}");
        }
        assert_eq!(address("[::1]:7000"), Some(url("http://[::1]:7000")));
        let routes = Routes::new(vec![url("http://seed:1")], true);
        // Neither an unknown name nor shards that are no power of two, or out of range, break anything.
        routes.learn(&told(
            &[("a", "0.0.0.0:1")],
            vec![shard(0, &["a", "z"]), shard(7, &["a"]), shard(1, &[])],
        ));
        assert_eq!(routes.candidates(Some(LOW)), [url("http://seed:1")]);
    }
}
