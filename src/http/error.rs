//! Everything that can go wrong with a request, as a status and one JSON shape:
//! `{"error":{"code","message","param"}}`. Short and self-sufficient, since SageMaker passes on
//! no more than the first 2048 characters.

use axum::Json;
use axum::http::header::{CONTENT_LENGTH, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::Failure;
use crate::registry::Refusal;
use crate::request::Invalid;

/// An answer that is not a picture.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// 401.
    #[error("{}", match given {
        true => "the API key is not valid",
        false => "this route needs an API key: send Authorization: Bearer KEY",
    })]
    Key {
        /// Whether there was one.
        given: bool,
    },
    /// 404.
    #[error("no such route; POST a prompt to /invocations")]
    NotFound,
    /// 404: a job that never was, or is no longer kept.
    #[error("no such job; results are kept for a while only")]
    NoJob,
    /// 404: a picture that is no longer kept.
    #[error("no such picture; URLs are good for a while only")]
    NoFile,
    /// 404.
    #[error("the model {0:?} is not served here; GET /v1/models lists what is")]
    NoModel(String),
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
    #[error("too many requests are being served; try again in {retry_after_s} s")]
    Crowded {
        /// Seconds until there should be room.
        retry_after_s: u64,
    },
    /// 404, 409, 507 and 500: a model that is not there.
    #[error(transparent)]
    Model(#[from] Refusal),
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
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Key { .. } => StatusCode::UNAUTHORIZED,
            Self::NotFound | Self::NoJob | Self::NoFile | Self::NoModel(_) => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotAcceptable(_) => StatusCode::NOT_ACCEPTABLE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Crowded { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Invalid(Invalid::Malformed { .. }) => StatusCode::BAD_REQUEST,
            Self::Invalid(Invalid::OutOfRange { .. }) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Encode => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Model(refusal) => match refusal {
                Refusal::Loaded(_) => StatusCode::CONFLICT,
                Refusal::Unknown(_) => StatusCode::NOT_FOUND,
                Refusal::NoRoom(_) => StatusCode::INSUFFICIENT_STORAGE,
                Refusal::Broken(_) => StatusCode::INTERNAL_SERVER_ERROR,
            },
            Self::Failure(failure) => match failure {
                Failure::Absent => StatusCode::NOT_FOUND,
                Failure::Loading | Failure::Stopping => StatusCode::SERVICE_UNAVAILABLE,
                Failure::Full { .. } => StatusCode::TOO_MANY_REQUESTS,
                Failure::Deadline => StatusCode::GATEWAY_TIMEOUT,
                Failure::OutOfMemory => StatusCode::INSUFFICIENT_STORAGE,
                Failure::Spec { .. } => StatusCode::UNPROCESSABLE_ENTITY,
                Failure::Withheld => StatusCode::BAD_REQUEST,
                Failure::DeviceLost | Failure::Model => StatusCode::INTERNAL_SERVER_ERROR,
            },
        }
    }

    /// A word that programs can rely on.
    fn code(&self) -> &'static str {
        match self {
            Self::Key { .. } => "invalid_api_key",
            Self::NotFound | Self::NoJob | Self::NoFile => "not_found",
            Self::NoModel(_) => "model_not_found",
            Self::Method => "method_not_allowed",
            Self::NotAcceptable(_) => "not_acceptable",
            Self::SlowBody => "body_timeout",
            Self::TooLarge(_) => "too_large",
            Self::MediaType(_) => "unsupported_media_type",
            Self::Crowded { .. } => "overloaded",
            Self::Invalid(Invalid::Malformed { .. }) => "malformed",
            Self::Invalid(Invalid::OutOfRange { .. }) => "out_of_range",
            Self::Encode => "encode_failed",
            Self::Model(refusal) => match refusal {
                Refusal::Loaded(_) => "model_loaded",
                Refusal::Unknown(_) => "no_model",
                Refusal::NoRoom(_) => "out_of_memory",
                Refusal::Broken(_) => "model_broken",
            },
            Self::Failure(failure) => match failure {
                Failure::Absent => "no_model",
                Failure::Loading => "loading",
                Failure::Stopping => "shutting_down",
                Failure::Full { .. } => "overloaded",
                Failure::Deadline => "deadline",
                Failure::OutOfMemory => "out_of_memory",
                Failure::Spec { .. } => "out_of_range",
                // OpenAI's word; its clients know it.
                Failure::Withheld => "content_policy_violation",
                Failure::DeviceLost => "device_lost",
                Failure::Model => "model_failed",
            },
        }
    }

    /// When to come back, for those who may.
    fn retry_after_s(&self) -> Option<u64> {
        match self {
            Self::Crowded { retry_after_s } | Self::Failure(Failure::Full { retry_after_s }) => {
                Some(*retry_after_s)
            }
            Self::Failure(Failure::Loading | Failure::Stopping) => Some(1),
            _ => None,
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid(Invalid::Malformed { param, .. }) => param.as_deref(),
            Self::Invalid(Invalid::OutOfRange { param, .. }) => Some(param),
            Self::Failure(Failure::Spec { field, .. }) => Some(field),
            Self::NoModel(_) => Some("model"),
            _ => None,
        }
    }
}

/// The reason of an error, left in the response for the log, the metrics and other dialects.
#[derive(Debug, Clone)]
pub(crate) struct Reason {
    pub(crate) code: &'static str,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
}

impl ApiError {
    /// The error as clients see it.
    pub(crate) fn json(&self) -> Value {
        let message = self.to_string();
        json!({ "error": { "code": self.code(), "message": message, "param": self.param() } })
    }

    pub(crate) fn reason(&self) -> Reason {
        let (code, param) = (self.code(), self.param().map(Into::into));
        Reason { code, message: self.to_string(), param }
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
pub(crate) fn rephrase(
    response: Response,
    describe: impl FnOnce(StatusCode, &Reason) -> Value,
) -> Response {
    let Some(reason) = response.extensions().get::<Reason>() else { return response };
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
