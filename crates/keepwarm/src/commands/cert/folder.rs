//! A folder of certificates: what its files are called, and the order in which they change.
//!
//! Files are replaced by rename, one after the other, so that a crash between two leaves a folder that still works:
//! of several authorities in ca.pem, the one that ca.key fits is the one that issues.

use std::fs;
use std::path::{Path, PathBuf};

use keepwarm_config::TlsConfig;
use keepwarm_types::{NodeName, valid_name};

use super::Issued;
use super::authority::Authority;
use super::read::{Certificate, pem_blocks};
use crate::cli::NODE_DAYS;
use crate::failure::Failure;
use crate::place::{self, Readers};

/// The authorities' certificates.
const CA_FILE: &str = "ca.pem";
/// The key of the one that issues.
const CA_KEY_FILE: &str = "ca.key";
/// The name that the authority's files have.
const CA_NAME: &str = "ca";
/// Authorities trusted at once: more than one only during a rotation, and a third one in a rotation cut short.
const TRUSTED_MAX: usize = 4;

/// Where certificates lie.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    dir: PathBuf,
    ca: PathBuf,
}

/// The outcome of a change to the authorities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) cluster: String,
    pub(super) trusted: usize,
    pub(super) dropped: usize,
}

/// The authority that issues, and all that are trusted.
struct Authorities {
    issuer: Authority,
    /// Every certificate in ca.pem.
    trusted: Vec<String>,
    /// Which of them is the issuer's.
    index: usize,
}

impl Folder {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), ca: dir.join(CA_FILE) }
    }

    /// The folder that a configuration names; its authority may lie elsewhere.
    pub(crate) fn of(tls: &TlsConfig) -> Self {
        Self { dir: tls.dir.clone(), ca: tls.ca.clone() }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.ca.clone()
    }

    pub(crate) fn ca_key(&self) -> PathBuf {
        self.dir.join(CA_KEY_FILE)
    }

    pub(crate) fn certificate(&self, node: &NodeName) -> PathBuf {
        self.dir.join(format!("{node}.pem"))
    }

    pub(crate) fn key(&self, node: &NodeName) -> PathBuf {
        self.dir.join(format!("{node}.key"))
    }

    /// The nodes that have a certificate here, in order.
    pub(crate) fn nodes(&self) -> Result<Vec<NodeName>, Failure> {
        let failed =
            |error: std::io::Error| Failure::config(format!("cannot read {}: {error}", self.dir.display()));
        let mut nodes = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let node =
                name.to_str().and_then(|name| name.strip_suffix(".pem")).filter(|name| *name != CA_NAME);
            nodes.extend(node.and_then(|name| name.parse().ok()));
        }
        nodes.sort();
        Ok(nodes)
    }

    /// Makes the authority of a cluster, where there is none.
    pub(crate) fn found(&self, cluster: &str, days: u32) -> Result<(), Failure> {
        if !valid_name(cluster) {
            return Err(Failure::usage(format!(
                "--cluster {cluster}: is not a name: 1 to 64 letters, digits, '.', '_' or '-'"
            )));
        }
        for path in [self.ca(), self.ca_key()] {
            if path.symlink_metadata().is_ok() {
                return Err(Failure::config(format!(
                    "{} exists: a new authority would shut out the nodes of the old one; to replace it step by step, \
                     use `keepwarm cert ca --rotate`; to begin anew, remove it first",
                    path.display()
                )));
            }
        }
        let authority = Authority::generate(cluster, days)?;
        place::create(&self.ca_key(), authority.key(), Readers::Owner)?;
        place::create(&self.ca(), authority.certificate(), Readers::All)
    }

    /// Issues a node's certificate and key, over those that are there.
    pub(super) fn issue(&self, node: &NodeName, days: u32) -> Result<Issued, Failure> {
        if node.as_str() == CA_NAME {
            return Err(Failure::usage(format!(
                "'{CA_NAME}' cannot be a node: its files are the authority's"
            )));
        }
        let issuer = self.authorities()?.issuer;
        let issued = issuer.issue(node, days)?;
        let (certificate, key) = (self.certificate(node), self.key(node));
        let replaced = certificate.exists();
        place::replace(&key, &issued.key, Readers::Owner)?;
        place::replace(&certificate, &issued.certificate, Readers::All)?;
        Ok(Issued { cluster: issuer.cluster().to_owned(), node: node.clone(), certificate, key, replaced })
    }

    /// Puts a new authority in front of the others.
    pub(super) fn rotate(&self, cluster: Option<&str>, days: u32) -> Result<Changed, Failure> {
        let Authorities { issuer, trusted, .. } = self.authorities()?;
        self.same_cluster(cluster, &issuer)?;
        if trusted.len() >= TRUSTED_MAX {
            return Err(Failure::config(format!(
                "{} has {} authorities: issue the nodes' certificates again and use `keepwarm cert ca --drop-old` first",
                self.ca().display(),
                trusted.len()
            )));
        }
        let next = Authority::generate(issuer.cluster(), days)?;
        let mut text = with_newline(next.certificate());
        trusted.iter().for_each(|old| text.push_str(&with_newline(old)));
        // Trust first: until the key follows, the old authority still issues.
        place::replace(&self.ca(), &text, Readers::All)?;
        place::replace(&self.ca_key(), next.key(), Readers::Owner)?;
        Ok(Changed { cluster: issuer.cluster().to_owned(), trusted: trusted.len() + 1, dropped: 0 })
    }

    /// Leaves the authority that issues as the only one.
    pub(super) fn drop_old(&self, cluster: Option<&str>) -> Result<Changed, Failure> {
        let Authorities { issuer, trusted, index } = self.authorities()?;
        self.same_cluster(cluster, &issuer)?;
        let issuing = Certificate::parse(&self.ca(), &trusted[index])?;
        let mut left = Vec::new();
        for node in self.nodes()? {
            if !Certificate::read(&self.certificate(&node))?.is_signed_by(&issuing) {
                left.push(node.to_string());
            }
        }
        if !left.is_empty() {
            return Err(Failure::config(format!(
                "{} still have certificates of an older authority, and would be shut out: `keepwarm cert node NODE \
                 --dir {}` for each, then again",
                left.join(", "),
                self.dir.display()
            )));
        }
        place::replace(&self.ca(), &with_newline(&trusted[index]), Readers::All)?;
        Ok(Changed { cluster: issuer.cluster().to_owned(), trusted: 1, dropped: trusted.len() - 1 })
    }

    fn same_cluster(&self, wanted: Option<&str>, issuer: &Authority) -> Result<(), Failure> {
        match wanted {
            Some(wanted) if wanted != issuer.cluster() => Err(Failure::config(format!(
                "{} is the authority of cluster '{}', not of '{wanted}': give the other --dir, or leave --cluster out",
                self.ca().display(),
                issuer.cluster()
            ))),
            _ => Ok(()),
        }
    }

    /// The authorities that are trusted, the newest first.
    pub(super) fn trusted(&self) -> Result<Vec<Certificate>, Failure> {
        let ca = self.ca();
        let blocks = pem_blocks(&self.read_text(&ca)?);
        if blocks.is_empty() {
            return Err(Failure::config(format!("{}: has no certificate in it", ca.display())));
        }
        blocks.iter().map(|pem| Certificate::parse(&ca, pem)).collect()
    }

    fn authorities(&self) -> Result<Authorities, Failure> {
        let (ca, ca_key) = (self.ca(), self.ca_key());
        let trusted = pem_blocks(&self.read_text(&ca)?);
        let key = self.read_text(&ca_key)?;
        if trusted.is_empty() {
            return Err(Failure::config(format!("{}: has no certificate in it", ca.display())));
        }
        let mut first = None;
        for (index, pem) in trusted.iter().enumerate() {
            match Authority::load(pem, &key) {
                Ok(issuer) => return Ok(Authorities { issuer, trusted, index }),
                Err(error) => drop(first.get_or_insert(error)),
            }
        }
        let reason = first.unwrap_or_default();
        Err(Failure::config(format!(
            "{} does not fit {}: {reason}; put back the key that was made with the certificate",
            ca_key.display(),
            ca.display()
        )))
    }

    /// A file's text; where there is none, where the folder that is meant may be.
    fn read_text(&self, path: &Path) -> Result<String, Failure> {
        fs::read_to_string(path).map_err(|error| {
            let below = self.dir.join("certs");
            let hint = if error.kind() != std::io::ErrorKind::NotFound {
                String::new()
            } else if below.join(CA_FILE).exists() {
                format!("; did you mean --dir {}?", below.display())
            } else {
                format!("; `keepwarm cert ca --cluster NAME --dir {}` makes an authority", self.dir.display())
            };
            Failure::config(format!("cannot read {}: {error}{hint}", path.display()))
        })
    }
}

/// Makes the authority of a new cluster, and a certificate for each of its nodes.
pub(crate) fn found(dir: &Path, cluster: &str, nodes: &[NodeName]) -> Result<(), Failure> {
    let folder = Folder::new(dir);
    folder.found(cluster, crate::cli::CA_DAYS)?;
    nodes.iter().try_for_each(|node| folder.issue(node, NODE_DAYS).map(drop))
}

fn with_newline(pem: &str) -> String {
    format!("{}\n", pem.trim_end())
}
