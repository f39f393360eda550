//! Which crate may import which: the table of the design, as data.

use std::path::Path;

use anyhow::{Context, Result};
use cargo_metadata::{DependencyKind, MetadataCommand};

use super::Finding;

/// A workspace crate and the workspace crates that it may import.
const ALLOWED: &[(&str, &[&str])] = &[
    ("keepwarm-types", &[]),
    ("keepwarm-core", &["keepwarm-types"]),
    ("keepwarm-config", &["keepwarm-types"]),
    ("keepwarm-catalog", &["keepwarm-types", "keepwarm-core"]),
    ("keepwarm-memory", &["keepwarm-types"]),
    ("keepwarm-wire", &["keepwarm-types", "keepwarm-core"]),
    ("keepwarm-transport", &["keepwarm-types", "keepwarm-wire"]),
    (
        "keepwarm-registry",
        &["keepwarm-types", "keepwarm-core", "keepwarm-wire", "keepwarm-catalog", "keepwarm-transport"],
    ),
    (
        "keepwarm-node",
        &[
            "keepwarm-types",
            "keepwarm-core",
            "keepwarm-config",
            "keepwarm-catalog",
            "keepwarm-memory",
            "keepwarm-wire",
            "keepwarm-transport",
            "keepwarm-registry",
        ],
    ),
    (
        "keepwarm-engine",
        &["keepwarm-types", "keepwarm-core", "keepwarm-config", "keepwarm-memory", "keepwarm-node"],
    ),
    (
        "keepwarm-api",
        &["keepwarm-types", "keepwarm-core", "keepwarm-config", "keepwarm-node", "keepwarm-engine"],
    ),
    ("keepwarm-client", &["keepwarm-types"]),
    ("softcuda", &[]),
];

/// Libraries that the brain and its vocabulary may use, and no other.
const PURE: &[(&str, &[&str])] = &[
    ("keepwarm-types", &["uuid", "thiserror", "serde", "blake3"]),
    ("keepwarm-core", &["lru", "thiserror", "serde", "uuid"]),
];

/// Libraries that only these crates may use.
const OWNED: &[(&str, &[&str])] = &[
    ("cudarc", &["keepwarm-memory"]),
    ("memmap2", &["keepwarm-memory"]),
    ("quinn", &["keepwarm-transport"]),
    ("rustls", &["keepwarm-transport"]),
    ("x509-parser", &["keepwarm-transport"]),
    ("rcgen", &["keepwarm-transport"]),
    ("redb", &["keepwarm-catalog"]),
    ("openraft", &["keepwarm-registry"]),
    ("axum", &["keepwarm-api"]),
    ("hyper", &["keepwarm-api"]),
    ("utoipa", &["keepwarm-api"]),
    ("ractor", &["keepwarm-node"]),
    ("candle-core", &["keepwarm-engine"]),
    ("reqwest", &["keepwarm-client"]),
];

/// Crates outside `crates/`, and the binary, may import what they need.
const FREE: &[&str] = &["keepwarm", "keepwarm-tests", "keepwarm-test-devices", "keepwarm-benches", "xtask"];

pub(super) fn check(root: &Path) -> Result<Vec<Finding>> {
    let metadata = MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("cargo metadata")?;
    let mut findings = Vec::new();
    for package in &metadata.packages {
        let normal =
            package.dependencies.iter().filter(|dependency| dependency.kind == DependencyKind::Normal);
        let names: Vec<_> = normal.map(|dependency| dependency.name.clone()).collect();
        findings.extend(edges(package.name.as_str(), &names));
    }
    Ok(findings)
}

/// The edges of a crate that the tables do not allow.
fn edges(package: &str, dependencies: &[String]) -> Vec<Finding> {
    if FREE.contains(&package) {
        return Vec::new();
    }
    let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == package) else {
        return vec![Finding::new(package, "is not in the import table of xtask/src/tidy/imports.rs")];
    };
    let refused = |dependency: &&String| {
        let name = dependency.as_str();
        let inner = name.starts_with("keepwarm-") && !allowed.contains(&name);
        let owned = OWNED.iter().any(|(library, owners)| *library == name && !owners.contains(&package));
        let pure = PURE.iter().any(|(pure, libraries)| {
            *pure == package && !name.starts_with("keepwarm-") && !libraries.contains(&name)
        });
        inner || owned || pure
    };
    dependencies
        .iter()
        .filter(refused)
        .map(|name| Finding::new(package, format!("may not import {name}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(package: &str, dependency: &str) -> bool {
        !edges(package, &[dependency.to_owned()]).is_empty()
    }

    #[test]
    fn the_brain_imports_nothing_that_does_io() {
        assert!(refused("keepwarm-core", "tokio") && refused("keepwarm-core", "keepwarm-memory"));
        assert!(!refused("keepwarm-core", "lru"));
    }

    #[test]
    fn each_outside_world_has_one_door() {
        assert!(refused("keepwarm-node", "redb") && !refused("keepwarm-catalog", "redb"));
        assert!(refused("keepwarm-node", "axum") && refused("keepwarm-engine", "cudarc"));
        assert!(refused("keepwarm-unheard-of", "serde"));
    }
}
