//! Bytes on their way to the server.

use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{BoxStream, Stream, StreamExt};

use crate::digest;

type Chunks = BoxStream<'static, io::Result<Bytes>>;

/// The bytes of a part or of an archive: whole in memory, or streamed.
///
/// Bytes in memory and streams that can be made anew are sent again where a retry is safe; a stream that can
/// be had once is sent once.
pub struct PartBody(Kind);

enum Kind {
    Whole(Bytes),
    Again { length: u64, make: Arc<dyn Fn() -> Chunks + Send + Sync> },
    Once { length: Option<u64>, stream: Option<Chunks> },
}

impl PartBody {
    /// Bytes that `make` yields in chunks, `length` in all; called once for each time that they are sent.
    pub fn repeatable<F, S>(length: u64, make: F) -> Self
    where
        F: Fn() -> S + Send + Sync + 'static,
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        Self(Kind::Again { length, make: Arc::new(move || make().boxed()) })
    }

    /// Bytes that can be had once; `length` where it is known.
    pub fn once(length: Option<u64>, stream: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Self {
        Self(Kind::Once { length, stream: Some(stream.boxed()) })
    }

    /// How many bytes there are, where that is known.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        match &self.0 {
            Kind::Whole(bytes) => Some(bytes.len() as u64),
            Kind::Again { length, .. } => Some(*length),
            Kind::Once { length, .. } => *length,
        }
    }

    /// The header for its digest, where that costs no second pass over a stream.
    pub(crate) fn digest_header(&self) -> Option<String> {
        match &self.0 {
            Kind::Whole(bytes) => Some(digest::header_value(digest::of(bytes))),
            Kind::Again { .. } | Kind::Once { .. } => None,
        }
    }

    /// Whether [`Self::take`] will give the bytes (again).
    pub(crate) fn can_send(&self) -> bool {
        !matches!(&self.0, Kind::Once { stream: None, .. })
    }

    /// The bytes for one request; none where they were sent already and cannot be had again.
    pub(crate) fn take(&mut self) -> Option<reqwest::Body> {
        match &mut self.0 {
            Kind::Whole(bytes) => Some(bytes.clone().into()),
            Kind::Again { make, .. } => Some(reqwest::Body::wrap_stream(make())),
            Kind::Once { stream, .. } => stream.take().map(reqwest::Body::wrap_stream),
        }
    }
}

impl fmt::Debug for PartBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PartBody").field("length", &self.length()).finish_non_exhaustive()
    }
}

impl From<Bytes> for PartBody {
    fn from(bytes: Bytes) -> Self {
        Self(Kind::Whole(bytes))
    }
}

impl From<Vec<u8>> for PartBody {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Kind::Whole(bytes.into()))
    }
}
