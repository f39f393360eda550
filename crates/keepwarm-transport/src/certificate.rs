//! Making and reading certificates: a cluster's authority, and what each node shows.
//!
//! A node is its certificate: the subject's alternative name is the URI `keepwarm://CLUSTER/NODE`. Keys are Ed25519.

use std::path::{Path, PathBuf};

use keepwarm_types::NodeName;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ED25519, SanType,
};
use time::{Duration, OffsetDateTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// What every name of ours begins with.
const SCHEME: &str = "keepwarm://";
/// A certificate is valid from a little before it was made: clocks differ.
const SKEW: Duration = Duration::hours(1);
/// Longest validity that is given: ten years and a little.
pub const DAYS_MAX: u32 = 3_700;

/// What is wrong with a certificate, or the making of one.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The text is no certificate, or no key.
    #[error("{what} cannot be read: {detail}")]
    Unreadable {
        /// Which file or text.
        what: String,
        /// Why.
        detail: String,
    },
    /// It is there and is something else.
    #[error("{what}: {detail}")]
    Wrong {
        /// Which file or text.
        what: String,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// The library refused to make it.
    #[error("a certificate could not be made: {0}")]
    Make(String),
}

fn unreadable(what: &str, detail: impl std::fmt::Display) -> CertificateError {
    CertificateError::Unreadable { what: what.to_owned(), detail: detail.to_string() }
}

fn wrong(what: &str, detail: impl Into<String>) -> CertificateError {
    CertificateError::Wrong { what: what.to_owned(), detail: detail.into() }
}

fn make(error: impl std::fmt::Display) -> CertificateError {
    CertificateError::Make(error.to_string())
}

/// A certificate's own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The cluster in its name.
    pub cluster: String,
    /// The node in its name; none for an authority.
    pub node: Option<NodeName>,
    /// Seconds since the Unix epoch at which it ends.
    pub expires_at: i64,
}

/// A node's certificate and key, as PEM.
#[derive(Clone)]
pub struct NodePem {
    /// The certificate.
    pub certificate: String,
    /// Its key: for the node's eyes only.
    pub key: String,
}

impl std::fmt::Debug for NodePem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodePem(..)")
    }
}

/// A cluster's authority.
pub struct Authority {
    cluster: String,
    certificate: String,
    key: KeyPair,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({})", self.cluster)
    }
}

fn params(uri: &str, days: u32) -> Result<CertificateParams, CertificateError> {
    let mut params = CertificateParams::new(Vec::new()).map_err(make)?;
    params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(make)?)];
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, uri);
    params.not_before = OffsetDateTime::now_utc() - SKEW;
    params.not_after = params.not_before + SKEW + Duration::days(days.min(DAYS_MAX).into());
    Ok(params)
}

impl Authority {
    /// A new authority.
    ///
    /// # Errors
    /// [`CertificateError::Make`].
    pub fn generate(cluster: &str, valid_days: u32) -> Result<Self, CertificateError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(make)?;
        let mut params = params(&format!("{SCHEME}{cluster}"), valid_days)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(make)?.pem();
        Ok(Self { cluster: cluster.to_owned(), certificate, key })
    }

    /// An authority from its files' text. Where `certificates` has several, the first is the one that issues.
    ///
    /// # Errors
    /// [`CertificateError`] where they are none, or do not belong together.
    pub fn load(certificates: &str, key: &str) -> Result<Self, CertificateError> {
        let what = "the authority";
        let first = pem_blocks(what, certificates)?.swap_remove(0);
        let key = KeyPair::from_pem(key).map_err(|error| unreadable("the authority's key", error))?;
        let (_, parsed) =
            X509Certificate::from_der(&first.contents).map_err(|error| unreadable(what, error))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(wrong(what, "the key is another certificate's: restore the pair together"));
        }
        let shown = shown(what, &first.contents)?;
        if shown.node.is_some() {
            return Err(wrong(what, "it is a node's certificate, not an authority's"));
        }
        Ok(Self { cluster: shown.cluster, certificate: format!("{}\n", first_pem(certificates)), key })
    }

    /// The cluster that it is of.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Its certificate, as PEM.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Its key, as PEM: whoever has it can make nodes.
    #[must_use]
    pub fn key(&self) -> String {
        self.key.serialize_pem()
    }

    /// A certificate for a node.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn issue(&self, node: &NodeName, valid_days: u32) -> Result<NodePem, CertificateError> {
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, &self.key)
            .map_err(|error| unreadable("the authority", error))?;
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(make)?;
        let mut params = params(&format!("{SCHEME}{}/{node}", self.cluster), valid_days)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &issuer).map_err(make)?.pem();
        Ok(NodePem { certificate, key: key.serialize_pem() })
    }
}

/// The first certificate of a text, as it stands there.
fn first_pem(text: &str) -> &str {
    const END: &str = "-----END CERTIFICATE-----";
    let start = text.find("-----BEGIN CERTIFICATE-----").unwrap_or(0);
    let end = text[start..].find(END).map_or(text.len(), |end| start + end + END.len());
    &text[start..end]
}

fn pem_blocks(what: &str, text: &str) -> Result<Vec<x509_parser::pem::Pem>, CertificateError> {
    let blocks: Result<Vec<_>, _> = x509_parser::pem::Pem::iter_from_buffer(text.as_bytes()).collect();
    let blocks = blocks.map_err(|error| unreadable(what, error))?;
    if blocks.is_empty() {
        return Err(unreadable(what, "there is no PEM block in it"));
    }
    Ok(blocks)
}

/// What a certificate says of itself.
pub(crate) fn shown(what: &str, der: &[u8]) -> Result<Shown, CertificateError> {
    let (_, parsed) = X509Certificate::from_der(der).map_err(|error| unreadable(what, error))?;
    let names = parsed.subject_alternative_name().ok().flatten();
    let uri = names.and_then(|names| {
        names.value.general_names.iter().find_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(SCHEME),
            _ => None,
        })
    });
    let uri = uri.ok_or_else(|| wrong(what, format!("it has no name of the form {SCHEME}CLUSTER/NODE")))?;
    let (cluster, node) = match uri.split_once('/') {
        Some((cluster, node)) => {
            let node = node.parse().map_err(|error| wrong(what, format!("its node is none: {error}")))?;
            (cluster, Some(node))
        }
        None => (uri, None),
    };
    let expires_at = parsed.validity().not_after.timestamp();
    Ok(Shown { cluster: cluster.to_owned(), node, expires_at })
}

/// Where a node's certificates lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPaths {
    /// Certificates of authorities: all of them are trusted.
    pub ca: PathBuf,
    /// The node's certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A node's certificates, read and checked.
#[derive(Debug)]
pub struct Identity {
    /// What the node's certificate says.
    pub shown: Shown,
    pub(crate) chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    pub(crate) key: rustls::pki_types::PrivateKeyDer<'static>,
    pub(crate) roots: rustls::RootCertStore,
}

fn read(path: &Path) -> Result<String, CertificateError> {
    let what = path.display().to_string();
    std::fs::read_to_string(path).map_err(|error| {
        unreadable(&what, format!("{error}; `keepwarm cert` makes certificates, [tls] says where they lie"))
    })
}

impl Identity {
    /// Reads the files of a node and checks that they belong together.
    ///
    /// # Errors
    /// [`CertificateError`], naming the file.
    pub fn load(paths: &TlsPaths) -> Result<Self, CertificateError> {
        let name = |path: &Path| path.display().to_string();
        let certificate = name(&paths.certificate);
        let blocks = pem_blocks(&certificate, &read(&paths.certificate)?)?;
        let shown = shown(&certificate, &blocks[0].contents)?;
        if shown.node.is_none() {
            return Err(wrong(&certificate, "it is an authority's certificate, not a node's"));
        }
        let key =
            KeyPair::from_pem(&read(&paths.key)?).map_err(|error| unreadable(&name(&paths.key), error))?;
        let (_, parsed) = X509Certificate::from_der(&blocks[0].contents)
            .map_err(|error| unreadable(&certificate, error))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            let detail = format!("the key in {} is another certificate's", paths.key.display());
            return Err(wrong(&certificate, detail));
        }
        let mut roots = rustls::RootCertStore::empty();
        let ca = name(&paths.ca);
        for block in pem_blocks(&ca, &read(&paths.ca)?)? {
            roots.add(block.contents.into()).map_err(|error| wrong(&ca, error.to_string()))?;
        }
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
        let chain = blocks.into_iter().map(|block| block.contents.into()).collect();
        Ok(Self { shown, chain, key: key.into(), roots })
    }

    /// A certificate that says nothing, for links that never leave this machine.
    pub(crate) fn for_loopback(cluster: &str, node: &NodeName) -> Result<Self, CertificateError> {
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(make)?;
        let uri = format!("{SCHEME}{cluster}/{node}");
        let certificate = params(&uri, DAYS_MAX)?.self_signed(&key).map_err(make)?;
        let der = certificate.der().to_vec();
        Ok(Self {
            shown: shown("the loopback certificate", &der)?,
            chain: vec![der.into()],
            key: rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            roots: rustls::RootCertStore::empty(),
        })
    }
}
