//! Groups of nodes that hold shards together.
//!
//! Sets drawn at random over thousands of shards make the loss of any few nodes the loss of some shard. Drawn
//! from few groups, most losses of a few nodes cost nothing (Cidon et al., "Copysets", USENIX ATC 2013).

use std::collections::BTreeMap;

/// Times that the nodes are dealt into groups: each node shares groups with this many times `size - 1` others,
/// among whom its shards spread when it fails.
const DEALS: usize = 3;

/// Groups of `size` of the `nodes` (each a node and its zone), members of a group in different zones where there are
/// enough; all nodes as one group where there are no more than `size`. The same nodes give the same groups.
#[must_use]
pub fn copysets<N: Copy + Ord>(nodes: &[(N, &str)], size: usize) -> Vec<Vec<N>> {
    if nodes.is_empty() || size == 0 {
        return Vec::new();
    }
    if nodes.len() <= size {
        let mut all: Vec<N> = nodes.iter().map(|(node, _)| *node).collect();
        all.sort_unstable();
        return vec![all];
    }
    let mut zones: BTreeMap<&str, Vec<N>> = BTreeMap::new();
    for (node, zone) in nodes {
        zones.entry(zone).or_default().push(*node);
    }
    for members in zones.values_mut() {
        members.sort_unstable();
    }
    let mut groups = Vec::new();
    for deal in 0..DEALS {
        let row = dealt(&zones, deal);
        for start in (0..row.len()).step_by(size) {
            // The last group of a row that does not divide takes its missing members from the row's beginning.
            let mut group: Vec<N> = (start..start + size).map(|at| row[at % row.len()]).collect();
            group.sort_unstable();
            if !groups.contains(&group) {
                groups.push(group);
            }
        }
    }
    groups
}

/// All nodes in a row, neighbours from different zones, each zone turned further with each deal.
fn dealt<N: Copy>(zones: &BTreeMap<&str, Vec<N>>, deal: usize) -> Vec<N> {
    let longest = zones.values().map(Vec::len).max().unwrap_or(0);
    let mut row = Vec::new();
    for round in 0..longest {
        for (place, members) in zones.values().enumerate() {
            if round < members.len() {
                let stride = deal * (place + 1) + deal;
                row.push(members[(round + stride) % members.len()]);
            }
        }
    }
    if zones.len() == 1 && deal > 0 {
        // One zone: interleave instead, or every deal would give neighbours again.
        let step = deal + 1;
        let n = row.len();
        row = (0..step)
            .flat_map(|first| (first..n).step_by(step).map(|at| row[at]).collect::<Vec<_>>())
            .collect();
    }
    row
}
