//! The bootstrap file: the one thing that may start a cluster, once.
//!
//! `keepwarm init` writes it beside `cluster.toml`. A node that finds it, votes, and has an empty disk may begin
//! the registry with the voters that it names; a node without it waits to be let in. So a cluster that lost all its
//! disks never silently begins again under its old name.

use std::fmt::Write;
use std::path::Path;

use keepwarm_types::NodeName;
use toml::de::DeTable;
use uuid::Uuid;

use crate::config::Config;
use crate::error::{ConfigErrors, LoadError};
use crate::section::{Notes, Section};

/// A cluster's beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    /// The cluster's name, as in `cluster.toml`.
    pub cluster: String,
    /// The cluster's identity: two clusters of one name differ in it.
    pub id: Uuid,
    /// The nodes that vote first.
    pub voters: Vec<NodeName>,
}

impl Bootstrap {
    /// The file's name, beside `cluster.toml`.
    pub const FILE: &str = "bootstrap";

    /// The beginning of the cluster that `config` describes, under a new identity.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let voters = config.voters().map(|node| node.name.clone()).collect();
        Self { cluster: config.name.clone(), id: Uuid::new_v4(), voters }
    }

    /// The bootstrap file beside the configuration's; `None` where there is none, or but one node.
    ///
    /// # Errors
    /// [`LoadError`] where it is there but cannot be read, or is wrong, or is another cluster's.
    pub fn of(config: &Config) -> Result<Option<Self>, LoadError> {
        let path = config.path_of(Self::FILE);
        if !config.is_cluster() || !path.exists() {
            return Ok(None);
        }
        let bootstrap = Self::read(&path)?;
        if bootstrap.cluster != config.name {
            return Err(LoadError::Foreign { path, has: bootstrap.cluster, wanted: config.name.clone() });
        }
        Ok(Some(bootstrap))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let text =
            std::fs::read_to_string(path).map_err(|cause| LoadError::Io { path: path.to_owned(), cause })?;
        Ok(Self::parse(&path.display().to_string(), &text)?)
    }

    /// Reads a file's text; `file` is how errors name it.
    ///
    /// # Errors
    /// [`ConfigErrors`] with everything that is wrong, in the file's order.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigErrors> {
        let notes = Notes::new(text);
        let read = match DeTable::parse(text) {
            Ok(table) => read(&Section::root(&notes, table.get_ref())),
            Err(error) => {
                notes.note(error.span().unwrap_or(0..0), "", error.message());
                None
            }
        };
        match read {
            Some(bootstrap) if !notes.any() => Ok(bootstrap),
            _ => Err(ConfigErrors { file: file.to_owned(), errors: notes.into_errors() }),
        }
    }

    /// The file's text; [`Bootstrap::parse`] reads it back.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::from(
            "# Starts the cluster, once: only a voter that finds this file beside cluster.toml, and whose disk is \
             empty,\n# may do so. Once the cluster has started the file is not used again; never write it by hand.\n",
        );
        let voters: Vec<_> = self.voters.iter().map(|name| format!("\"{name}\"")).collect();
        // Names and UUIDs have no character that TOML would want escaped.
        let _ = writeln!(
            text,
            "cluster = \"{}\"\nid = \"{}\"\nvoters = [{}]",
            self.cluster,
            self.id,
            voters.join(", ")
        );
        text
    }
}

fn read(root: &Section<'_, '_>) -> Option<Bootstrap> {
    root.only(&["cluster", "id", "voters"]);
    for key in ["cluster", "id", "voters"] {
        if !root.has(key) {
            root.missing(key);
        }
    }
    let cluster = root.string("cluster");
    if cluster.is_some_and(|name| !keepwarm_types::valid_name(name)) {
        root.bad("cluster", "is not a name: 1 to 64 letters, digits, '.', '_' or '-'");
    }
    let id = root.string("id");
    let parsed = id.and_then(|id| Uuid::parse_str(id).ok()).filter(|id| !id.is_nil());
    if let (Some(id), None) = (id, parsed) {
        root.bad("id", format!("'{id}' is not a cluster's id: a UUID that `keepwarm init` made"));
    }
    let voters: Vec<NodeName> = root.list("voters")?;
    if voters.len().is_multiple_of(2) {
        root.bad("voters", format!("has {} names: an odd number of nodes votes", voters.len()));
    }
    for (index, voter) in voters.iter().enumerate() {
        if voters[..index].contains(voter) {
            root.bad("voters", format!("'{voter}' is named twice"));
        }
    }
    Some(Bootstrap { cluster: cluster?.to_owned(), id: parsed?, voters })
}

#[cfg(test)]
mod tests {
    use keepwarm_types::ShardCount;

    use super::*;
    use crate::LocalCluster;

    fn config(folder: &Path, nodes: u16) -> Config {
        let local = LocalCluster::new("local", nodes, 7000, ShardCount::new(64).unwrap());
        let path = folder.join("cluster.toml");
        std::fs::write(&path, local.render().unwrap()).unwrap();
        Config::load(&path).unwrap()
    }

    #[test]
    fn what_is_written_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path(), 4);
        assert_eq!(Bootstrap::of(&config).unwrap(), None, "there is no file yet");
        let bootstrap = Bootstrap::new(&config);
        assert_eq!(bootstrap.voters.iter().map(NodeName::as_str).collect::<Vec<_>>(), ["n1", "n2", "n3"]);
        std::fs::write(config.path_of(Bootstrap::FILE), bootstrap.render()).unwrap();
        assert_eq!(Bootstrap::of(&config).unwrap(), Some(bootstrap));
    }

    #[test]
    fn another_clusters_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path(), 3);
        let other = Bootstrap { cluster: "other".to_owned(), ..Bootstrap::new(&config) };
        std::fs::write(config.path_of(Bootstrap::FILE), other.render()).unwrap();
        let error = Bootstrap::of(&config).unwrap_err().to_string();
        assert!(
            error.contains("'other'") && error.contains("'local'") && error.contains("bootstrap"),
            "{error}"
        );
    }

    #[test]
    fn a_lone_node_needs_none() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path(), 1);
        std::fs::write(config.path_of(Bootstrap::FILE), "nonsense").unwrap();
        assert_eq!(Bootstrap::of(&config).unwrap(), None);
    }

    #[test]
    fn every_error_is_told_with_its_place() {
        let errors = |text: &str| Bootstrap::parse("bootstrap", text).unwrap_err().to_string();
        let text = "cluster = \"a/b\"\nid = \"7\"\nvoters = [\"n1\", \"n1\"]\nvoter = 1\n";
        let expected = "bootstrap:1:11: cluster: is not a name: 1 to 64 letters, digits, '.', '_' or '-'\n\
                        bootstrap:2:6: id: '7' is not a cluster's id: a UUID that `keepwarm init` made\n\
                        bootstrap:3:10: voters: has 2 names: an odd number of nodes votes\n\
                        bootstrap:3:10: voters: 'n1' is named twice\n\
                        bootstrap:4:1: voter: unknown key; did you mean 'voters'?";
        assert_eq!(errors(text), expected);
        assert_eq!(errors("").matches("is missing").count(), 3);
        assert!(errors("voters = [1, \"-\"]").contains("voters[0]: must be a string"));
        assert!(errors("voters = [1, \"-\"]").contains("voters[1]: '-' is not a name"));
        assert!(errors("voters = \"n1\"").contains("voters: is a string, must be a list of strings"));
        assert!(errors("cluster = ").starts_with("bootstrap:1:"));
        assert!(errors("id = \"00000000-0000-0000-0000-000000000000\"").contains("id: '0000"));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = Bootstrap::read(Path::new("/no/such/bootstrap")).unwrap_err();
        assert!(error.to_string().contains("cannot read /no/such/bootstrap"), "{error}");
    }
}
