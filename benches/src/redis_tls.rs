//! Redis through TLS: what the links are measured against, with their cipher and mutual certificates.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::peers::seconds_of;

/// How long the server may take to start.
const START_DEADLINE: Duration = Duration::from_secs(10);

type Connection = StreamOwned<ClientConnection, TcpStream>;

/// A server of its own, without persistence.
pub(crate) struct RedisTls {
    address: SocketAddr,
    process: Child,
    client: Arc<ClientConfig>,
    _folder: tempfile::TempDir,
}

impl Drop for RedisTls {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl RedisTls {
    /// Why not, where there is none.
    pub(crate) fn start() -> Result<Self, String> {
        let folder = tempfile::tempdir().unwrap();
        let (certificate, key) = (folder.path().join("server.pem"), folder.path().join("server.key"));
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&certificate, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let path = |path: &Path| path.display().to_string();
        let process = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", "0", "--save", "", "--appendonly", "no"])
            .args(["--tls-port", &address.port().to_string(), "--tls-auth-clients", "yes"])
            .args(["--tls-cert-file", &path(&certificate), "--tls-key-file", &path(&key)])
            .args(["--tls-ca-cert-file", &path(&certificate)])
            .args(["--tls-ciphersuites", "TLS_AES_128_GCM_SHA256", "--tls-protocols", "TLSv1.3"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|_| "there is no redis-server: apt-get install redis-server".to_owned())?;
        let mut server = Self { address, process, client: client(&certificate, &key), _folder: folder };
        let deadline = Instant::now() + START_DEADLINE;
        while TcpStream::connect(server.address).is_err() {
            if server.process.try_wait().unwrap().is_some() {
                return Err("this redis-server was built without TLS".to_owned());
            }
            assert!(Instant::now() < deadline, "redis-server does not answer");
            std::thread::yield_now();
        }
        Ok(server)
    }

    fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        StreamOwned::new(ClientConnection::new(Arc::clone(&self.client), name).unwrap(), stream)
    }

    /// GB/s, and seconds on a processor of both processes for each GB, of `bytes` in objects over so many connections.
    pub(crate) fn round(&self, connections: usize, bytes: usize, object: &[u8]) -> (f64, f64) {
        let each = bytes / object.len() / connections;
        let server = self.process.id().to_string();
        let used = || seconds_of("self") + seconds_of(&server);
        let (began, before) = (Instant::now(), used());
        std::thread::scope(|scope| {
            for n in 0..connections {
                scope.spawn(move || {
                    let mut connection = self.connect();
                    for _ in 0..each {
                        set(&mut connection, n, object);
                    }
                });
            }
        });
        let gigabytes = (each * connections * object.len()) as f64 / 1e9;
        (gigabytes / began.elapsed().as_secs_f64(), (used() - before) / gigabytes)
    }
}

fn client(certificate: &Path, key: &Path) -> Arc<ClientConfig> {
    let certificate = CertificateDer::from_pem_file(certificate).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let cipher_suites = vec![ring::cipher_suite::TLS13_AES_128_GCM_SHA256];
    let provider = CryptoProvider { cipher_suites, ..ring::default_provider() };
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], PrivateKeyDer::from_pem_file(key).unwrap())
        .unwrap();
    Arc::new(config)
}

fn set(connection: &mut Connection, n: usize, object: &[u8]) {
    let key = format!("k{n}");
    let head = format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n", key.len(), object.len());
    connection.write_all(head.as_bytes()).unwrap();
    connection.write_all(object).unwrap();
    connection.write_all(b"\r\n").unwrap();
    connection.flush().unwrap();
    let mut answer = [0; 5];
    connection.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"+OK\r\n");
}
