//! The OpenAPI document, made from the code of the routes.

use axum::Json;
use utoipa::OpenApi;

use crate::openai;
use crate::routes::{admin, parts, running, sessions};

#[derive(OpenApi)]
#[openapi(
    info(title = "keepwarm", description = "Sessions for GPU inference: named, durable, owned, movable."),
    paths(
        sessions::create,
        sessions::list,
        sessions::show,
        sessions::delete,
        sessions::transcript,
        sessions::matching,
        sessions::truncate,
        sessions::fork,
        sessions::explain,
        sessions::export,
        sessions::import,
        parts::append,
        parts::replace,
        parts::read,
        parts::commit,
        running::checkpoint,
        running::activate,
        running::renew,
        running::release,
        running::prefetch,
        running::demote,
        running::migrate,
        admin::purge,
        admin::cluster,
        admin::shards,
        admin::gpus,
        admin::node,
        admin::events,
        admin::healthz,
        admin::readyz,
        admin::metrics,
        openai::models,
        openai::chat,
        openai::complete,
        serve_document,
    )
)]
struct Document;

/// The document.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "probes", responses((status = 200, description = "OpenAPI 3.1")))]
pub(crate) async fn serve_document() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}
