//! `keepwarm init`: a cluster for this machine, ready to be started.
//!
//! It writes cluster.toml, the bootstrap file, an authority and the nodes' certificates into one folder, and
//! overwrites nothing: whoever has such files has a cluster already. cluster.toml comes last, so that a folder that
//! has it is whole.

use std::path::{Path, PathBuf};

use keepwarm_config::{Bootstrap, Config, LocalCluster};
use keepwarm_types::ShardCount;
use serde::Serialize;

use super::cert;
use crate::cli::InitArgs;
use crate::failure::Failure;
use crate::output::{Output, Table};
use crate::place::{self, Readers};
use crate::wiring::model;

/// The configuration's name in the folder.
const CONFIG_FILE: &str = "cluster.toml";
/// What a folder with a cluster has; cluster.toml names the last two.
const TAKEN: [&str; 4] = [CONFIG_FILE, Bootstrap::FILE, "certs", "data"];
/// Shards of a cluster on one machine: a few for every node, cheap to hold.
pub(crate) const SHARDS: u64 = 64;

/// A cluster's files.
#[derive(Debug, Serialize)]
pub(crate) struct Made {
    cluster: String,
    cluster_id: String,
    pub(crate) config: PathBuf,
    bootstrap: PathBuf,
    certificates: PathBuf,
    pub(crate) nodes: Vec<MadeNode>,
    warnings: Vec<String>,
}

/// A node of it.
#[derive(Debug, Serialize)]
pub(crate) struct MadeNode {
    pub(crate) name: String,
    pub(crate) http: String,
    peer: Option<String>,
    voter: bool,
    command: Vec<String>,
}

pub(crate) fn run(args: &InitArgs, output: Output) -> Result<(), Failure> {
    let made = found(&args.dir, &local(args)?)?;
    output.show(&made, text_of)
}

/// Writes a cluster's files into a folder that has none.
pub(crate) fn found(folder: &Path, cluster: &LocalCluster) -> Result<Made, Failure> {
    let dir = std::path::absolute(folder)?;
    if let Some(taken) = TAKEN.iter().map(|name| dir.join(name)).find(|path| path.symlink_metadata().is_ok())
    {
        return Err(Failure::config(format!(
            "{} exists: init makes a new cluster and overwrites nothing; give another --dir, or remove what is there",
            taken.display()
        )));
    }
    let path = dir.join(CONFIG_FILE);
    let text = cluster.render().map_err(Failure::usage)?;
    let config = Config::parse(&path.display().to_string(), &text).map_err(Failure::config)?;
    let bootstrap = Bootstrap::new(&config);
    let names: Vec<_> = config.nodes.iter().map(|node| node.name.clone()).collect();
    let certificates = config.tls.as_ref().map(|tls| tls.dir.clone()).unwrap_or_default();
    cert::found(&certificates, &config.name, &names)?;
    let bootstrap_path = config.path_of(Bootstrap::FILE);
    place::create(&bootstrap_path, &bootstrap.render(), Readers::All)?;
    place::create(&path, &text, Readers::All)?;
    Ok(Made {
        cluster: config.name.clone(),
        cluster_id: bootstrap.id.to_string(),
        nodes: config.nodes.iter().map(|node| made_node(&folder.join(CONFIG_FILE), node)).collect(),
        warnings: config.warnings(),
        config: path,
        bootstrap: bootstrap_path,
        certificates,
    })
}

/// A model's name and source, as a file in any folder may have them.
pub(crate) fn named_model(text: &str) -> Result<(String, String), Failure> {
    let model = model(text)?;
    // The file's paths start at its own folder, the command line's where the command is given.
    let source = match model.source.strip_prefix("gguf:") {
        Some(path) => format!("gguf:{}", std::path::absolute(path)?.display()),
        None => model.source,
    };
    Ok((model.name, source))
}

fn local(args: &InitArgs) -> Result<LocalCluster, Failure> {
    let shards = ShardCount::new(SHARDS).map_err(Failure::failed)?;
    Ok(LocalCluster {
        replication: args.replication,
        model: args.model.as_deref().map(named_model).transpose()?,
        ..LocalCluster::new(&args.cluster, args.nodes, args.port_base, shards)
    })
}

fn made_node(config: &Path, node: &keepwarm_config::NodeConfig) -> MadeNode {
    let config = config.display().to_string();
    let name = node.name.to_string();
    MadeNode {
        http: node.http.clone(),
        peer: node.peer.clone(),
        voter: node.voter,
        command: ["keepwarm", "serve", "--config", &config, "--node", &name].map(str::to_owned).to_vec(),
        name,
    }
}

fn text_of(made: &Made) -> String {
    let mut text = format!("cluster {} in {}\n\n", made.cluster, made.config.display());
    let mut table = Table::new(["node", "http", "peers", "votes"]);
    for node in &made.nodes {
        let votes = if node.voter { "yes" } else { "no" };
        let peer = node.peer.clone().unwrap_or_default();
        table.row([node.name.clone(), node.http.clone(), peer, votes.to_owned()]);
    }
    text.push_str(&table.render());
    for warning in &made.warnings {
        text.push_str(&format!("\nwarning: {warning}\n"));
    }
    text.push_str("\nStart each node, in a terminal of its own:\n");
    for node in &made.nodes {
        let words: Vec<_> = node.command.iter().map(|word| shell(word)).collect();
        text.push_str(&format!("  {}\n", words.join(" ")));
    }
    text
}

/// A word as a shell takes it back.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+:=@,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_can_be_pasted_whatever_the_folder_is_called() {
        assert_eq!(shell("/tmp/a-b_c.toml"), "/tmp/a-b_c.toml");
        assert_eq!(shell("my dir/it's"), "'my dir/it'\\''s'");
        assert_eq!(shell(""), "''");
    }
}
