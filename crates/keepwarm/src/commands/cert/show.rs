//! `keepwarm cert show`: whose the certificates in a folder are, how long they are valid, and what is wrong with them.
//!
//! `keepwarm check --host` asks the same of the files of one node.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use keepwarm_types::NodeName;
use serde::Serialize;

use super::folder::Folder;
use super::read::Certificate;
use crate::commands::check::{Finding, Verdict, finding};
use crate::failure::Failure;
use crate::output::{Output, Table};

/// Days before the end at which a certificate is warned about: time to replace it without haste.
const DAYS_WARN: i64 = 30;
/// How much of an RFC 3339 time is its date.
const DATE_CHARS: usize = 10;
/// Mode bits that let others than the owner at a key.
const OTHERS: u32 = 0o077;

#[derive(Debug, Serialize)]
struct Report {
    dir: PathBuf,
    certificates: Vec<Row>,
    findings: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct Row {
    /// `authority` or `node`.
    kind: &'static str,
    cluster: String,
    node: Option<String>,
    /// RFC 3339, UTC.
    expires_at: String,
    days_left: i64,
}

pub(super) fn run(folder: &Folder, output: Output) -> Result<(), Failure> {
    let (now, trusted) = (Timestamp::now(), folder.trusted()?);
    let nodes = folder.nodes()?;
    let mut findings: Vec<_> = trusted.iter().flat_map(|ca| validity("authority", ca, now)).collect();
    let mut certificates: Vec<_> = trusted.iter().map(|ca| row("authority", ca, now)).collect();
    let cluster = trusted.first().map(|ca| ca.cluster.clone()).unwrap_or_default();
    for node in &nodes {
        let (certificate, found) = examine(folder, &trusted, &cluster, node, now);
        certificates.extend(certificate.map(|certificate| row("node", &certificate, now)));
        findings.extend(found.into_iter().filter(|finding| finding.verdict != Verdict::Ok));
    }
    findings.retain(|finding| finding.verdict != Verdict::Ok);
    let report = Report { dir: folder.dir().to_owned(), certificates, findings };
    output.show(&report, text)?;
    match report.findings.iter().filter(|finding| finding.verdict == Verdict::Error).count() {
        0 => Ok(()),
        errors => Err(Failure::config(format!("{errors} errors in {}", folder.dir().display()))),
    }
}

/// Whether `node` of `cluster` finds its certificates in the folder, and they are good.
pub(in crate::commands) fn node_files(folder: &Folder, cluster: &str, node: &NodeName) -> Vec<Finding> {
    let now = Timestamp::now();
    let trusted = match folder.trusted() {
        Ok(trusted) => trusted,
        Err(failure) => return vec![finding("authority", Verdict::Error, failure.to_string())],
    };
    let mut findings: Vec<_> = trusted.iter().flat_map(|ca| validity("authority", ca, now)).collect();
    findings.extend(examine(folder, &trusted, cluster, node, now).1);
    findings
}

fn row(kind: &'static str, certificate: &Certificate, now: Timestamp) -> Row {
    Row {
        kind,
        cluster: certificate.cluster.clone(),
        node: certificate.node.clone(),
        expires_at: certificate.expires_at.to_string(),
        days_left: certificate.days_left(now),
    }
}

fn text(report: &Report) -> String {
    let mut table = Table::new(["certificate", "cluster", "expires", "days left"]);
    for row in &report.certificates {
        let name = row.node.as_ref().map_or_else(|| row.kind.to_owned(), |node| format!("node {node}"));
        let expires = row.expires_at.chars().take(DATE_CHARS).collect();
        table.row([name, row.cluster.clone(), expires, row.days_left.to_string()]);
    }
    let mut text = table.render();
    for finding in &report.findings {
        let verdict = if finding.verdict == Verdict::Error { "error" } else { "warning" };
        text.push_str(&format!("{verdict}: {}: {}\n", finding.subject, finding.detail));
    }
    text
}

/// A node's certificate, where it can be read, and how it and its key are.
fn examine(
    folder: &Folder,
    trusted: &[Certificate],
    cluster: &str,
    node: &NodeName,
    now: Timestamp,
) -> (Option<Certificate>, Vec<Finding>) {
    let subject = format!("certificate of {node}");
    let path = folder.certificate(node);
    let certificate = match Certificate::read(&path) {
        Ok(certificate) => certificate,
        Err(failure) => return (None, vec![finding(&subject, Verdict::Error, failure.to_string())]),
    };
    let error = |detail: String| finding(&subject, Verdict::Error, format!("{}: {detail}", path.display()));
    let mut findings = validity(&subject, &certificate, now);
    if (certificate.cluster.as_str(), certificate.node.as_deref()) != (cluster, Some(node.as_str())) {
        let whose = certificate.node.as_deref().unwrap_or("no node");
        findings.push(error(format!(
            "is of {whose} in cluster '{}', not of {node} in '{cluster}'",
            certificate.cluster
        )));
    }
    match trusted.iter().position(|ca| certificate.is_signed_by(ca)) {
        Some(0) => {}
        Some(_) => findings.push(finding(
            &subject,
            Verdict::Warning,
            "is of an older authority: issue it again before `keepwarm cert ca --drop-old`",
        )),
        None => findings.push(error(format!(
            "is of no authority in {}: issue it again with `keepwarm cert node {node}`",
            folder.ca().display()
        ))),
    }
    findings.extend(key(&folder.key(node), node, &certificate));
    (Some(certificate), findings)
}

fn validity(subject: &str, certificate: &Certificate, now: Timestamp) -> Vec<Finding> {
    let until = certificate.expires_at.strftime("%Y-%m-%d");
    let again = if certificate.node.is_some() {
        "issue it again"
    } else {
        "replace it with `keepwarm cert ca --rotate`"
    };
    vec![match certificate.days_left(now) {
        _ if certificate.begins_at > now => finding(
            subject,
            Verdict::Error,
            format!("is valid from {} on: is this machine's clock right?", certificate.begins_at),
        ),
        _ if certificate.expires_at <= now => {
            finding(subject, Verdict::Error, format!("ended on {until}: {again}"))
        }
        days if days < DAYS_WARN => {
            finding(subject, Verdict::Warning, format!("ends on {until}, in {days} days: {again}"))
        }
        days => finding(subject, Verdict::Ok, format!("valid until {until}, {days} days")),
    }]
}

fn key(path: &Path, node: &NodeName, certificate: &Certificate) -> Option<Finding> {
    let subject = format!("key of {node}");
    let error =
        |detail: String| Some(finding(&subject, Verdict::Error, format!("{}: {detail}", path.display())));
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(cause) => return error(cause.to_string()),
    };
    match certificate.fits(&text) {
        Ok(true) => {}
        Ok(false) => {
            return error(
                "is not the key of the certificate beside it: put back both, or issue again".into(),
            );
        }
        Err(reason) => return error(reason),
    }
    let mode = fs::metadata(path).map(|metadata| metadata.permissions().mode()).unwrap_or_default();
    (mode & OTHERS != 0).then(|| {
        let detail = format!("{}: others may read it: `chmod 600` it", path.display());
        finding(&subject, Verdict::Warning, detail)
    })
}
