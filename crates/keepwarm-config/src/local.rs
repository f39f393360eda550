//! The `cluster.toml` of a cluster on one machine, as `keepwarm init` writes it: text that [`Config::parse`] takes.
//!
//! It is a start to edit, so it carries comments; nodes differ in name, ports and data folder alone.
//!
//! [`Config::parse`]: crate::Config::parse

use std::fmt::Write;

use keepwarm_types::{Bytes, ShardCount, valid_name};

use crate::config::DeviceKind;

/// Most nodes: HTTP has the ports up to base + 100, peers those above.
const NODES_MAX: u16 = 100;
/// Where the peers' ports begin, above the base.
const PEERS_ABOVE: u16 = 100;
/// Most nodes that vote.
const VOTERS_MAX: u16 = 5;

/// Memory of a node's GPU where nothing else is asked for.
const HBM: Bytes = Bytes(256 << 20);
/// Pinned memory of a node where nothing else is asked for.
const PINNED: Bytes = Bytes(512 << 20);

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalCluster {
    /// Its name.
    pub name: String,
    /// How many nodes: n1, n2, ...
    pub nodes: u16,
    /// HTTP is at this port + 1, + 2, ...; peers at + 101, + 102, ...
    pub port_base: u16,
    /// Copies of each session's bytes; where absent two, or one where there is one node.
    pub replication: Option<u32>,
    /// Number of shards.
    pub shards: ShardCount,
    /// A model that all nodes serve: its name and its source.
    pub model: Option<(String, String)>,
    /// The first nodes' GPUs, one each; the others have host memory in a GPU's place.
    pub devices: Vec<DeviceKind>,
    /// Memory of each node's GPU.
    pub hbm: Bytes,
    /// Pinned memory of each node: its own sessions' and its peers' copies.
    pub pinned: Bytes,
}

/// Why there can be no such cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocalError {
    /// The name is none.
    #[error("cluster '{0}': is not a name: 1 to 64 letters, digits, '.', '_' or '-'")]
    Name(String),
    /// Too few or too many nodes.
    #[error("{0} nodes: must be 1 to {NODES_MAX} on one machine")]
    Nodes(u16),
    /// The ports would go beyond the last.
    #[error("port base {base}: {nodes} nodes need the ports up to {base} + {above}, the last port is 65535", above = PEERS_ABOVE + nodes)]
    Ports {
        /// The base.
        base: u16,
        /// The nodes.
        nodes: u16,
    },
    /// More copies than nodes.
    #[error("replication {copies}: {copies} copies need as many nodes; there are {nodes}")]
    Copies {
        /// The copies.
        copies: u32,
        /// The nodes.
        nodes: u16,
    },
}

impl LocalCluster {
    /// A cluster of that size, and all else as a demonstration wants it.
    #[must_use]
    pub fn new(name: &str, nodes: u16, port_base: u16, shards: ShardCount) -> Self {
        Self {
            name: name.to_owned(),
            nodes,
            port_base,
            replication: None,
            shards,
            model: None,
            devices: Vec::new(),
            hbm: HBM,
            pinned: PINNED,
        }
    }

    /// The nodes that vote, from the first on: all up to five, and an odd number of them.
    #[must_use]
    pub fn voters(&self) -> u16 {
        let most = self.nodes.min(VOTERS_MAX);
        if most.is_multiple_of(2) { most.saturating_sub(1) } else { most }
    }

    /// The file's text.
    ///
    /// # Errors
    /// [`LocalError`].
    pub fn render(&self) -> Result<String, LocalError> {
        let nodes = self.nodes;
        if !valid_name(&self.name) {
            return Err(LocalError::Name(self.name.clone()));
        }
        if nodes == 0 || nodes > NODES_MAX {
            return Err(LocalError::Nodes(nodes));
        }
        if self.port_base.checked_add(PEERS_ABOVE + nodes).is_none() {
            return Err(LocalError::Ports { base: self.port_base, nodes });
        }
        let copies = self.replication.unwrap_or(if nodes > 1 { 2 } else { 1 });
        if copies == 0 || copies > u32::from(nodes) {
            return Err(LocalError::Copies { copies, nodes });
        }
        let mut text = self.head(copies);
        for number in 1..=nodes {
            text.push_str(&self.node(number));
        }
        text.push_str(&self.tail());
        Ok(text)
    }

    fn head(&self, copies: u32) -> String {
        let Self { name, nodes, shards, .. } = self;
        let plural = if *nodes == 1 { "" } else { "s" };
        format!(
            r#"# Cluster {name}: {nodes} node{plural} on one machine. The same file serves every node; relative paths start at its folder.
#   keepwarm check cluster.toml
#   keepwarm serve --config cluster.toml --node n1

version = 1                # raise it with each change

[cluster]
name = "{name}"
replication = {copies}            # copies of each session's bytes, each on a node of its own
shards = {shards}                # a power of two, fixed for the cluster's life
degraded_writes = "allow"  # allow | refuse: when fewer than `replication` nodes can hold
sync = "always"            # always (group commit before each answer) | interval (a power cut may take the last moments)
# suspect_after_ms = 400   # silence of a node before it is suspected, and its shards taken over
# give_up_after_s = 3600   # absence of a shard's last copy before it counts as gone; left out, an operator decides
# write_deadline_ms = 5000 # a write's wait for its copies before its outcome counts as unknown

[tls]                      # who may be a node: `keepwarm cert show --dir certs`
ca = "certs/ca.pem"
dir = "certs"              # NODE.pem and NODE.key

"#,
            shards = shards.get()
        )
    }

    fn node(&self, number: u16) -> String {
        let (http, peer) = (self.port_base + number, self.port_base + PEERS_ABOVE + number);
        let voter = number <= self.voters();
        let mut text = format!("[[node]]\nname = \"n{number}\"\n");
        let first = number == 1;
        let mut line = |key: &str, value: &str, comment: &str| {
            let setting = format!("{key} = {value}");
            // Comments stand at the first node only, in one column.
            let _ =
                if first { writeln!(text, "{setting:<26} # {comment}") } else { writeln!(text, "{setting}") };
        };
        line("http", &format!("\"127.0.0.1:{http}\""), "beyond loopback, name at least one [[tenant]]");
        line("peer", &format!("\"127.0.0.1:{peer}\""), "where the other nodes reach it (UDP)");
        line(
            "pinned",
            &format!("\"{}\"", self.pinned),
            "host memory for its sessions and for others' copies",
        );
        line("data_dir", &format!("\"data/n{number}\""), "the catalog: manifests and transcripts");
        line("voter", &voter.to_string(), "one, three or five nodes vote on who owns what");
        let _ = writeln!(text, "\n[[node.gpu]]");
        let device = self.devices.get(usize::from(number) - 1).unwrap_or(&DeviceKind::Host);
        let _ = writeln!(text, "device = \"{device}\"\nmemory = \"{}\"\n", self.hbm);
        text
    }

    fn tail(&self) -> String {
        let model = match &self.model {
            Some((name, source)) => format!(
                "[[model]]                  # served by every node through /v1/chat/completions\nname = {}\n\
                 engine = \"builtin\"\nsource = {}\n\n",
                quoted(name),
                quoted(source)
            ),
            None => "# [[model]]                # served by every node through /v1/chat/completions\n\
                     # name = \"smollm2-135m-instruct\"\n# engine = \"builtin\"\n\
                     # source = \"gguf:models/SmolLM2-135M-Instruct.Q4_1.gguf\"\n\n"
                .to_owned(),
        };
        format!(
            "{model}# [[tenant]]               # who may ask; without any, loopback serves the tenant `default`\n\
             # name = \"acme\"\n# token_sha256 = \"...\"     # printf %s TOKEN | sha256sum\n\n\
             [tiers]                    # watermarks: above `high`, evict down to `low`\n\
             hbm = {{ low = 0.80, high = 0.92 }}\npinned = {{ low = 0.80, high = 0.92 }}\n"
        )
    }
}

/// A string as TOML writes it.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    fn cluster(nodes: u16) -> LocalCluster {
        LocalCluster::new("local", nodes, 7000, ShardCount::new(64).unwrap())
    }

    #[test]
    fn every_size_makes_a_valid_file_with_an_odd_number_of_voters() {
        for (nodes, voters) in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (7, 5), (100, 5)] {
            let text = cluster(nodes).render().unwrap();
            let config = Config::parse("cluster.toml", &text).unwrap();
            assert_eq!((config.nodes.len(), config.voters().count()), (usize::from(nodes), voters));
            assert_eq!(config.replication, if nodes == 1 { 1 } else { 2 });
            assert!(config.voters().zip(&config.nodes).all(|(voter, node)| voter.name == node.name));
            let only_two = config.warnings().iter().any(|warning| warning.contains("two nodes"));
            assert_eq!(only_two, nodes == 2);
        }
    }

    #[test]
    fn nodes_have_their_own_ports_memory_and_folders() {
        let config = Config::parse("/x/cluster.toml", &cluster(3).render().unwrap()).unwrap();
        let node = &config.nodes[2];
        assert_eq!((node.name.as_str(), node.http.as_str()), ("n3", "127.0.0.1:7003"));
        assert_eq!(node.peer.as_deref(), Some("127.0.0.1:7103"));
        assert_eq!(node.data_dir.as_deref(), Some(std::path::Path::new("/x/data/n3")));
        assert_eq!((node.pinned, node.gpus[0].memory), (PINNED, HBM));
        assert_eq!(config.tls.unwrap().ca, std::path::Path::new("/x/certs/ca.pem"));
        assert_eq!(config.shards.get(), 64);
    }

    #[test]
    fn the_first_nodes_have_the_devices_that_were_named() {
        let mut cluster = cluster(3);
        cluster.devices = vec![DeviceKind::Cuda(1), DeviceKind::Mig("MIG-1".to_owned())];
        cluster.hbm = Bytes(5 << 20);
        let config = Config::parse("cluster.toml", &cluster.render().unwrap()).unwrap();
        let devices: Vec<_> = config.nodes.iter().map(|node| node.gpus[0].device.clone()).collect();
        assert_eq!(devices, [DeviceKind::Cuda(1), DeviceKind::Mig("MIG-1".to_owned()), DeviceKind::Host]);
        assert!(config.nodes.iter().all(|node| node.gpus[0].memory == Bytes(5 << 20)));
    }

    #[test]
    fn a_model_may_have_any_path() {
        let mut cluster = cluster(1);
        let source = "gguf:/models/\"odd\" \\ name\u{7f}.gguf".to_owned();
        cluster.model = Some(("m".to_owned(), source.clone()));
        let config = Config::parse("cluster.toml", &cluster.render().unwrap()).unwrap();
        assert_eq!(config.models[0].source, source);
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_limit() {
        let refused = |change: fn(&mut LocalCluster)| {
            let mut cluster = cluster(3);
            change(&mut cluster);
            cluster.render().unwrap_err().to_string()
        };
        assert!(refused(|cluster| cluster.nodes = 0).contains("1 to 100"));
        assert!(refused(|cluster| cluster.nodes = 101).contains("1 to 100"));
        assert!(refused(|cluster| cluster.port_base = 65_433).contains("65433 + 103"));
        assert!(refused(|cluster| cluster.replication = Some(4)).contains("there are 3"));
        assert!(refused(|cluster| cluster.name = "a/b".to_owned()).contains("'a/b'"));
    }
}
