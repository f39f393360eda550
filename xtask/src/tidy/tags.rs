//! Guarantee tags: `//= GUARANTEES.md#G2` stands where a promise is kept and where it is tested.

use std::collections::{BTreeMap, BTreeSet};

use super::{Finding, Source};

const TAG: &str = "//= GUARANTEES.md#";
/// A heading's mark for a promise that is not kept yet.
const LATER: &str = "(not yet in force)";

/// Every tag names a guarantee; every guarantee in force is tagged in code and in a test.
pub(super) fn check(sources: &[Source], guarantees: &str) -> Vec<Finding> {
    let headings: BTreeMap<&str, bool> = guarantees
        .lines()
        .filter_map(|line| line.strip_prefix("## "))
        .filter_map(|heading| heading.split([' ', ':']).next().map(|id| (id, !heading.contains(LATER))))
        .filter(|(id, _)| id.starts_with('G') && id[1..].chars().all(|c| c.is_ascii_digit()) && id.len() > 1)
        .collect();
    let (mut kept, mut tested) = (BTreeSet::new(), BTreeSet::new());
    let mut findings = Vec::new();
    for source in sources.iter().filter(|source| !source.path.starts_with("xtask/")) {
        let tests_from = source.text.find("#[cfg(test)]").unwrap_or(source.text.len());
        for (at, _) in source.text.match_indices(TAG) {
            let id: String =
                source.text[at + TAG.len()..].chars().take_while(char::is_ascii_alphanumeric).collect();
            if !headings.contains_key(id.as_str()) {
                findings.push(Finding::new(&source.path, format!("{id} is no heading of GUARANTEES.md")));
            }
            if source.is_test() || at > tests_from {
                tested.insert(id)
            } else {
                kept.insert(id)
            };
        }
    }
    for (id, in_force) in headings {
        for (set, what) in [(&kept, "where it is kept"), (&tested, "where it is tested")] {
            if in_force && !set.contains(id) {
                findings.push(Finding::new("GUARANTEES.md", format!("{id} has no tag {what}: {TAG}{id}")));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn a_promise_needs_its_keeper_and_its_test() {
        let text = "## G1: kept\n## G2: later (not yet in force)\n";
        let keeper = source("crates/a/src/b.rs", &format!("{TAG}G1\nfn f() {{}}\n"));
        let test = source("crates/a/tests/b.rs", &format!("{TAG}G1\n"));
        assert!(check(&[keeper.clone(), test.clone()], text).is_empty());
        assert_eq!(check(&[keeper], text).len(), 1);
        assert_eq!(check(&[test], text).len(), 1);
        assert_eq!(check(&[], text).len(), 2);
        assert_eq!(check(&[source("crates/a/src/b.rs", &format!("{TAG}G9\n"))], "").len(), 1);
    }
}
