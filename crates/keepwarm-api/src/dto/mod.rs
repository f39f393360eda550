//! What goes over HTTP, apart from the domain's own types; the conversions are explicit.

pub(crate) mod cluster;
pub(crate) mod layout;
pub(crate) mod request;
pub(crate) mod session;
pub(crate) mod time;
