//! One certificate, read from PEM: whose it is, when it is valid, who signed it.

use std::fmt::Display;
use std::fs;
use std::path::Path;

use jiff::Timestamp;
use rcgen::KeyPair;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::parse_x509_pem;
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

use crate::failure::Failure;

/// What a certificate ends with in a PEM file.
const PEM_END: &str = "-----END CERTIFICATE-----";
/// How a certificate names whose it is: `keepwarm://CLUSTER/NODE`, an authority's without a node.
pub(super) const SCHEME: &str = "keepwarm://";
/// Seconds of a day.
const DAY_S: i64 = 24 * 3600;

/// A certificate.
#[derive(Debug, Clone)]
pub(super) struct Certificate {
    der: Vec<u8>,
    pub(super) cluster: String,
    /// None: an authority's.
    pub(super) node: Option<String>,
    pub(super) begins_at: Timestamp,
    pub(super) expires_at: Timestamp,
}

impl Certificate {
    /// Reads a file with one certificate.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let text = fs::read_to_string(path)
            .map_err(|error| Failure::config(format!("cannot read {}: {error}", path.display())))?;
        Self::parse(path, &text)
    }

    /// Reads a PEM text; `path` is where it comes from.
    pub(super) fn parse(path: &Path, pem: &str) -> Result<Self, Failure> {
        Self::parse_text(pem).map_err(|reason| Failure::config(format!("{}: {reason}", path.display())))
    }

    pub(super) fn parse_text(pem: &str) -> Result<Self, String> {
        let wrong = |reason: &dyn Display| format!("is no certificate: {reason}");
        let (_, pem) = parse_x509_pem(pem.as_bytes()).map_err(|error| wrong(&error))?;
        let der = pem.contents;
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| wrong(&error))?;
        let (cluster, node) = identity(&parsed).ok_or_else(|| {
            format!("names nobody as {SCHEME}CLUSTER/NODE; `keepwarm cert` makes certificates that do")
        })?;
        let at = |time: ASN1Time| Timestamp::from_second(time.timestamp()).map_err(|error| wrong(&error));
        let (begins_at, expires_at) = (at(parsed.validity().not_before)?, at(parsed.validity().not_after)?);
        Ok(Self { cluster, node, begins_at, expires_at, der })
    }

    /// Whole days until it ends; negative once it has.
    pub(super) fn days_left(&self, now: Timestamp) -> i64 {
        (self.expires_at.as_second() - now.as_second()).div_euclid(DAY_S)
    }

    /// Whether `issuer` signed it.
    pub(super) fn is_signed_by(&self, issuer: &Self) -> bool {
        let (Ok((_, own)), Ok((_, issuer))) =
            (X509Certificate::from_der(&self.der), X509Certificate::from_der(&issuer.der))
        else {
            return false;
        };
        own.issuer() == issuer.subject() && own.verify_signature(Some(issuer.public_key())).is_ok()
    }

    /// Whether a private key, as PEM, is this certificate's.
    pub(super) fn fits(&self, key: &str) -> Result<bool, String> {
        let key = KeyPair::from_pem(key).map_err(|error| format!("is no private key: {error}"))?;
        let (_, own) = X509Certificate::from_der(&self.der).map_err(|error| error.to_string())?;
        Ok(own.public_key().subject_public_key.data.as_ref() == key.public_key_raw())
    }
}

/// Cluster and node by the certificate's URI.
fn identity(certificate: &X509Certificate<'_>) -> Option<(String, Option<String>)> {
    let names = certificate.subject_alternative_name().ok()??;
    let uri = names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix(SCHEME),
        _ => None,
    })?;
    let (cluster, node) = uri.split_once('/').map_or((uri, None), |(cluster, node)| (cluster, Some(node)));
    Some((cluster.to_owned(), node.filter(|node| !node.is_empty()).map(str::to_owned)))
}

/// The certificates of a PEM file, each as text.
pub(super) fn pem_blocks(text: &str) -> Vec<String> {
    let parts = text.split_inclusive(PEM_END).filter(|part| part.trim_end().ends_with(PEM_END));
    parts.map(|part| part.trim_start().to_owned()).collect()
}
