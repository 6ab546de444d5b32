//! Errors in OpenAI's format.

use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

use crate::http::error::{self, ErrorDetail};

/// Header by which OpenAI's clients decide whether to retry.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Renders the errors of handlers and middleware in OpenAI's format.
pub(crate) fn errors(response: Response) -> Response {
    let mut response = error::map_error_body(response, describe);
    // As there, whatever is wrong with a field.
    if response.status() == StatusCode::UNPROCESSABLE_ENTITY {
        *response.status_mut() = StatusCode::BAD_REQUEST;
    }
    // A failed image fails again. Only a full queue and a loading server are worth a retry.
    let status = response.status();
    if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    response
}

pub(crate) fn describe(status: StatusCode, reason: &ErrorDetail) -> Value {
    let kind = match status.as_u16() {
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    let ErrorDetail { code, message, param, .. } = reason;
    json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
}
