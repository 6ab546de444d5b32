//! Everything that can go wrong with a request, as a status and one JSON shape:
//! `{"error":{"code","message","param"}}`. Short and self-sufficient, since SageMaker passes on
//! no more than the first 2048 characters.

use axum::Json;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::api::Invalid;
use crate::engine::Failure;

/// An answer that is not a picture.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// 404.
    #[error("no such route; POST a prompt to /invocations")]
    NotFound,
    /// 405.
    #[error("this route does not take that method")]
    Method,
    /// 406.
    #[error("{0}")]
    NotAcceptable(String),
    /// 408.
    #[error("the body did not arrive in time")]
    SlowBody,
    /// 413.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// 415.
    #[error("{0}")]
    MediaType(String),
    /// 429: as many requests are being served as may.
    #[error("too many requests are being served")]
    Crowded,
    /// 400 and 422.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// What the engine could not do.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// 500: a picture that cannot be put into a file.
    #[error("the picture could not be encoded")]
    Encode,
}

impl ApiError {
    fn status(&self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotAcceptable(_) => StatusCode::NOT_ACCEPTABLE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Crowded => StatusCode::TOO_MANY_REQUESTS,
            Self::Invalid(Invalid::Malformed { .. }) => StatusCode::BAD_REQUEST,
            Self::Invalid(Invalid::OutOfRange { .. }) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Encode => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Failure(failure) => match failure {
                Failure::Loading | Failure::Stopping => StatusCode::SERVICE_UNAVAILABLE,
                Failure::Full => StatusCode::TOO_MANY_REQUESTS,
                Failure::Deadline => StatusCode::GATEWAY_TIMEOUT,
                Failure::OutOfMemory => StatusCode::INSUFFICIENT_STORAGE,
                Failure::Spec { .. } => StatusCode::UNPROCESSABLE_ENTITY,
                Failure::DeviceLost | Failure::Model => StatusCode::INTERNAL_SERVER_ERROR,
            },
        }
    }

    /// A word that programs can rely on.
    fn code(&self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Method => "method_not_allowed",
            Self::NotAcceptable(_) => "not_acceptable",
            Self::SlowBody => "body_timeout",
            Self::TooLarge(_) => "too_large",
            Self::MediaType(_) => "unsupported_media_type",
            Self::Crowded => "overloaded",
            Self::Invalid(Invalid::Malformed { .. }) => "malformed",
            Self::Invalid(Invalid::OutOfRange { .. }) => "out_of_range",
            Self::Encode => "encode_failed",
            Self::Failure(failure) => match failure {
                Failure::Loading => "loading",
                Failure::Stopping => "shutting_down",
                Failure::Full => "overloaded",
                Failure::Deadline => "deadline",
                Failure::OutOfMemory => "out_of_memory",
                Failure::Spec { .. } => "out_of_range",
                Failure::DeviceLost => "device_lost",
                Failure::Model => "model_failed",
            },
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid(Invalid::Malformed { param, .. }) => param.as_deref(),
            Self::Invalid(Invalid::OutOfRange { param, .. }) => Some(param),
            Self::Failure(Failure::Spec { field, .. }) => Some(field),
            _ => None,
        }
    }
}

/// The reason of an error, left in the response for the one log line of the request.
#[derive(Debug, Clone)]
pub(super) struct Reason(pub(super) String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let message = self.to_string();
        let body = json!({
            "error": { "code": self.code(), "message": message, "param": self.param() }
        });
        let status = self.status();
        let mut response = (status, Json(body)).into_response();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response.extensions_mut().insert(Reason(message));
        response
    }
}
