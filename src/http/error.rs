//! Everything that can go wrong with a request, as a status and one JSON shape:
//! `{"error":{"code","message","param"}}`. Short and self-sufficient, since SageMaker passes on
//! no more than the first 2048 characters.

use axum::Json;
use axum::http::header::{CONTENT_LENGTH, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::JobError;
use crate::registry::RegistryError;
use crate::request::ValidationError;

/// An answer that is not a picture.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// 401.
    #[error("{}", match given {
        true => "the API key is invalid",
        false => "this route requires an API key: send Authorization: Bearer KEY",
    })]
    Key {
        /// Whether there was one.
        given: bool,
    },
    /// 404.
    #[error("no such route; POST a prompt to /invocations")]
    NotFound,
    /// 404: a job that never was, or is no longer kept.
    #[error("no such job; it may have expired")]
    NoJob,
    /// 404: a picture that is no longer kept.
    #[error("no such image; it may have expired")]
    NoFile,
    /// 404.
    #[error("the model {0:?} does not exist; GET /v1/models lists the available models")]
    NoModel(String),
    /// 405.
    #[error("this route does not support this method")]
    Method,
    /// 406.
    #[error("{0}")]
    NotAcceptable(String),
    /// 408.
    #[error("the request body did not arrive within the request's timeout")]
    SlowBody,
    /// 413.
    #[error("the request body is larger than {0} bytes")]
    TooLarge(usize),
    /// 415.
    #[error("{0}")]
    MediaType(String),
    /// 429: as many requests are being served as may.
    #[error("too many requests are in flight; retry after {retry_after_s} s")]
    Crowded {
        /// Seconds until there should be room.
        retry_after_s: u64,
    },
    /// 404, 409, 507 and 500: a model that is not there.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// 400 and 422.
    #[error(transparent)]
    Validation(#[from] ValidationError),
    /// What the engine could not do.
    #[error(transparent)]
    Job(#[from] JobError),
    /// 500: a picture that cannot be put into a file.
    #[error("the image could not be encoded")]
    Encode,
}

impl ApiError {
    pub(crate) fn status(&self) -> StatusCode {
        self.kind().0
    }

    /// The status, and the code that programs can rely on.
    fn kind(&self) -> (StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::Key { .. } => (S::UNAUTHORIZED, "invalid_api_key"),
            Self::NotFound | Self::NoJob | Self::NoFile => (S::NOT_FOUND, "not_found"),
            Self::NoModel(_) => (S::NOT_FOUND, "model_not_found"),
            Self::Method => (S::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::NotAcceptable(_) => (S::NOT_ACCEPTABLE, "not_acceptable"),
            Self::SlowBody => (S::REQUEST_TIMEOUT, "body_timeout"),
            Self::TooLarge(_) => (S::PAYLOAD_TOO_LARGE, "too_large"),
            Self::MediaType(_) => (S::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            Self::Crowded { .. } => (S::TOO_MANY_REQUESTS, "overloaded"),
            Self::Validation(ValidationError::Malformed { .. }) => (S::BAD_REQUEST, "malformed"),
            Self::Validation(ValidationError::OutOfRange { .. }) => {
                (S::UNPROCESSABLE_ENTITY, "out_of_range")
            }
            Self::Encode => (S::INTERNAL_SERVER_ERROR, "encode_failed"),
            Self::Registry(error) => match error {
                RegistryError::Loaded(_) => (S::CONFLICT, "model_loaded"),
                RegistryError::Unknown(_) => (S::NOT_FOUND, "model_not_found"),
                RegistryError::NoRoom(_) => (S::INSUFFICIENT_STORAGE, "out_of_memory"),
                RegistryError::Broken(_) => (S::INTERNAL_SERVER_ERROR, "model_load_failed"),
            },
            Self::Job(error) => match error {
                JobError::Absent => (S::NOT_FOUND, "model_required"),
                JobError::Loading => (S::SERVICE_UNAVAILABLE, "loading"),
                JobError::Stopping => (S::SERVICE_UNAVAILABLE, "shutting_down"),
                JobError::Full { .. } => (S::TOO_MANY_REQUESTS, "overloaded"),
                JobError::Deadline => (S::GATEWAY_TIMEOUT, "deadline_exceeded"),
                JobError::OutOfMemory => (S::INSUFFICIENT_STORAGE, "out_of_memory"),
                JobError::Spec { .. } => (S::UNPROCESSABLE_ENTITY, "out_of_range"),
                // OpenAI's code, which its clients know.
                JobError::Withheld => (S::BAD_REQUEST, "content_policy_violation"),
                JobError::DeviceLost => (S::INTERNAL_SERVER_ERROR, "device_lost"),
                JobError::Model => (S::INTERNAL_SERVER_ERROR, "model_failed"),
            },
        }
    }

    /// When to come back, for those who may.
    fn retry_after_s(&self) -> Option<u64> {
        match self {
            Self::Crowded { retry_after_s } | Self::Job(JobError::Full { retry_after_s }) => {
                Some(*retry_after_s)
            }
            Self::Job(JobError::Loading | JobError::Stopping) => Some(1),
            _ => None,
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Validation(ValidationError::Malformed { param, .. }) => param.as_deref(),
            Self::Validation(ValidationError::OutOfRange { param, .. }) => Some(param),
            Self::Job(JobError::Spec { field, .. }) => Some(field),
            Self::NoModel(_) => Some("model"),
            _ => None,
        }
    }
}

/// The reason of an error, left in the response for the log, the metrics and other dialects.
#[derive(Debug, Clone)]
pub(crate) struct ErrorDetail {
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
}

impl ApiError {
    /// The error as clients see it.
    pub(crate) fn json(&self) -> Value {
        let message = self.to_string();
        json!({ "error": { "code": self.kind().1, "message": message, "param": self.param() } })
    }

    pub(crate) fn reason(&self) -> ErrorDetail {
        let (code, param) = (self.kind().1, self.param().map(Into::into));
        ErrorDetail { code, message: self.to_string(), param }
    }

    pub(crate) fn response(&self) -> Response {
        let mut response = (self.status(), Json(self.json())).into_response();
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self.reason());
        response
    }
}

/// Puts an error into the words of another dialect; other responses pass as they are.
pub(crate) fn map_error_body(
    response: Response,
    describe: impl FnOnce(StatusCode, &ErrorDetail) -> Value,
) -> Response {
    let Some(reason) = response.extensions().get::<ErrorDetail>() else { return response };
    let body = describe(response.status(), reason).to_string();
    let (mut head, _) = response.into_parts();
    head.headers.remove(CONTENT_LENGTH);
    Response::from_parts(head, body.into())
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.response()
    }
}
