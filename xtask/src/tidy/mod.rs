//! What no compiler checks: which crate may import which, and how the code reads.

mod imports;
mod source;
mod tags;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A rule that was broken, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) place: String,
    pub(crate) message: String,
}

impl Finding {
    pub(crate) fn new(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { place: place.into(), message: message.into() }
    }
}

/// A source file, with its path from the root.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Source {
    /// Whether the file is a test as a whole.
    pub(crate) fn is_test(&self) -> bool {
        let path = &self.path;
        path.starts_with("tests/") || path.contains("/tests/") || path.ends_with("/tests.rs")
    }
}

fn sources(root: &Path) -> Result<Vec<Source>> {
    let mut pending: Vec<PathBuf> =
        ["crates", "tests", "benches", "xtask"].iter().map(|folder| root.join(folder)).collect();
    let mut sources = Vec::new();
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            let entries = std::fs::read_dir(&path).with_context(|| path.display().to_string())?;
            for entry in entries {
                let entry = entry?.path();
                if entry.file_name().is_none_or(|name| name != "target") {
                    pending.push(entry);
                }
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let path = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            sources.push(Source { path, text });
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(sources)
}

/// Checks everything; true if nothing was found.
pub(crate) fn run(root: &Path) -> Result<bool> {
    let sources = sources(root)?;
    let guarantees = std::fs::read_to_string(root.join("GUARANTEES.md")).context("GUARANTEES.md")?;
    let mut findings = imports::check(root)?;
    for source in &sources {
        findings.extend(source::check(source));
    }
    findings.extend(tags::check(&sources, &guarantees));
    for finding in &findings {
        println!("{}: {}", finding.place, finding.message);
    }
    println!("tidy: {} files, {} findings", sources.len(), findings.len());
    Ok(findings.is_empty())
}
