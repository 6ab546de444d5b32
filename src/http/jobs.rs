//! Requests that outlive their connection: `POST /v1/jobs` answers at once with an id, under which
//! the state, the result and the end of the job can be had. Everything is in memory, bounded in
//! number and time, and gone with the process. Whoever knows an id may use it; ids are random.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Request};
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::asked::{Answer, Asked};
use super::error::ApiError;
use super::intake::{self, Intake};
use super::{State, accept, body, dialect, events};
use crate::api::Invalid;
use crate::engine::{Failure, Watch};

/// The jobs that are kept.
#[derive(Debug, Default)]
pub(super) struct Store {
    jobs: Mutex<HashMap<String, Entry>>,
}

#[derive(Debug)]
struct Entry {
    watch: Watch,
    /// When it ended, and how.
    end: Option<(Instant, Arc<Result<Answer, ApiError>>)>,
    task: Option<AbortHandle>,
}

/// Forgetting a job ends its task, which withdraws its pictures.
impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Store {
    fn jobs(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a job. When as many are kept as may be, the oldest result makes room; false when
    /// none of them has ended.
    fn insert(&self, id: String, entry: Entry, max: usize) -> bool {
        let mut jobs = self.jobs();
        if jobs.len() >= max {
            let ended = jobs.iter().filter_map(|(id, job)| Some((job.end.as_ref()?.0, id)));
            let Some(oldest) = ended.min().map(|(_, id)| id.clone()) else { return false };
            jobs.remove(&oldest);
        }
        jobs.insert(id, entry);
        true
    }

    fn update(&self, id: &str, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.jobs().get_mut(id) {
            change(entry);
        }
    }

    /// Reads a job.
    fn read<T>(&self, id: &str, read: impl FnOnce(&Entry) -> T) -> Result<T, ApiError> {
        self.jobs().get(id).map(read).ok_or(ApiError::NoJob)
    }

    /// How many jobs are under way and how many have ended.
    pub(super) fn count(&self) -> [usize; 2] {
        let jobs = self.jobs();
        let ended = jobs.values().filter(|job| job.end.is_some()).count();
        [jobs.len() - ended, ended]
    }
}

/// Accepts a job: the body of `/invocations`, whose answer is kept.
pub(super) async fn create(state: State, request: Request) -> Result<Response, ApiError> {
    let Intake { headers, body, client, permit, .. } = intake::take(&state, request).await?;
    let timeout = intake::timeout(&headers, state.settings.job_timeout)?;
    let (fields, speech) = body::read(&headers, &body)?;
    let heard = dialect::hear(&headers, fields, speech, state.settings.limits.max_images)?;
    let asked = Asked::understand(&state, heard, |wish| accept::choose(&headers, wish)).await?;
    if let accept::Reply::Events(_) = asked.reply {
        return Err(Invalid::body("a job has no events; ask for its state").into());
    }
    let deadline = Instant::now() + timeout;
    let mut ticket = asked.submit(&client, Some(deadline))?;
    drop(permit);
    let id = format!("{:032x}", super::random());
    let entry = Entry { watch: state.engine.watch(&ticket), end: None, task: None };
    let description = describe(&id, &entry);
    if !state.jobs.insert(id.clone(), entry, state.settings.max_jobs) {
        return Err(ApiError::Crowded { retry_after_s: state.engine.retry_after() });
    }
    let (store, name, engine) = (Arc::clone(&state.jobs), id.clone(), state.engine.clone());
    let work = async move {
        loop {
            match ticket.wait().await {
                // It made room for another client; it has been accepted and so comes again.
                Err(Failure::Full { .. }) => {
                    ticket = asked.submit_patiently(&client, deadline).await?;
                    store.update(&name, |entry| entry.watch = engine.watch(&ticket));
                }
                pictures => return asked.answer(pictures?).await,
            }
        }
    };
    let task =
        tokio::spawn(keep(Arc::clone(&state.jobs), state.settings.job_retention, id.clone(), work));
    state.jobs.update(&id, |entry| entry.task = Some(task.abort_handle()));
    let location = [(LOCATION, format!("/v1/jobs/{id}"))];
    Ok((StatusCode::ACCEPTED, location, Json(description)).into_response())
}

/// Does the work, keeps the result for its time, and forgets it.
async fn keep(
    store: Arc<Store>,
    retention: Duration,
    id: String,
    work: impl Future<Output = Result<Answer, ApiError>>,
) {
    let result = Arc::new(work.await);
    store.update(&id, |entry| entry.end = Some((Instant::now(), result)));
    tokio::time::sleep(retention).await;
    store.jobs().remove(&id);
}

/// The state of a job.
pub(super) async fn state(state: State, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    state.jobs.read(&id, |job| describe(&id, job)).map(Json)
}

/// What `/invocations` would have answered; 202 and the state while there is nothing.
pub(super) async fn result(state: State, Path(id): Path<String>) -> Result<Response, ApiError> {
    let (end, description) = state.jobs.read(&id, |job| (job.end.clone(), describe(&id, job)))?;
    Ok(match end {
        None => (StatusCode::ACCEPTED, Json(description)).into_response(),
        Some((_, end)) => match &*end {
            Ok(answer) => answer.clone().into_response(),
            Err(error) => error.response(),
        },
    })
}

/// Ends a job and forgets it.
pub(super) async fn delete(state: State, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    state.jobs.jobs().remove(&id).map(|_| StatusCode::NO_CONTENT).ok_or(ApiError::NoJob)
}

fn describe(id: &str, job: &Entry) -> Value {
    let outlook = job.watch.outlook();
    let progress = job.watch.made();
    let state = match &job.end {
        Some((_, end)) if end.is_ok() => "done",
        Some(_) => "failed",
        None if progress.begun == 0 => "queued",
        None => "running",
    };
    let mut description = match state {
        "queued" => events::place(outlook),
        "running" => events::step(progress, outlook),
        _ => json!({}),
    };
    if let Some((_, end)) = &job.end
        && let Err(error) = &**end
    {
        description = error.json();
    }
    description["id"] = id.into();
    description["state"] = state.into();
    description
}
