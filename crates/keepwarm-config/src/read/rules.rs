//! What only the whole file can say: names and addresses that clash, votes, copies, and what lies beyond loopback.
//!
//! Each rule notes its error at the line that a reader would change. Rules that count nodes say nothing while
//! one of them cannot be read: its own error comes first.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::Placed;
use crate::config::{ModelConfig, NodeConfig, TenantConfig, TlsConfig};
use crate::section::Section;

/// Nodes of a cluster.
const NODES_MAX: usize = 4096;
/// Most nodes that vote: a commit waits for a majority, and more than two that may fail at once are not planned for.
const VOTERS_MAX: usize = 5;

type Nodes<'a, 't> = Placed<'a, 't, NodeConfig>;

/// No two of a kind have the same name, and no two nodes the same address.
pub(super) fn unique(
    root: &Section<'_, '_>,
    nodes: &Nodes<'_, '_>,
    tenants: &Placed<'_, '_, TenantConfig>,
    models: &Placed<'_, '_, ModelConfig>,
) {
    if nodes.items.len() > NODES_MAX {
        root.bad("node", format!("{} nodes are more than {NODES_MAX}", nodes.items.len()));
    }
    once("name", nodes, |node| Some(node.name.to_string()));
    once("name", tenants, |tenant| Some(tenant.name.to_string()));
    once("name", models, |model| Some(model.name.clone()));
    // HTTP is TCP and peers are UDP, so one may have the port of the other. Port 0 picks a free one.
    once("http", nodes, |node| (!has_port_0(&node.http)).then(|| canonical(&node.http)));
    once("peer", nodes, |node| node.peer.as_deref().map(canonical));
}

fn once<T>(key: &str, placed: &Placed<'_, '_, T>, value: impl Fn(&T) -> Option<String>) {
    let mut seen: HashMap<String, String> = HashMap::new();
    for (section, item) in &placed.items {
        let Some(value) = value(item) else { continue };
        match seen.get(&value) {
            Some(first) => section.bad(key, format!("'{value}' is already {first}")),
            None => drop(seen.insert(value, section.path(key))),
        }
    }
}

fn canonical(address: &str) -> String {
    address.parse::<SocketAddr>().map_or_else(|_| address.to_lowercase(), |address| address.to_string())
}

fn has_port_0(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(_, port)| port.parse() == Ok(0u16))
}

/// Beyond loopback, clients need credentials and peers need certificates.
pub(super) fn loopback(nodes: &Nodes<'_, '_>, no_tenants: bool, no_tls: bool) {
    for (section, node) in &nodes.items {
        if no_tenants && !is_loopback(&node.http) {
            let reason = format!(
                "'{}' is not a loopback address: name at least one [[tenant]] to serve it",
                node.http
            );
            section.bad("http", reason);
        }
        if let Some(peer) = node.peer.as_deref().filter(|peer| no_tls && !is_loopback(peer)) {
            let reason = format!(
                "'{peer}' is not a loopback address: peers beyond it need certificates; make them with \
                 `keepwarm cert ca` and `keepwarm cert node`, and name them under [tls] as ca and dir"
            );
            section.bad("peer", reason);
        }
    }
}

fn is_loopback(address: &str) -> bool {
    if let Ok(address) = address.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Several nodes reach each other, and an odd number of them decides.
pub(super) fn voters(root: &Section<'_, '_>, nodes: &Nodes<'_, '_>) {
    if !nodes.is_whole() || nodes.items.len() < 2 {
        return;
    }
    for (section, node) in &nodes.items {
        match &node.peer {
            None if !section.has("peer") => {
                section.bad("peer", "is missing: with several nodes, each needs an address for its peers");
            }
            Some(peer) if has_port_0(peer) => {
                section.bad("peer", format!("'{peer}' has port 0: peers need a fixed port to find it"));
            }
            _ => {}
        }
    }
    let voters: Vec<_> = nodes.items.iter().filter(|(_, node)| node.voter).collect();
    let count = voters.len();
    let reason = match count {
        0 => {
            let reason = format!(
                "none of the {} nodes votes, so nothing could be decided: set voter = true on three of them \
                 (on one where there are two)",
                nodes.items.len()
            );
            return root.bad("node", reason);
        }
        count if count > VOTERS_MAX => format!(
            "{count} nodes vote, at most {VOTERS_MAX} may: set voter = false on {}",
            count - VOTERS_MAX
        ),
        count if count.is_multiple_of(2) => format!(
            "{count} nodes vote: an even number survives no more failures than {} do; set voter = false on \
             one, or let one more vote",
            count - 1
        ),
        _ => return,
    };
    if let Some((section, _)) = voters.last() {
        section.bad("voter", reason);
    }
}

/// There are as many nodes that store as there are to be copies.
pub(super) fn copies(root: &Section<'_, '_>, cluster: &Section<'_, '_>, nodes: &Nodes<'_, '_>, copies: u64) {
    let storing = nodes.items.iter().filter(|(_, node)| node.stores()).count();
    if !nodes.is_whole() {
        return;
    }
    if storing == 0 {
        root.bad("node", "all nodes only vote and none stores: give one at least 1MiB of pinned memory");
    } else if copies > storing as u64 {
        let reason = format!("{copies} copies need as many nodes that store; the file has {storing}");
        cluster.bad("replication", reason);
    }
}

/// No node's certificate would lie where the authority's does.
pub(super) fn certificates(nodes: &Nodes<'_, '_>, tls: Option<&TlsConfig>) {
    let Some(tls) = tls else { return };
    for (section, node) in &nodes.items {
        if tls.dir.join(format!("{}.pem", node.name)) == tls.ca {
            let reason = format!(
                "'{}' cannot be a node's name here: its certificate would be {}, which is the authority's",
                node.name,
                tls.ca.display()
            );
            section.bad("name", reason);
        }
    }
}

#[cfg(test)]
mod tests;
