//! The request of a job: a body of `/invocations` with two fields of its own. It is read when the
//! job is accepted, and again when it is continued after a restart.

use axum::body::Bytes;
use axum::http::HeaderMap;
use schemars::JsonSchema;
use serde::Deserialize;

use super::render::Invocation;
use super::{body, detect};
use crate::engine::Priority;
use crate::http::admission::RequestSlot;
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::request::ValidationError;

/// The fields of a job, beside those of the request.
#[derive(Deserialize, JsonSchema)]
struct JobFields {
    /// `low`, `normal` or `high`: the order among the client's own jobs. Default: normal.
    priority: Option<String>,
    /// URL that gets a POST of the job's state when it has ended.
    webhook: Option<String>,
}

/// A job with native fields, for its description.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(super) struct JobRequest {
    #[schemars(flatten)]
    draw: detect::Native,
    #[schemars(flatten)]
    job: JobFields,
}

/// The values of the fields of a job.
#[derive(Debug)]
pub(super) struct JobOptions {
    pub(super) priority: Priority,
    pub(super) webhook: Option<String>,
}

/// Reads and validates the request of a job.
pub(super) async fn read(
    state: &AppState,
    slot: &mut RequestSlot,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<(Invocation, JobOptions)> {
    let limits = state.settings.limits;
    let fields = move |headers: &HeaderMap, body: &[u8]| {
        let (mut fields, kind) = body::read(headers, body)?;
        let job = fields.read::<JobFields>(&limits)?;
        Ok(((fields, kind), job))
    };
    let (mut invocation, job) = detect::read_with(state, slot, headers, body, fields).await?;
    let JobFields { priority, webhook } = job;
    let priority = priority.map(|name| name.parse()).transpose();
    let priority = priority.map_err(|reason: &str| ValidationError::range("priority", reason));
    let priority: Priority = priority?.unwrap_or_default();
    // A job is bounded by the number of jobs, not by that of requests in flight.
    (invocation.drawing.slot, invocation.drawing.priority) = (None, priority);
    Ok((invocation, JobOptions { priority, webhook }))
}
