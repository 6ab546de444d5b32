//! Errors in AUTOMATIC1111's words.

use axum::http::StatusCode;
use axum::response::Response;
use serde_json::json;

use crate::http::error::{self, Reason};

/// Puts errors into AUTOMATIC1111's words, whoever made them.
pub(crate) async fn errors(response: Response) -> Response {
    error::rephrase(
        response,
        |_: StatusCode, Reason { code, message, .. }| json!({ "error": code, "detail": message, "body": "", "errors": message }),
    )
}
