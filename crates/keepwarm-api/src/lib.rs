//! HTTP: routes, authentication, DTOs, errors to status, OpenAPI, metrics. The only crate that knows HTTP.
//!
//! Handlers translate: a request into a call of the node's [`Handle`](keepwarm_node::Handle) or the engine's
//! [`ChatBackend`](keepwarm_engine::chat::ChatBackend), an answer into JSON or a stream of bytes, an error
//! into a problem document. They decide nothing.

mod auth;
mod dto;
mod extract;
mod linger;
mod openai;
mod openapi;
mod problem;
mod relay;
mod routes;
mod serve;
mod stall;

pub use auth::{Caller, Credentials};
pub use openapi::document;
pub use problem::{CODES, Problem};
pub use relay::serve_relayed;
pub use routes::{ApiState, router};
pub use serve::{CONNECTIONS_MAX, SLOW_READER, serve};
