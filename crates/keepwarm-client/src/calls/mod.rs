//! The calls, one file for each group of them.

mod admin;
mod archive;
mod chat;
mod parts;
mod running;
mod sessions;

pub use admin::Readiness;
pub use archive::ArchiveReader;
pub use chat::ChatStream;
pub use parts::{PartReader, Selection, WriteOptions};
pub use sessions::SessionFilter;

use reqwest::Method;
use uuid::Uuid;

use crate::client::{Call, Client};

impl Client {
    /// A call on a session: `GET /v1/sessions/ID/REST…`.
    fn on_session(&self, method: Method, id: Uuid, rest: &[&str]) -> Call<'_> {
        let text = id.to_string();
        let segments: Vec<_> =
            ["v1", "sessions", text.as_str()].into_iter().chain(rest.iter().copied()).collect();
        self.call(method, &segments).about(id)
    }
}
