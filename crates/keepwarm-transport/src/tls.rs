//! Who is trusted: TLS 1.3 alone, both sides with a certificate of the cluster's authority.
//!
//! A certificate is looked up anew for each handshake, so that new files are in force without a restart.

use std::sync::{Arc, PoisonError, RwLock};

use keepwarm_types::NodeName;
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError as Bad, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use crate::certificate::{CertificateError, Identity, TlsPaths, shown};

/// What peers agree to speak.
pub(crate) const ALPN: &[u8] = b"keepwarm/1";

/// Which certificates a node uses.
#[derive(Debug, Clone)]
pub enum TlsMaterial {
    /// These files.
    Files(TlsPaths),
    /// None: only addresses of this machine are bound and dialled, and a peer is who it says.
    LoopbackOnly,
}

/// A node's certificates, and whom it trusts, as of the last reload.
#[derive(Debug)]
pub struct TlsStore {
    cluster: String,
    node: NodeName,
    material: TlsMaterial,
    current: RwLock<Arc<Identity>>,
    provider: Arc<CryptoProvider>,
}

impl TlsStore {
    /// Reads the files.
    ///
    /// # Errors
    /// [`CertificateError`], naming the file: one is missing, no certificate, or another node's.
    pub fn open(cluster: &str, node: &NodeName, material: TlsMaterial) -> Result<Self, CertificateError> {
        let identity = identity(cluster, node, &material)?;
        Ok(Self {
            cluster: cluster.to_owned(),
            node: node.clone(),
            material,
            current: RwLock::new(Arc::new(identity)),
            provider: Arc::new(provider()),
        })
    }

    /// Reads the files again: handshakes from now on use them. What is in force stays where they are wrong.
    ///
    /// # Errors
    /// [`CertificateError`], as [`TlsStore::open`].
    pub fn reload(&self) -> Result<(), CertificateError> {
        let identity = identity(&self.cluster, &self.node, &self.material)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
        Ok(())
    }

    /// What is in force.
    #[must_use]
    pub fn current(&self) -> Arc<Identity> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) const fn loopback_only(&self) -> bool {
        matches!(self.material, TlsMaterial::LoopbackOnly)
    }

    /// SHA-256 of the node's certificate.
    pub(crate) fn fingerprint(&self) -> [u8; 32] {
        let identity = self.current();
        let mut digest = [0; 32];
        if let Some(certificate) = identity.chain.first() {
            let hashed = ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
            let hashed = hashed.tls13().map(|suite| suite.common.hash_provider.hash(certificate));
            if let Some(hashed) = hashed {
                let bytes = hashed.as_ref();
                let length = bytes.len().min(digest.len());
                digest[..length].copy_from_slice(&bytes[..length]);
            }
        }
        digest
    }

    pub(crate) fn client(self: &Arc<Self>) -> Result<rustls::ClientConfig, Error> {
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Trust(Arc::clone(self))))
            .with_client_cert_resolver(Arc::new(Shows(Arc::clone(self))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }

    pub(crate) fn server(self: &Arc<Self>) -> Result<rustls::ServerConfig, Error> {
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(Trust(Arc::clone(self))))
            .with_cert_resolver(Arc::new(Shows(Arc::clone(self))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.max_early_data_size = 0;
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// What is in force, in the form that a handshake takes.
    fn certified(&self) -> Option<Arc<CertifiedKey>> {
        let identity = self.current();
        let key = self.provider.key_provider.load_private_key(identity.key.clone_key());
        match key {
            Ok(key) => Some(Arc::new(CertifiedKey::new(identity.chain.clone(), key))),
            Err(error) => {
                tracing::error!(%error, "this node's key cannot be used: no peer can be reached");
                None
            }
        }
    }

    /// Which node a verified certificate names, if it is of this cluster.
    pub(crate) fn named(&self, certificate: &CertificateDer<'_>) -> Result<NodeName, String> {
        let shown = shown("the peer's certificate", certificate).map_err(|error| error.to_string())?;
        if shown.cluster != self.cluster {
            return Err(format!("its certificate is of cluster '{}', not '{}'", shown.cluster, self.cluster));
        }
        shown.node.ok_or_else(|| "its certificate is an authority's".to_owned())
    }
}

/// ring's algorithms, the fastest cipher of theirs first: AES-256 costs a third more and nobody asked for it.
fn provider() -> CryptoProvider {
    let cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

fn identity(cluster: &str, node: &NodeName, material: &TlsMaterial) -> Result<Identity, CertificateError> {
    let TlsMaterial::Files(paths) = material else { return Identity::for_loopback(cluster, node) };
    let identity = Identity::load(paths)?;
    if identity.shown.cluster != cluster || identity.shown.node.as_ref() != Some(node) {
        let named = identity.shown.node.as_ref().map_or("(an authority)", NodeName::as_str);
        return Err(CertificateError::Wrong {
            what: paths.certificate.display().to_string(),
            detail: format!(
                "it is of node '{named}' in cluster '{}', not of '{node}' in '{cluster}': make one with `keepwarm cert node {node}`",
                identity.shown.cluster
            ),
        });
    }
    Ok(identity)
}

/// What a handshake shows: what is in force by then.
#[derive(Debug)]
struct Shows(Arc<TlsStore>);

impl ResolvesServerCert for Shows {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.certified()
    }
}

impl ResolvesClientCert for Shows {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.certified()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Whose certificates are taken: those of the authorities in force; anybody's where there are no files (loopback).
#[derive(Debug)]
struct Trust(Arc<TlsStore>);

impl Trust {
    fn algorithms(&self) -> WebPkiSupportedAlgorithms {
        self.0.provider.signature_verification_algorithms
    }

    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let parsed = rustls::server::ParsedCertificate::try_from(end_entity)?;
        if self.0.loopback_only() {
            return Ok(());
        }
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.0.current().roots,
            intermediates,
            now,
            self.algorithms().all,
        )
    }

    fn signed(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms())
    }
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // Which node it is stands in its URI, which is compared with the hello.
        self.verify(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::InvalidCertificate(Bad::ApplicationVerificationFailure))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms().supported_schemes()
    }
}

impl ClientCertVerifier for Trust {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::InvalidCertificate(Bad::ApplicationVerificationFailure))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms().supported_schemes()
    }
}
