//! Whole sessions as archives.

use std::fmt;

use bytes::{Bytes, BytesMut};
use futures::stream::{BoxStream, StreamExt};
use reqwest::Method;
use uuid::Uuid;

use crate::body::PartBody;
use crate::client::{Client, next_chunk};
use crate::error::ClientError;
use crate::session::Session;

const ARCHIVE: &str = "application/vnd.keepwarm.archive";

impl Client {
    /// A self-describing archive of a session: layout, manifest, transcript, blocks, checksums.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn export(&self, id: Uuid) -> Result<ArchiveReader, ClientError> {
        let response = self.on_session(Method::GET, id, &["export"]).send().await?;
        Ok(ArchiveReader {
            url: response.url().to_string(),
            length: response.content_length(),
            chunks: response.bytes_stream().boxed(),
        })
    }

    /// Takes an archive as a new session, under `id` where one is given. A torn or changed archive is
    /// refused as a whole.
    ///
    /// # Errors
    /// [`ClientError`]; `corrupt` where a checksum does not match.
    pub async fn import(&self, archive: PartBody, id: Option<Uuid>) -> Result<Session, ClientError> {
        let mut call = self.call(Method::POST, &["v1", "sessions", "import"]);
        if let Some(id) = id {
            call = call.query("id", id).about(id);
        }
        call.body(ARCHIVE, archive).answer().await
    }
}

/// An archive as it arrives.
pub struct ArchiveReader {
    url: String,
    length: Option<u64>,
    chunks: BoxStream<'static, reqwest::Result<Bytes>>,
}

impl fmt::Debug for ArchiveReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArchiveReader").field("length", &self.length).finish_non_exhaustive()
    }
}

impl ArchiveReader {
    /// How many bytes there are in all, where the server says.
    #[must_use]
    pub const fn length(&self) -> Option<u64> {
        self.length
    }

    /// The next bytes; none at the end.
    ///
    /// # Errors
    /// [`ClientError`], also for an archive that ends before its length.
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        next_chunk(&self.url, &mut self.chunks).await
    }

    /// All bytes.
    ///
    /// # Errors
    /// As [`Self::next_chunk`].
    pub async fn bytes(mut self) -> Result<Bytes, ClientError> {
        let mut all = BytesMut::new();
        while let Some(chunk) = self.next_chunk().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all.freeze())
    }
}
