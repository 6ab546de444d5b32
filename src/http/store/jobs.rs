//! Background jobs and their results: bounded in number, and lost with the process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::Bytes;
use axum::http::Response;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::engine::JobMonitor;
use crate::http::error::{ApiError, Result};

/// The retained jobs.
#[derive(Debug, Default)]
pub(crate) struct JobStore {
    jobs: Mutex<HashMap<String, JobRecord>>,
}

/// The response of a finished job, or its error.
pub(crate) type JobResult = Arc<Result<Response<Bytes>>>;

#[derive(Debug)]
pub(crate) struct JobRecord {
    pub(crate) monitor: JobMonitor,
    /// When it finished, and its result.
    pub(crate) end: Option<(Instant, JobResult)>,
    /// Dropping the record ends the task, which cancels the images.
    pub(crate) task: Option<AbortOnDropHandle<()>>,
}

impl JobStore {
    fn jobs(&self) -> MutexGuard<'_, HashMap<String, JobRecord>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job. If the number of jobs is at `max`, the oldest finished job is evicted; false if
    /// none has finished.
    pub(crate) fn insert(&self, id: String, entry: JobRecord, max: usize) -> bool {
        let mut jobs = self.jobs();
        if jobs.len() >= max {
            let ended = jobs.iter().filter_map(|(id, job)| Some((job.end.as_ref()?.0, id)));
            let Some(oldest) = ended.min().map(|(_, id)| id.clone()) else { return false };
            jobs.remove(&oldest);
        }
        jobs.insert(id, entry);
        true
    }

    pub(crate) fn update(&self, id: &str, change: impl FnOnce(&mut JobRecord)) {
        if let Some(entry) = self.jobs().get_mut(id) {
            change(entry);
        }
    }

    /// Reads a job.
    pub(crate) fn read<T>(&self, id: &str, read: impl FnOnce(&JobRecord) -> T) -> Result<T> {
        self.jobs().get(id).map(read).ok_or(ApiError::NoJob)
    }

    /// Deletes a job; false if there is none.
    pub(crate) fn remove(&self, id: &str) -> bool {
        self.jobs().remove(id).is_some()
    }

    /// Number of running and of finished jobs.
    pub(crate) fn count(&self) -> [usize; 2] {
        let jobs = self.jobs();
        let ended = jobs.values().filter(|job| job.end.is_some()).count();
        [jobs.len() - ended, ended]
    }
}
