//! Bytes in and out, each checked against its digest.

use std::fmt;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream, Stream, StreamExt};
use reqwest::Method;
use reqwest::header::{ETAG, HeaderMap, RANGE};
use twox_hash::XxHash3_128;
use uuid::Uuid;

use crate::body::PartBody;
use crate::client::{Call, Client, next_chunk};
use crate::digest::{REPR_DIGEST, announced};
use crate::error::ClientError;
use crate::etag::Etag;
use crate::verbs::{Commit, Written};

const OCTETS: &str = "application/octet-stream";
/// Most memory reserved on a server's word alone; the rest grows as bytes arrive.
const RESERVE_MAX: u64 = 64 << 20;

/// What a write demands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Sent again with the same id, a write gets its first answer; minted for each call where absent, and
    /// kept over its retries.
    pub write_id: Option<Uuid>,
    /// The lease that the caller holds.
    pub lease: Option<Uuid>,
    /// The revision that the session must have.
    pub if_match: Option<Etag>,
    /// Stage the bytes for this transaction.
    pub txn: Option<Uuid>,
}

impl WriteOptions {
    /// Writes under this lease.
    #[must_use]
    pub fn leased(lease: Uuid) -> Self {
        Self { lease: Some(lease), ..Self::default() }
    }

    /// Stages for this transaction.
    #[must_use]
    pub fn staged(txn: Uuid) -> Self {
        Self { txn: Some(txn), ..Self::default() }
    }

    /// Adds the headers; the write can then be sent again.
    pub(crate) fn apply<'c>(&self, call: Call<'c>) -> Result<Call<'c>, ClientError> {
        let id = self.write_id.unwrap_or_else(Uuid::now_v7);
        let mut call = call.header("keepwarm-write-id", &id.to_string())?;
        if let Some(lease) = self.lease {
            call = call.header("keepwarm-lease", &lease.to_string())?;
        }
        if let Some(etag) = self.if_match {
            call = call.header("if-match", &etag.to_string())?;
        }
        Ok(call.repeatable())
    }
}

/// Which bytes of a part to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selection {
    /// Bytes from..to; alone.
    pub bytes: Option<(u64, u64)>,
    /// First token, of paged and window parts.
    pub from_token: Option<u64>,
    /// One past the last token.
    pub to_token: Option<u64>,
    /// First and last plane.
    pub planes: Option<(u32, u32)>,
}

impl Client {
    /// Continues a part at `offset` (tokens of paged and window parts, else bytes).
    ///
    /// # Errors
    /// [`ClientError`]; `offset_mismatch` says where the part ends.
    pub async fn append_part(
        &self,
        id: Uuid,
        part: &str,
        offset: u64,
        body: PartBody,
        options: &WriteOptions,
    ) -> Result<Written, ClientError> {
        let call = self.on_session(Method::PATCH, id, &["parts", part]).query("offset", offset);
        self.write(call, body, options).await
    }

    /// Replaces a part; readers see old or new.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put_part(
        &self,
        id: Uuid,
        part: &str,
        body: PartBody,
        options: &WriteOptions,
    ) -> Result<Written, ClientError> {
        self.write(self.on_session(Method::PUT, id, &["parts", part]), body, options).await
    }

    async fn write(
        &self,
        call: Call<'_>,
        body: PartBody,
        options: &WriteOptions,
    ) -> Result<Written, ClientError> {
        let mut call = options.apply(call)?;
        if let Some(txn) = options.txn {
            call = call.query("txn", txn);
        }
        if let Some(digest) = body.digest_header() {
            call = call.header(REPR_DIGEST, &digest)?;
        }
        call.body(OCTETS, body).answer().await
    }

    /// Makes one revision of all staged parts.
    ///
    /// # Errors
    /// [`ClientError`]; `incomplete` names the part and range that is missing.
    pub async fn commit(
        &self,
        id: Uuid,
        commit: &Commit,
        options: &WriteOptions,
    ) -> Result<Written, ClientError> {
        options.apply(self.on_session(Method::POST, id, &["commit"]).json(commit)?)?.answer().await
    }

    /// A part's committed bytes.
    ///
    /// # Errors
    /// [`ClientError`]; `cold` where there are none.
    pub async fn part(&self, id: Uuid, part: &str) -> Result<PartReader, ClientError> {
        self.part_range(id, part, Selection::default()).await
    }

    /// Some of a part's committed bytes.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn part_range(
        &self,
        id: Uuid,
        part: &str,
        which: Selection,
    ) -> Result<PartReader, ClientError> {
        let mut call = self.on_session(Method::GET, id, &["parts", part]);
        let tokens = [("from_token", which.from_token), ("to_token", which.to_token)];
        for (name, value) in tokens {
            if let Some(value) = value {
                call = call.query(name, value);
            }
        }
        if let Some((first, last)) = which.planes {
            call = call.query("planes", format!("{first}-{last}"));
        }
        if let Some((from, to)) = which.bytes {
            if from >= to {
                return Err(ClientError::Usage(format!("bytes {from}..{to}: the range is empty")));
            }
            call = call.header(RANGE.as_str(), &format!("bytes={from}-{}", to - 1))?;
        }
        let response = call.send().await?;
        let url = response.url().to_string();
        let headers = response.headers();
        // RFC 9530: the digest is of the whole representation, which a 206 does not carry.
        let whole = response.status() == reqwest::StatusCode::OK;
        Ok(PartReader {
            etag: etag(headers),
            length: response.content_length(),
            announced: header(headers, REPR_DIGEST).filter(|_| whole).and_then(announced),
            hasher: XxHash3_128::new(),
            chunks: response.bytes_stream().boxed(),
            url,
        })
    }
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

pub(crate) fn etag(headers: &HeaderMap) -> Option<Etag> {
    header(headers, ETAG.as_str())?.parse().ok()
}

/// A part's bytes as they arrive. Where the server announced their digest, the end of the stream is an
/// error if they do not have it: what was read before must not be used then.
pub struct PartReader {
    etag: Option<Etag>,
    length: Option<u64>,
    announced: Option<u128>,
    hasher: XxHash3_128,
    chunks: BoxStream<'static, reqwest::Result<Bytes>>,
    url: String,
}

impl fmt::Debug for PartReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PartReader")
            .field("etag", &self.etag)
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

impl PartReader {
    /// The revision that the bytes are of.
    #[must_use]
    pub const fn etag(&self) -> Option<Etag> {
        self.etag
    }

    /// How many bytes there are in all.
    #[must_use]
    pub const fn length(&self) -> Option<u64> {
        self.length
    }

    /// The next bytes; none at the end, once their digest was checked.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::Digest`] in place of the end.
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        match next_chunk(&self.url, &mut self.chunks).await? {
            Some(chunk) => {
                if self.announced.is_some() {
                    self.hasher.write(&chunk);
                }
                Ok(Some(chunk))
            }
            None => self.check().map(|()| None),
        }
    }

    fn check(&self) -> Result<(), ClientError> {
        match (self.announced, self.hasher.finish_128()) {
            (Some(announced), found) if announced != found => {
                Err(ClientError::Digest { url: self.url.clone(), announced, found })
            }
            _ => Ok(()),
        }
    }

    /// All bytes.
    ///
    /// # Errors
    /// As [`Self::next_chunk`].
    pub async fn bytes(mut self) -> Result<Bytes, ClientError> {
        let reserve = self.length.unwrap_or(0).min(RESERVE_MAX);
        let mut all = BytesMut::with_capacity(usize::try_from(reserve).unwrap_or(0));
        while let Some(chunk) = self.next_chunk().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all.freeze())
    }

    /// The bytes as a stream, which ends with the check of their digest.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, ClientError>> + Send {
        stream::try_unfold(self, |mut reader| async move {
            Ok(reader.next_chunk().await?.map(|chunk| (chunk, reader)))
        })
    }
}
