//! Jobs from their acceptance to their end. A job of a data directory that is interrupted, by the
//! end of the process or of its model thread, is begun anew by the next process. So each accepted
//! job has one end: completed, or failed with the reason.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::Response;
use sd_models::Spec;
use tokio::time::{Instant, sleep};
use tracing::{Instrument as _, info, info_span, warn};

use super::job_state::{error_response, timeout};
use super::render::Invocation;
use super::{job_request, webhook};
use crate::engine::{EngineState, GeneratedImage, JobError, Ticket};
use crate::http::admission::RequestSlot;
use crate::http::deadline::Deadline;
use crate::http::error::{ApiError, Result};
use crate::http::state::{AppState, model_of};
use crate::http::store::{EndedJob, StoredRequest, UnfinishedJob};

/// Number of processes that begin to generate a job before it fails: it may be what ends them.
const MAX_BEGUN: u32 = 5;

/// Interval at which the end of a job is stored again if the disk is full, at first.
const STORE_INTERVAL: Duration = Duration::from_secs(1);

/// The same, at most.
const MAX_STORE_INTERVAL: Duration = Duration::from_secs(60);

/// Continues the jobs of earlier processes.
pub(crate) async fn resume(state: AppState) {
    let (unfinished, unnotified) = loop {
        match (state.jobs.unfinished().await, state.jobs.unnotified().await) {
            (Ok(unfinished), Ok(unnotified)) => break (unfinished, unnotified),
            // The error is in the log.
            _ => sleep(STORE_INTERVAL).await,
        }
    };
    if !unfinished.is_empty() {
        info!(jobs = unfinished.len(), "continuing the jobs of the data directory");
    }
    for job in unfinished {
        spawn(&state, job, None);
    }
    for (id, url) in unnotified {
        tokio::spawn(webhook::deliver(state.clone(), id, url));
    }
}

/// Runs a job in a task of its own. Without `parsed`, its request is read from the store.
pub(super) fn spawn(state: &AppState, job: UnfinishedJob, parsed: Option<Invocation>) {
    let (id, span) = (job.id.clone(), info_span!("job", id = job.id));
    state.jobs.spawn(id, run(state.clone(), job, parsed).instrument(span));
}

async fn run(state: AppState, job: UnfinishedJob, parsed: Option<Invocation>) {
    let durable = state.jobs.is_durable();
    let result = tokio::select! {
        biased;
        () = state.engine.draining(), if durable => {
            // It did not end this process.
            let _ = state.jobs.set_begun(&job.id, job.begun).await;
            return;
        }
        result = generate(&state, &job, parsed) => result,
    };
    let is_lost = match &result {
        Err(ApiError::Job(JobError::Stopping | JobError::DeviceLost)) => true,
        // Another job of the model thread may have ended it.
        Err(ApiError::Job(JobError::Model)) => matches!(state.engine.state(), EngineState::Dead(_)),
        _ => false,
    };
    if !(durable && is_lost) {
        finish(&state, &job, result).await;
    }
}

/// The response of a job.
async fn generate(
    state: &AppState,
    job: &UnfinishedJob,
    mut parsed: Option<Invocation>,
) -> Result<Response<Bytes>> {
    if job.begun >= MAX_BEGUN {
        return Err(ApiError::Abandoned(job.begun));
    }
    let timeout = timeout(state, job.timeout);
    let deadline = Deadline { at: Instant::now() + job.left, limit: timeout.limit };
    if job.left.is_zero() {
        return Err(deadline.missed());
    }
    loop {
        let submit = async {
            let _turn = state.jobs.turn(job).await;
            let invocation = match parsed.take() {
                Some(invocation) => invocation,
                None => load(state, job, deadline).await?,
            };
            let ticket = invocation.drawing.submit_with_retry(&job.client, deadline).await?;
            Ok::<_, ApiError>((invocation, ticket))
        };
        let (invocation, ticket) = deadline.wait(submit).await??;
        state.jobs.watch(&job.id, Some(invocation.drawing.monitor(&ticket)));
        match wait(state, job, ticket).await {
            // Evicted from a full queue for another client.
            Err(JobError::Full { .. }) => {
                state.jobs.watch(&job.id, None);
                parsed = Some(invocation);
            }
            Err(error) => return Err(invocation.drawing.failed(error, deadline)),
            Ok(images) => return invocation.respond(images).await,
        }
    }
}

/// Waits for the images, and counts the beginning of their generation.
async fn wait(
    state: &AppState,
    job: &UnfinishedJob,
    ticket: Ticket,
) -> Result<Vec<GeneratedImage>, JobError> {
    let mut progress = ticket.progress();
    let count = async {
        let begins = progress.wait_for(|progress| progress.started > 0).await.is_ok();
        if begins && state.jobs.is_durable() {
            // Without a count the job is begun once more often.
            let _ = state.jobs.set_begun(&job.id, job.begun + 1).await;
        }
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        biased;
        images = ticket.wait() => images,
        never = count => match never {},
    }
}

/// Reads and validates the request of a job again, once its model is loaded.
async fn load(state: &AppState, job: &UnfinishedJob, deadline: Deadline) -> Result<Invocation> {
    // If it cannot be loaded, the next lines have the error.
    let _ = state.engine.ready().await;
    let state = &match model_of(&state.engine)? {
        Some(model) if model.name == job.model => state.clone(),
        default => match state.choose(&job.model, deadline).await {
            Err(ApiError::NoModel(_)) if default.is_some() => return Err(ApiError::ModelChanged),
            chosen => chosen?,
        },
    };
    let model = state.engine.model()?;
    if (&model.name, &model.fingerprint) != (&job.model, &job.fingerprint) {
        return Err(ApiError::ModelChanged);
    }
    let mut slot = RequestSlot::wait(state, deadline).await;
    let StoredRequest { headers, body } = state.jobs.request(&job.id).await?;
    let (mut invocation, _) = job_request::read(state, &mut slot, &headers, body).await?;
    // A random seed is the one that was drawn when the job was accepted.
    let specs = &mut invocation.drawing.specs;
    if let Some(first) = specs.first().cloned() {
        let first = Spec { seed: job.seed, ..first };
        specs.iter_mut().zip(0..).for_each(|(spec, k)| spec.set_number(&first, k));
    }
    Ok(invocation)
}

/// Stores the end of a job. If the result cannot be stored, the job fails for that reason; as long
/// as not even that can be stored, it has not ended before its deadline. Then one job tries for all,
/// and the others when it has succeeded.
async fn finish(state: &AppState, job: &UnfinishedJob, mut result: Result<Response<Bytes>>) {
    let id = &*job.id;
    let deadline = timeout(state, job.timeout).after(Instant::now());
    let mut pause = STORE_INTERVAL;
    let mut again = None;
    let (ended, code) = loop {
        let (end, code) = match result {
            Ok(response) => (response, None),
            Err(error) => (error_response(&error), Some(error.reason().code)),
        };
        match state.jobs.finish(id, end).await {
            Ok(ended) => break (ended, code),
            Err(error) => result = Err(deadline.name(error)),
        }
        match &again {
            _ if code.is_none() => {}
            None => again = Some(state.jobs.again().await),
            Some(_) => {
                sleep(pause).await;
                pause = (2 * pause).min(MAX_STORE_INTERVAL);
            }
        }
    };
    drop(again);
    // Otherwise it was deleted, which is in the log.
    if let Some(EndedJob { webhook, age }) = ended {
        let outcome = if code.is_none() { "completed" } else { "failed" };
        note_end(state, outcome, code.as_deref(), age);
        if let Some(url) = webhook {
            tokio::spawn(webhook::deliver(state.clone(), id.to_owned(), url));
        }
    }
    state.jobs.end(id);
}

/// Counts and logs the end of a job: `completed`, `failed` or `cancelled`, and the code of its
/// error. `age` is the time since it was accepted.
pub(super) fn note_end(state: &AppState, outcome: &str, code: Option<&str>, age: Duration) {
    state.engine.metrics().jobs_ended.with([outcome]).inc();
    let duration_ms = age.as_millis() as u64;
    match code {
        None => info!(outcome, duration_ms, "job ended"),
        Some(code) => warn!(outcome, code, duration_ms, "job ended"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use clap::Parser as _;
    use tokio::runtime::Handle;
    use tokio::task::{JoinSet, spawn_blocking};

    use super::*;
    use crate::engine::{DeviceScheduler, Engine, EngineConfig};
    use crate::http::HttpConfig;
    use crate::http::store::{JobEnd, JobStore};

    #[derive(clap::Parser)]
    struct Options {
        #[command(flatten)]
        engine: EngineConfig,
        #[command(flatten)]
        http: HttpConfig,
    }

    /// Sets it when the store's thread has answered what it was asked before. Beside a blocking task
    /// the paused clock stands still, which else would run ahead of that thread.
    async fn set_read_only(state: &AppState, is_read_only: bool) {
        let (state, runtime) = (state.clone(), Handle::current());
        let set = move || runtime.block_on(state.jobs.set_read_only(is_read_only));
        spawn_blocking(set).await.expect("it is set");
    }

    #[tokio::test(start_paused = true)]
    async fn while_nothing_can_be_stored_one_job_tries_for_all() -> Result<()> {
        const JOBS: usize = 20;
        let dir = tempfile::tempdir().expect("a directory");
        let asked = Arc::new(AtomicUsize::new(0));
        let (store, jobs) = JobStore::with_jobs(dir.path(), JOBS, Arc::clone(&asked)).await?;
        let Options { engine, http } = Options::parse_from(["serve"]);
        let engine = Engine::absent(&DeviceScheduler::default(), engine);
        let state = AppState::new(engine.into(), http, store);
        set_read_only(&state, true).await;
        let before = asked.load(Ordering::Relaxed);
        let mut ends = JoinSet::new();
        for job in jobs.clone() {
            let state = state.clone();
            ends.spawn(async move { finish(&state, &job, Err(ApiError::Abandoned(5))).await });
        }
        for _ in 0..600 {
            set_read_only(&state, true).await;
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(ends.len(), JOBS, "none has ended");
        // Each tries once. Then one does: 1, 3, 7, 15, 31, 63 s later, and every minute.
        let attempts = (asked.load(Ordering::Relaxed) - before) / 2;
        assert!((JOBS + 10..JOBS + 20).contains(&attempts), "{attempts} attempts");
        set_read_only(&state, false).await;
        sleep(MAX_STORE_INTERVAL + STORE_INTERVAL).await;
        while ends.join_next().await.is_some() {}
        for job in jobs {
            let end = state.jobs.get(&job.id).await?.end;
            assert!(matches!(end, Some(JobEnd::Failed(_))), "{end:?}");
        }
        Ok(())
    }
}
