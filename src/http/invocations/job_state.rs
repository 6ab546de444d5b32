//! The state of a job as clients and webhooks get it, and its error as a response.

use std::time::Duration;

use axum::body::Bytes;
use axum::http::Response;
use axum::http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::events;
use crate::http::deadline::Timeout;
use crate::http::error::{ApiError, ErrorBody};
use crate::http::state::AppState;
use crate::http::store::{JobEnd, JobRecord, JobStore};

/// `queued`, `running`, `completed` or `failed`.
pub(super) fn name_of(store: &JobStore, job: &JobRecord) -> &'static str {
    let monitor = || store.monitor(&job.id);
    match &job.end {
        Some(JobEnd::Completed) => "completed",
        Some(JobEnd::Failed(_) | JobEnd::Late) => "failed",
        None if monitor().is_some_and(|monitor| monitor.current().started > 0) => "running",
        None => "queued",
    }
}

/// The time for a job that was accepted with this timeout.
pub(super) fn timeout(state: &AppState, timeout: Duration) -> Timeout {
    Timeout::within(timeout, "--job-timeout-ms", state.settings.job_timeout)
}

/// The state of a job as JSON.
pub(super) fn describe(app: &AppState, job: &JobRecord) -> Value {
    let state = name_of(&app.jobs, job);
    let mut description = match (&job.end, app.jobs.monitor(&job.id)) {
        (Some(JobEnd::Completed), _) => json!({}),
        (Some(JobEnd::Failed(error)), _) => serde_json::from_slice(error).unwrap_or(json!({})),
        (Some(JobEnd::Late), _) => late(app, job).json(),
        (None, Some(monitor)) if state == "running" => {
            events::step(monitor.current(), monitor.estimate())
        }
        (None, Some(monitor)) => events::place(monitor.estimate()),
        // It is not in the queue yet.
        (None, None) => json!({ "position": null, "seconds_left": null }),
    };
    description["id"] = job.id.clone().into();
    description["state"] = state.into();
    description["priority"] = job.priority.clone().into();
    description["created"] = (job.created_ms / 1000).into();
    description
}

/// The error of a job whose deadline has passed.
pub(super) fn late(state: &AppState, job: &JobRecord) -> ApiError {
    ApiError::Deadline(timeout(state, job.timeout).limit)
}

/// The response that is stored for an error.
pub(super) fn error_response(error: &ApiError) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(error.json().to_string()));
    *response.status_mut() = error.status();
    let json = axum::http::HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

/// A stored response with the details of its error, if it is one, for the log and the metrics.
pub(super) fn restore_error(mut response: Response<Bytes>) -> Response<Bytes> {
    if !response.status().is_success()
        && let Ok(ErrorBody { error }) = serde_json::from_slice(response.body())
    {
        response.extensions_mut().insert(error);
    }
    response
}
