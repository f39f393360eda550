//! The authority: makes its own certificate, and the nodes'.
//!
//! A certificate says whose it is by one URI, `keepwarm://CLUSTER/NODE`; the authority's has no node. Keys are ECDSA on
//! P-256, a new one for each certificate.

use std::fmt::Display;

use jiff::{Timestamp, ToSpan, tz::TimeZone};
use keepwarm_types::NodeName;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

use super::read::{Certificate, SCHEME};
use crate::failure::Failure;

/// Certificates below the authority's in a chain: a node's, which makes none itself.
const PATH_LEN: u8 = 0;

/// Who makes the cluster's certificates.
pub(super) struct Authority {
    cluster: String,
    certificate: String,
    key: String,
}

/// A node's certificate and private key, as PEM.
pub(super) struct NodePem {
    pub(super) certificate: String,
    pub(super) key: String,
}

impl Authority {
    /// A new authority of a cluster.
    pub(super) fn generate(cluster: &str, days: u32) -> Result<Self, Failure> {
        let key = KeyPair::generate().map_err(refused)?;
        let mut params = params(cluster, format!("{SCHEME}{cluster}"), days)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(PATH_LEN));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(refused)?.pem();
        Ok(Self { cluster: cluster.to_owned(), certificate, key: key.serialize_pem() })
    }

    /// The authority that a certificate and its key are.
    pub(super) fn load(certificate: &str, key: &str) -> Result<Self, String> {
        let parsed = Certificate::parse_text(certificate)?;
        if parsed.node.is_some() {
            return Err("it is a node's certificate, not an authority's".to_owned());
        }
        if !parsed.fits(key)? {
            return Err("it is the key of another certificate".to_owned());
        }
        Ok(Self { cluster: parsed.cluster, certificate: certificate.to_owned(), key: key.to_owned() })
    }

    /// A certificate for a node, with a new key.
    pub(super) fn issue(&self, node: &NodeName, days: u32) -> Result<NodePem, Failure> {
        let own = KeyPair::from_pem(&self.key).map_err(refused)?;
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, own).map_err(refused)?;
        let key = KeyPair::generate().map_err(refused)?;
        let mut params = params(node.as_str(), format!("{SCHEME}{}/{node}", self.cluster), days)?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Each node is a server to some peers and a client of others.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &issuer).map_err(refused)?.pem();
        Ok(NodePem { certificate, key: key.serialize_pem() })
    }

    pub(super) fn cluster(&self) -> &str {
        &self.cluster
    }

    pub(super) fn certificate(&self) -> &str {
        &self.certificate
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }
}

fn refused(error: impl Display) -> Failure {
    Failure::failed(format!("the certificate could not be made: {error}"))
}

/// What every certificate has: whose it is, from yesterday on, so that clocks may differ, and to the end of its last
/// day.
fn params(name: &str, uri: String, days: u32) -> Result<CertificateParams, Failure> {
    let mut params = CertificateParams::default();
    // For people; a name is at most as long as X.509 lets a common name be.
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(refused)?)];
    let today = TimeZone::UTC.to_datetime(Timestamp::now()).date();
    let (first, last) = (today.checked_sub(1.day()), today.checked_add((i64::from(days) + 1).days()));
    let (first, last) = (first.map_err(refused)?, last.map_err(refused)?);
    let at = |date: jiff::civil::Date| {
        date_time_ymd(date.year().into(), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    (params.not_before, params.not_after) = (at(first), at(last));
    Ok(params)
}
