//! Peer links: bytes between the nodes of a cluster. The only crate that names quinn and rustls.
//!
//! [`Transport`] is what a node needs of them: ordered small frames, calls with an answer, and streams of bytes, each
//! with a class that says how urgent it is. [`quic`] carries them over QUIC with mutual TLS 1.3; [`memory`] is the
//! reference that it is compared with: both pass the same tests.
//!
//! A peer is up once it has said hello over a connection whose certificate is its own, named its cluster, process and
//! versions, and was answered. From then on its link has a version, the newest that both ends speak: links, streams and
//! calls tell it to whoever encodes. What cannot be sent now is refused at once; nothing waits without a bound.
//!
//! - `link`: the trait and what comes in. `stream`, `pipe`: byte streams, and those in memory. `certificate`: making and reading certificates.
//! - `quic`: endpoint, dialling, connections. `tls`: who is trusted. `socket`: large datagrams. `sockets`: whose network.

pub mod certificate;
mod link;
pub mod memory;
mod pipe;
pub mod quic;
mod socket;
mod sockets;
mod stream;
mod tls;

pub use keepwarm_wire::Frame;
pub use link::{Class, Incoming, LinkError, PeerId, PeerStatus, Responder, Transport};
pub use sockets::{Bind, Datagrams, Sockets};
pub use stream::{ByteStream, ReadHalf, WriteHalf};
