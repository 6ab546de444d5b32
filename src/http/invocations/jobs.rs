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
use sd_models::ModelInfo;
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::{Instrument as _, info_span};

use super::accept::SAGEMAKER_ACCEPT;
use super::job_request::{self, JobOptions};
use super::job_state::{describe, late, name_of, restore_error};
use super::{job_runner, webhook};
use crate::engine::JobError;
use crate::http::admission::{Admitted, ClientId};
use crate::http::deadline::Timeout;
use crate::http::drawing::ReplyFormat;
use crate::http::error::{ApiError, Result};
use crate::http::extract::{PathName, QueryFields};
use crate::http::ids::random;
use crate::http::links::Links;
use crate::http::state::AppState;
use crate::http::store::{Cursor, JobEnd, NewJob, RemovedJob, StoredRequest};
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
    let timeout = Timeout::of(&headers, "--job-timeout-ms", state.settings.job_timeout)?.time;
    let body = Bytes::from(body);
    // Without a data directory the request is never read again.
    let (kept, room) = match state.jobs.is_durable() {
        true => (body.clone(), slot.take_body()),
        false => (Bytes::new(), None),
    };
    let (invocation, options) = job_request::read(&state, &mut slot, &headers, body).await?;
    let JobOptions { priority, webhook } = options;
    if let Some(url) = &webhook {
        let checked = webhook::check(url, &state.settings.webhook_hosts);
        checked.map_err(|reason| ValidationError::range("webhook", reason))?;
    }
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
    let ModelInfo { name, fingerprint, .. } = &*invocation.drawing.model;
    let (model, fingerprint) = (name.clone(), fingerprint.clone());
    let job = NewJob { id, client, timeout, priority, seed, model, fingerprint, webhook, request };
    // A client that disconnects does not leave a job that is stored and never generated.
    let accept = async move {
        let busy_s = state.engine.retry_after();
        let (job, record) = state.jobs.insert(job, busy_s).await?;
        // Until here the job was not counted among the jobs, and its body was in memory.
        drop((slot, room));
        let id = job.id.clone();
        // What is stored need not be held as pixels until its turn.
        let stored = state.jobs.is_durable() && invocation.drawing.has_inputs();
        job_runner::spawn(&state, job, (!stored).then_some(invocation));
        let description = describe(&state, &record);
        let location = [(LOCATION, format!("{}/v1/jobs/{id}", links.prefix()))];
        Ok((StatusCode::ACCEPTED, location, Json(description)).into_response())
    };
    let accepted = tokio::spawn(accept.in_current_span());
    // It ends otherwise only with the process.
    accepted.await.map_err(|_| JobError::Stopping)?
}

/// The query of a list.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ListQuery {
    /// Number of jobs on a page. Default: 20.
    #[schemars(extend("minimum" = 1, "maximum" = MAX_PAGE))]
    limit: Option<usize>,
    /// The `next` of the page before.
    cursor: Option<String>,
    /// Only jobs in this state.
    #[schemars(extend("enum" = ["queued", "running", "completed", "failed", null]))]
    state: Option<String>,
}

/// `GET /v1/jobs`: the jobs of the client's key, the newest first. Without keys nobody's jobs are
/// listed, since an id is all that protects them.
pub(crate) async fn list(
    State(state): State<AppState>,
    ClientId(client): ClientId,
    QueryFields(query): QueryFields<ListQuery>,
) -> Result<Json<Value>> {
    let limit = query.limit.unwrap_or(PAGE);
    let from = query.cursor.map(|cursor| cursor.parse()).transpose();
    let from = from.map_err(|reason: &str| ValidationError::malformed("cursor", reason))?;
    let wanted = query.state.as_deref();
    if state.settings.access.api_keys.is_empty() {
        let warning = "jobs are listed by API key, and this server has none (--api-key)";
        return Ok(Json(json!({ "jobs": [], "next": null, "warnings": [warning] })));
    }
    let mut jobs = state.jobs.list(&client, from).await?;
    jobs.retain(|job| wanted.is_none_or(|wanted| name_of(&state.jobs, job) == wanted));
    let more = jobs.len() > limit;
    jobs.truncate(limit);
    let next = jobs.last().filter(|_| more).map(|last| Cursor::after(last).to_string());
    let jobs: Vec<_> = jobs.iter().map(|job| describe(&state, job)).collect();
    Ok(Json(json!({ "jobs": jobs, "next": next })))
}

/// The state of a job.
pub(crate) async fn state(
    State(state): State<AppState>,
    PathName(id): PathName,
) -> Result<Json<Value>> {
    let job = state.jobs.get(&id).await?;
    Ok(Json(describe(&state, &job)))
}

/// The response of `/invocations`; 202 and the state while the job has not finished.
pub(crate) async fn result(
    State(state): State<AppState>,
    PathName(id): PathName,
) -> Result<Response> {
    match state.jobs.result(&id).await? {
        Some(response) => Ok(restore_error(response).map(Body::from)),
        None => {
            let job = state.jobs.get(&id).await?;
            if job.end == Some(JobEnd::Late) {
                return Err(late(&state, &job));
            }
            let description = describe(&state, &job);
            Ok((StatusCode::ACCEPTED, Json(description)).into_response())
        }
    }
}

/// Cancels and deletes a job.
pub(crate) async fn delete(
    State(state): State<AppState>,
    PathName(id): PathName,
) -> Result<StatusCode> {
    // A client that disconnects does not leave images of a deleted job to be generated.
    let remove = async move {
        let removed = state.jobs.remove(&id).await?;
        if let Some(RemovedJob::Unfinished(age)) = removed {
            let _inside = info_span!("job", id).entered();
            job_runner::note_end(&state, "cancelled", None, age);
        }
        removed.map(|_| StatusCode::NO_CONTENT).ok_or(ApiError::NoJob)
    };
    let removed = tokio::spawn(remove.in_current_span());
    // It ends otherwise only with the process.
    removed.await.map_err(|_| JobError::Stopping)?
}
