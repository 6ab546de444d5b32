//! The errors of HTTP requests: status, code and JSON `{"error":{"code","message","param"}}`. They
//! are short, since SageMaker forwards the first 2048 characters only.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use axum::Json;
use axum::http::header::{CONTENT_LENGTH, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use rusqlite::ErrorCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::slots::Limit;
use crate::engine::JobError;
use crate::registry::RegistryError;
use crate::request::{ValidationError, brief, shortened};

/// An error response.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// 401.
    #[error("{}: send Authorization: Bearer KEY, X-Api-Key: KEY, or Authorization: Basic with the \
             key as password", match given {
        true => "the API key is invalid",
        false => "this route requires an API key",
    })]
    Key {
        /// Whether the request has a key.
        given: bool,
    },
    /// 403: a web page of another origin.
    #[error(
        "a web page of another origin sent this request; its Origin must have the host and port \
             of Host or --public-url, or be one of --cors-origin"
    )]
    ForeignOrigin,
    /// 403: a web page that addresses this server by a name that may be another's.
    #[error(
        "a web page sent this request to a host name that is not this server's: Host must be an \
             IP address, localhost, the host of --public-url or one of --allowed-hosts"
    )]
    UnknownHost,
    /// 404.
    #[error("no such route; POST a prompt to /invocations")]
    NotFound,
    /// 404: an unknown or expired job.
    #[error("no such job; it may have expired")]
    NoJob,
    /// 404: an unknown or expired image.
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
    #[error("the request body did not arrive within {0}")]
    SlowBody(
        /// The limit.
        &'static str,
    ),
    /// 400: the client left, or ended its side of the connection.
    #[error("the body ended before its declared length")]
    ClientClosed,
    /// 504: not finished in time.
    #[error("the request was not finished within the timeout of {0}")]
    Deadline(
        /// The option or header.
        &'static str,
    ),
    /// 504: a model that is still being loaded.
    #[error(
        "the model was not loaded within the timeout of {0}; loading goes on, and GET /models \
             lists it when it is ready"
    )]
    StillLoading(
        /// The option or header.
        &'static str,
    ),
    /// 413.
    #[error("the request body is larger than {bytes} bytes, the limit of {limit}")]
    TooLarge {
        /// The limit.
        bytes: usize,
        /// The option that sets it, or the route that has it.
        limit: &'static str,
    },
    /// 415.
    #[error("{0}")]
    MediaType(String),
    /// 429: a limit on all requests together, or on those of the client.
    #[error("{limit}; retry after {retry_after_s} s")]
    Crowded {
        /// The limit.
        limit: Limit,
        /// Estimated seconds until there is room.
        retry_after_s: u64,
    },
    /// 429: the limit on background jobs without room for another.
    #[error(
        "no room for another job within {limit}; retry after {retry_after_s} s, or DELETE jobs"
    )]
    JobLimit {
        /// The option.
        limit: &'static str,
        /// Estimated seconds until there is room.
        retry_after_s: u64,
    },
    /// 507: the result of a job is too large beside the others.
    #[error("the result of {0} bytes has no room within --max-job-bytes; DELETE jobs for room")]
    ResultLimit(usize),
    /// 500: a job that ends the server whenever it is generated.
    #[error("the server ended {0} times while it generated this job")]
    Abandoned(u32),
    /// 409: a job that was accepted for other weights than those of the present model.
    #[error("the model has changed since the job was accepted; submit the request again")]
    ModelChanged,
    /// 507: the database of jobs cannot be written.
    #[error("the server cannot store jobs: {}", storage_reason(.0))]
    Storage(#[from] rusqlite::Error),
    /// 503: of the connections that are reserved for probes.
    #[error("too many connections are open; only health checks are answered on this one")]
    Connections,
    /// 404, 409, 422, 500, 503, 504 and 507: the model is not available.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// 400 and 422.
    #[error(transparent)]
    Validation(#[from] ValidationError),
    /// The engine could not finish the job.
    #[error(transparent)]
    Job(#[from] JobError),
    /// 500: there are no random numbers for an id or a seed.
    #[error("the system provides no random numbers: {0}")]
    Random(getrandom::Error),
    /// 500: the image could not be encoded.
    #[error("the image could not be encoded")]
    Encode,
}

impl ApiError {
    pub(crate) fn status(&self) -> StatusCode {
        self.kind().0
    }

    /// The status, and the code for programs.
    fn kind(&self) -> (StatusCode, &'static str) {
        use JobError as Job;
        use RegistryError as Registry;
        use StatusCode as S;
        match self {
            Self::Key { .. } => (S::UNAUTHORIZED, "invalid_api_key"),
            Self::ForeignOrigin => (S::FORBIDDEN, "origin_not_allowed"),
            Self::UnknownHost => (S::FORBIDDEN, "host_not_allowed"),
            Self::NotFound | Self::NoJob | Self::NoFile => (S::NOT_FOUND, "not_found"),
            Self::NoModel(_) | Self::Registry(Registry::Unknown(_)) => {
                (S::NOT_FOUND, "model_not_found")
            }
            Self::Method => (S::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::NotAcceptable(_) => (S::NOT_ACCEPTABLE, "not_acceptable"),
            Self::SlowBody(_) => (S::REQUEST_TIMEOUT, "body_timeout"),
            Self::TooLarge { .. } => (S::PAYLOAD_TOO_LARGE, "too_large"),
            Self::MediaType(_) => (S::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            Self::Crowded { .. } | Self::JobLimit { .. } | Self::Job(Job::Full { .. }) => {
                (S::TOO_MANY_REQUESTS, "overloaded")
            }
            Self::Connections => (S::SERVICE_UNAVAILABLE, "overloaded"),
            Self::Validation(
                ValidationError::Malformed { .. } | ValidationError::Unknown { .. },
            ) => (S::BAD_REQUEST, "malformed"),
            Self::Validation(ValidationError::OutOfRange { .. }) | Self::Job(Job::Spec { .. }) => {
                (S::UNPROCESSABLE_ENTITY, "out_of_range")
            }
            Self::ResultLimit(_) | Self::Storage(_) => (S::INSUFFICIENT_STORAGE, "storage_full"),
            Self::Abandoned(_) => (S::INTERNAL_SERVER_ERROR, "job_abandoned"),
            Self::ModelChanged => (S::CONFLICT, "model_changed"),
            Self::Random(_) => (S::INTERNAL_SERVER_ERROR, "random_failed"),
            Self::Encode => (S::INTERNAL_SERVER_ERROR, "encode_failed"),
            Self::Registry(Registry::NoRoom(_)) | Self::Job(Job::OutOfMemory | Job::NoRoom) => {
                (S::INSUFFICIENT_STORAGE, "out_of_memory")
            }
            Self::Registry(Registry::Busy { .. }) => (S::SERVICE_UNAVAILABLE, "models_busy"),
            Self::ClientClosed => (S::BAD_REQUEST, "client_closed"),
            Self::Deadline(_)
            | Self::StillLoading(_)
            | Self::Registry(Registry::Deadline)
            | Self::Job(Job::Deadline) => (S::GATEWAY_TIMEOUT, "deadline_exceeded"),
            Self::Registry(Registry::Stopping) => (S::SERVICE_UNAVAILABLE, "shutting_down"),
            Self::Registry(Registry::Loaded(_)) => (S::CONFLICT, "model_loaded"),
            Self::Registry(Registry::Damaged(_)) => (S::UNPROCESSABLE_ENTITY, "model_load_failed"),
            Self::Registry(Registry::Broken(_)) | Self::Job(Job::Unloaded) => {
                (S::INTERNAL_SERVER_ERROR, "model_load_failed")
            }
            Self::Job(Job::Absent) => (S::NOT_FOUND, "model_required"),
            Self::Job(Job::Loading) => (S::SERVICE_UNAVAILABLE, "loading"),
            Self::Job(Job::Stopping) => (S::SERVICE_UNAVAILABLE, "shutting_down"),
            // OpenAI's code, which its clients know.
            Self::Job(Job::Withheld) => (S::BAD_REQUEST, "content_policy_violation"),
            Self::Job(Job::DeviceLost) => (S::INTERNAL_SERVER_ERROR, "device_lost"),
            Self::Job(Job::Model) => (S::INTERNAL_SERVER_ERROR, "model_failed"),
        }
    }

    /// Value of `Retry-After`, in seconds.
    fn retry_after_s(&self) -> Option<u64> {
        match self {
            Self::Crowded { retry_after_s, .. }
            | Self::JobLimit { retry_after_s, .. }
            | Self::Job(JobError::Full { retry_after_s })
            | Self::Registry(RegistryError::Busy { retry_after_s, .. }) => Some(*retry_after_s),
            Self::Connections
            | Self::Job(JobError::Loading | JobError::Stopping)
            | Self::Registry(RegistryError::Stopping) => Some(1),
            _ => None,
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Validation(ValidationError::Malformed { param, .. }) => param.as_deref(),
            Self::Validation(
                ValidationError::OutOfRange { param, .. } | ValidationError::Unknown { param },
            ) => Some(param),
            Self::Job(JobError::Spec { field, .. }) => Some(field),
            Self::NoModel(_) | Self::Registry(RegistryError::Damaged(_)) => Some("model"),
            _ => None,
        }
    }
}

/// What a client may know of an error of the database; the error itself is in the log.
fn storage_reason(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "its disk is full; free some of it, or DELETE jobs",
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen) => "its disk is read-only",
        _ => "its disk cannot be read or written",
    }
}

/// The result of a handler.
pub(crate) type Result<T, E = ApiError> = std::result::Result<T, E>;

/// The details of an error, as an extension of its response: for the log, the metrics and the
/// formats of the other APIs.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(crate) struct ErrorDetail {
    pub(crate) code: Cow<'static, str>,
    pub(crate) message: String,
    #[schemars(required, extend("type" = ["string", "null"]))]
    pub(crate) param: Option<String>,
    /// Whether `param` is a name of ours, which may be logged, not one that the client made up.
    #[serde(skip)]
    pub(crate) is_known: bool,
}

/// How a response ended that is sent while it is produced; unset until then. An extension of the
/// response, for the log and the metrics.
#[derive(Debug, Clone, Default)]
pub(crate) struct StreamEnd(Arc<OnceLock<Result<(), ErrorDetail>>>);

impl StreamEnd {
    /// Sets the end, once.
    pub(crate) fn set(&self, end: Result<()>) {
        let _ = self.0.set(end.map_err(|error| error.reason()));
    }

    pub(crate) fn get(&self) -> Option<&Result<(), ErrorDetail>> {
        self.0.get()
    }
}

/// The body of an error.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(crate) struct ErrorBody {
    pub(crate) error: ErrorDetail,
}

impl ApiError {
    /// The native JSON of the error.
    pub(crate) fn json(&self) -> Value {
        json!(ErrorBody { error: self.reason() })
    }

    pub(crate) fn reason(&self) -> ErrorDetail {
        let (code, message) = (self.kind().1.into(), shortened(&self.to_string()));
        let param = self.param().map(|param| brief(param).into_owned());
        let is_known = !matches!(self, Self::Validation(ValidationError::Unknown { .. }));
        ErrorDetail { code, message, param, is_known }
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

/// Replaces the body of an error by that of another API; other responses are unchanged.
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
