//! Background jobs: `POST /v1/jobs` returns an id at once, by which clients get the state and the
//! result of the job and cancel it. Any client that knows an id can use it; ids are random. Only a
//! client with an API key can list jobs, its own.

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{ACCEPT, CONTENT_TYPE, LOCATION};
use axum::response::{IntoResponse as _, Response};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::accept::SAGEMAKER_ACCEPT;
use super::job_request::{self, JobOptions};
use super::job_runner;
use super::job_state::{describe, name_of, restore_error};
use crate::engine::JobError;
use crate::http::admission::{self, Admitted, ClientId};
use crate::http::drawing::ReplyFormat;
use crate::http::error::{ApiError, Result};
use crate::http::extract::{PathName, QueryFields};
use crate::http::ids::random;
use crate::http::links::Links;
use crate::http::state::AppState;
use crate::http::store::{NewJob, StoredRequest};
use crate::request::ValidationError;

/// Number of jobs on a page, unless the client asks for another.
const PAGE: usize = 20;

/// Maximum number of jobs on a page.
const MAX_PAGE: usize = 100;

/// `POST /v1/jobs`: accepts a job, whose body is that of `/invocations` with a priority and a
/// webhook.
pub(crate) async fn create(
    State(state): State<AppState>,
    links: Links,
    admitted: Admitted,
) -> Result<Response> {
    let Admitted { mut headers, body, client, mut slot, .. } = admitted;
    let timeout = admission::timeout(&headers, state.settings.job_timeout)?;
    let body = Bytes::from(body);
    // Without a data directory the request is never read again.
    let (kept, room) = match state.jobs.is_durable() {
        true => (body.clone(), slot.take_body()),
        false => (Bytes::new(), None),
    };
    let (invocation, options) = job_request::read(&state, &mut slot, &headers, body).await?;
    let JobOptions { priority, webhook } = options;
    if let ReplyFormat::Events(_) = invocation.drawing.reply {
        return Err(ValidationError::body("a job cannot stream events; poll its state").into());
    }
    let read = [CONTENT_TYPE.as_str(), ACCEPT.as_str(), SAGEMAKER_ACCEPT];
    let others = headers.keys().filter(|name| !read.contains(&name.as_str())).cloned();
    for name in others.collect::<Vec<_>>() {
        headers.remove(name);
    }
    let request = StoredRequest { headers, body: kept };
    let id = format!("{:032x}", random()?);
    let seed = invocation.drawing.specs.first().map_or(0, |spec| spec.seed);
    let model = invocation.drawing.model.name.clone();
    let job = NewJob { id, client, timeout, priority, seed, model, webhook, request };
    // A client that disconnects does not leave a job that is stored and never generated.
    let accept = tokio::spawn(async move {
        let busy_s = state.engine.retry_after();
        let (job, record) = state.jobs.insert(job, busy_s).await?;
        // Until here the job was not counted among the jobs, and its body was in memory.
        drop((slot, room));
        let id = job.id.clone();
        job_runner::spawn(&state, job, Some(invocation));
        let description = describe(&state.jobs, &record);
        let location = [(LOCATION, format!("{}/v1/jobs/{id}", links.prefix()))];
        Ok((StatusCode::ACCEPTED, location, Json(description)).into_response())
    });
    // It ends otherwise only with the process.
    accept.await.map_err(|_| JobError::Stopping)?
}

/// The query of a list.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ListQuery {
    /// Number of jobs on a page, 1 to 100. Default: 20.
    limit: Option<String>,
    /// The `next` of the page before.
    cursor: Option<String>,
    /// `queued`, `running`, `completed` or `failed`: only jobs in this state.
    state: Option<String>,
}

/// `GET /v1/jobs`: the jobs of the client's key, the newest first. Without keys nobody's jobs are
/// listed, since an id is all that protects them.
pub(crate) async fn list(
    State(state): State<AppState>,
    ClientId(client): ClientId,
    QueryFields(query): QueryFields<ListQuery>,
) -> Result<Json<Value>> {
    let limit = query.limit.map_or(Some(PAGE), |text| text.parse().ok());
    let limit = limit
        .filter(|limit| (1..=MAX_PAGE).contains(limit))
        .ok_or_else(|| ValidationError::range("limit", format!("must be from 1 to {MAX_PAGE}")))?;
    let before = query.cursor.map_or(Some(i64::MAX), |text| text.parse().ok());
    let before = before
        .ok_or_else(|| ValidationError::malformed("cursor", "must be `next` of an earlier list"))?;
    let wanted = query.state.as_deref();
    let states = ["queued", "running", "completed", "failed"];
    if wanted.is_some_and(|state| !states.contains(&state)) {
        let reason = "must be queued, running, completed or failed";
        return Err(ValidationError::range("state", reason).into());
    }
    if state.settings.access.api_keys.is_empty() {
        return Ok(Json(json!({ "jobs": [], "next": null })));
    }
    let mut jobs = state.jobs.list(&client, before).await?;
    jobs.retain(|job| wanted.is_none_or(|wanted| name_of(&state.jobs, job) == wanted));
    let more = jobs.len() > limit;
    jobs.truncate(limit);
    let next = jobs.last().filter(|_| more).map(|last| last.seq.to_string());
    let jobs: Vec<_> = jobs.iter().map(|job| describe(&state.jobs, job)).collect();
    Ok(Json(json!({ "jobs": jobs, "next": next })))
}

/// The state of a job.
pub(crate) async fn state(
    State(state): State<AppState>,
    PathName(id): PathName,
) -> Result<Json<Value>> {
    let job = state.jobs.get(&id).await?;
    Ok(Json(describe(&state.jobs, &job)))
}

/// The response of `/invocations`; 202 and the state while the job has not finished.
pub(crate) async fn result(
    State(state): State<AppState>,
    PathName(id): PathName,
) -> Result<Response> {
    match state.jobs.result(&id).await? {
        Some(response) => Ok(restore_error(response).map(Body::from)),
        None => {
            let description = describe(&state.jobs, &state.jobs.get(&id).await?);
            Ok((StatusCode::ACCEPTED, Json(description)).into_response())
        }
    }
}

/// Cancels and deletes a job.
pub(crate) async fn delete(
    State(state): State<AppState>,
    PathName(id): PathName,
) -> Result<StatusCode> {
    if state.jobs.remove(&id).await? { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::NoJob) }
}
