//! HTTP: routes, authentication, DTOs, errors to status, OpenAPI, metrics.
