//! Errors in AUTOMATIC1111's format.

use axum::http::StatusCode;
use axum::response::Response;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;

use crate::http::error::{self, ErrorDetail};

/// Renders the errors of handlers and middleware in AUTOMATIC1111's format.
pub(crate) async fn errors(response: Response) -> Response {
    error::map_error_body(response, |_: StatusCode, ErrorDetail { code, message, .. }| {
        json!(A1111Error { error: code, detail: message, body: "", errors: message })
    })
}

/// The body of an error.
#[derive(Serialize, JsonSchema)]
pub(crate) struct A1111Error<'a> {
    error: &'a str,
    detail: &'a str,
    body: &'a str,
    errors: &'a str,
}
