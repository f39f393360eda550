//! `keepwarm cert`: the cluster's authority and the certificates that it gives to nodes.
//!
//! A folder has ca.pem (every authority that is trusted, the newest first), ca.key (of the one that issues), NODE.pem and
//! NODE.key. A running node reads its files again when they change, so a certificate is replaced by issuing it again.
//! Replacing the authority has three steps, each safe to stop after: `ca --rotate` (both are trusted), `node` for
//! each node, `ca --drop-old`.

mod authority;
mod folder;
mod read;
mod show;

use std::path::PathBuf;

use keepwarm_types::NodeName;
use serde::Serialize;
use serde_json::json;

use crate::cli::{CaArgs, CertVerb};
use crate::failure::Failure;
use crate::output::Output;

pub(crate) use folder::{Folder, found};
pub(in crate::commands) use show::node_files;

/// What `cert node` did.
#[derive(Debug, Serialize)]
struct Issued {
    cluster: String,
    node: NodeName,
    certificate: PathBuf,
    key: PathBuf,
    /// Whether there was one before.
    replaced: bool,
}

pub(crate) fn run(verb: &CertVerb, output: Output) -> Result<(), Failure> {
    match verb {
        CertVerb::Ca(args) if args.rotate => rotate(args, output),
        CertVerb::Ca(args) if args.drop_old => drop_old(args, output),
        CertVerb::Ca(args) => make(args, output),
        CertVerb::Node { name, folder, days } => {
            let issued = Folder::new(&folder.dir).issue(name, *days)?;
            output.show(&issued, |issued| {
                let done =
                    if issued.replaced { "replaced: a running node takes it up by itself" } else { "made" };
                format!("{} and {}: {done}\n", issued.certificate.display(), issued.key.display())
            })
        }
        CertVerb::Show { folder } => show::run(&Folder::new(&folder.dir), output),
    }
}

fn make(args: &CaArgs, output: Output) -> Result<(), Failure> {
    let folder = Folder::new(&args.folder.dir);
    let cluster =
        args.cluster.as_deref().ok_or_else(|| Failure::usage("--cluster: say which cluster it is for"))?;
    folder.found(cluster, args.days)?;
    let document = json!({"cluster": cluster, "ca": folder.ca(), "key": folder.ca_key(), "trusted": 1});
    output.show(&document, |_| {
        format!(
            "{}: the authority of cluster {cluster}\n{}: its key. Whoever has it can make nodes: nodes do not need it, \
             keep it away from them\n",
            folder.ca().display(),
            folder.ca_key().display()
        )
    })
}

fn rotate(args: &CaArgs, output: Output) -> Result<(), Failure> {
    let folder = Folder::new(&args.folder.dir);
    let rotated = folder.rotate(args.cluster.as_deref(), args.days)?;
    let document = json!({"cluster": rotated.cluster, "ca": folder.ca(), "key": folder.ca_key(), "trusted": rotated.trusted});
    let dir = args.folder.dir.display();
    output.show(&document, |_| {
        format!(
            "{}: a new authority in front; {} are trusted now. Next:\n  1. put this file on every node\n  \
             2. keepwarm cert node NODE --dir {dir}   for each node, and put NODE.pem and NODE.key there\n  \
             3. keepwarm cert ca --drop-old --dir {dir}   and put ca.pem on every node again\n",
            folder.ca().display(),
            rotated.trusted
        )
    })
}

fn drop_old(args: &CaArgs, output: Output) -> Result<(), Failure> {
    let folder = Folder::new(&args.folder.dir);
    let dropped = folder.drop_old(args.cluster.as_deref())?;
    let document =
        json!({"cluster": dropped.cluster, "ca": folder.ca(), "dropped": dropped.dropped, "trusted": 1});
    output.show(&document, |_| match dropped.dropped {
        0 => format!("{}: there is no older authority; nothing to do\n", folder.ca().display()),
        count => {
            format!(
                "{}: {count} dropped, the newest is trusted alone; put it on every node\n",
                folder.ca().display()
            )
        }
    })
}
