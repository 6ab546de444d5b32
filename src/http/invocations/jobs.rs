//! Background jobs: `POST /v1/jobs` returns an id at once, by which clients get the state and the
//! result of the job and cancel it. Jobs are in memory, bounded in number and time, and lost with
//! the process. Any client that knows an id can use it; ids are random.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::{body, detect, events};
use crate::engine::JobError;
use crate::http::admission::{self, Admitted};
use crate::http::drawing::ReplyFormat;
use crate::http::error::{ApiError, Result};
use crate::http::ids::random;
use crate::http::state::AppState;
use crate::http::store::{JobRecord, JobStore};
use crate::request::ValidationError;

/// `POST /v1/jobs`: accepts a job, whose body is that of `/invocations`.
pub(crate) async fn create(State(state): State<AppState>, admitted: Admitted) -> Result<Response> {
    let Admitted { headers, body, client, slot, .. } = admitted;
    let timeout = admission::timeout(&headers, state.settings.job_timeout)?;
    let mut invocation = detect::read(&state, &slot, &headers, body, body::read).await?;
    if let ReplyFormat::Events(_) = invocation.drawing.reply {
        return Err(ValidationError::body("a job cannot stream events; poll its state").into());
    }
    let deadline = Instant::now() + timeout;
    let mut ticket = invocation.drawing.submit(&client, deadline)?;
    // A job is bounded by the number of jobs.
    invocation.drawing.slot = None;
    drop(slot);
    let id = format!("{:032x}", random());
    let entry = JobRecord { monitor: state.engine.monitor(&ticket), end: None, task: None };
    let description = describe(&id, &entry);
    if !state.jobs.insert(id.clone(), entry, state.settings.max_jobs) {
        return Err(ApiError::Crowded { retry_after_s: state.engine.retry_after() });
    }
    let (store, name, engine) = (Arc::clone(&state.jobs), id.clone(), state.engine.clone());
    let work = async move {
        loop {
            match ticket.wait().await {
                // Evicted from a full queue for another client: an accepted job is requeued.
                Err(JobError::Full { .. }) => {
                    ticket = invocation.drawing.submit_with_retry(&client, deadline).await?;
                    store.update(&name, |entry| entry.monitor = engine.monitor(&ticket));
                }
                images => return invocation.respond(images?).await,
            }
        }
    };
    let task =
        tokio::spawn(run(Arc::clone(&state.jobs), state.settings.job_retention, id.clone(), work));
    state.jobs.update(&id, |entry| entry.task = Some(AbortOnDropHandle::new(task)));
    let location = [(LOCATION, format!("/v1/jobs/{id}"))];
    Ok((StatusCode::ACCEPTED, location, Json(description)).into_response())
}

/// Does the work, retains the result for `retention`, and deletes the job.
async fn run(
    store: Arc<JobStore>,
    retention: Duration,
    id: String,
    work: impl Future<Output = Result<axum::http::Response<Bytes>>>,
) {
    let result = Arc::new(work.await);
    store.update(&id, |entry| entry.end = Some((Instant::now(), result)));
    tokio::time::sleep(retention).await;
    store.remove(&id);
}

/// The state of a job.
pub(crate) async fn state(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    state.jobs.read(&id, |job| describe(&id, job)).map(Json)
}

/// The response of `/invocations`; 202 and the state while the job has not finished.
pub(crate) async fn result(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Response> {
    let (end, description) = state.jobs.read(&id, |job| (job.end.clone(), describe(&id, job)))?;
    Ok(match end {
        None => (StatusCode::ACCEPTED, Json(description)).into_response(),
        Some((_, end)) => match &*end {
            Ok(response) => response.clone().map(Body::from),
            Err(error) => error.response(),
        },
    })
}

/// Cancels and deletes a job.
pub(crate) async fn delete(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<StatusCode> {
    if state.jobs.remove(&id) { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::NoJob) }
}

fn describe(id: &str, job: &JobRecord) -> Value {
    let estimate = job.monitor.estimate();
    let progress = job.monitor.current();
    let (state, mut description) = match job.end.as_ref().map(|(_, result)| &**result) {
        Some(Ok(_)) => ("completed", json!({})),
        Some(Err(error)) => ("failed", error.json()),
        None if progress.started == 0 => ("queued", events::place(estimate)),
        None => ("running", events::step(progress, estimate)),
    };
    description["id"] = id.into();
    description["state"] = state.into();
    description
}
