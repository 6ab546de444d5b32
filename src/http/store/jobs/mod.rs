//! Background jobs, their requests and results: in a directory, where they survive the process, or
//! in memory. Bounded in number, in bytes and in time.

mod database;
mod disk;
mod record;
mod room;
mod sent;
#[cfg(test)]
mod tests;
mod turns;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use axum::body::Bytes;
use axum::http::Response;
use rusqlite::{OptionalExtension as _, Row, params};
use tokio_util::task::AbortOnDropHandle;

use crate::engine::{Client, JobError, JobMonitor};
use crate::http::error::{ApiError, Result};
use database::Database;
pub(crate) use record::{
    EndedJob, JobEnd, JobRecord, NewJob, RemovedJob, StoredRequest, UnfinishedJob,
};
use record::{body, encode, head, is_past, millis, now_ms, response, since};
pub(crate) use room::JobLimits;
use room::Need;
use sent::SentBodies;
use turns::{Turn, Turns};

/// The jobs.
#[derive(Debug)]
pub(crate) struct JobStore {
    database: Database,
    limits: JobLimits,
    durable: bool,
    running: Mutex<HashMap<String, RunningJob>>,
    turns: Turns,
    /// Held by the one job whose end is stored again and again while it cannot be stored.
    again: tokio::sync::Mutex<()>,
    sent: SentBodies,
}

/// A place in a list of jobs, from the newest to the oldest: after the job of this time and ID. The
/// number of the job is not told, since it counts the jobs of all clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cursor {
    created_ms: i64,
    id: String,
}

impl Cursor {
    /// The place after a job.
    pub(crate) fn after(job: &JobRecord) -> Self {
        Self { created_ms: job.created_ms, id: job.id.clone() }
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.created_ms, self.id)
    }
}

impl FromStr for Cursor {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let parts = text.split_once('.');
        let parsed = parts.and_then(|(created, id)| Some((created.parse().ok()?, id.to_owned())));
        let (created_ms, id) = parsed.ok_or("must be the `next` of a page")?;
        Ok(Self { created_ms, id })
    }
}

/// A job of this process that has not ended.
#[derive(Debug)]
struct RunningJob {
    /// None before it is submitted to the engine.
    monitor: Option<JobMonitor>,
    /// Dropping it ends the task, which cancels the images.
    _task: AbortOnDropHandle<()>,
}

impl JobStore {
    /// The jobs of a directory, or of this process only.
    pub(crate) fn open(dir: Option<&Path>, limits: JobLimits) -> anyhow::Result<Self> {
        let (database, durable) = (Database::open(dir)?, dir.is_some());
        let (running, turns, again, sent) = Default::default();
        Ok(Self { database, limits, durable, running, turns, again, sent })
    }

    /// Whether jobs survive the process.
    pub(crate) fn is_durable(&self) -> bool {
        self.durable
    }

    /// Stores a job and returns it, for its task and for its client. It is durable when this
    /// returns. If there is no room, nothing is stored and nothing deleted; `busy_s` is the time
    /// until an unfinished job may end.
    pub(crate) async fn insert(
        &self,
        job: NewJob,
        busy_s: u64,
    ) -> Result<(UnfinishedJob, JobRecord)> {
        let limits = self.limits;
        let (headers, bytes) = (encode(&job.request.headers), job.request.body.len());
        if bytes > limits.bytes_per_client() {
            return Err(ApiError::TooLarge {
                bytes: limits.bytes_per_client(),
                limit: "--max-job-bytes for one client",
            });
        }
        let insert = "
            INSERT INTO jobs (id, client, created_ms, deadline_ms, priority, seed, model,
                fingerprint, webhook, bytes, headers, body)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)";
        // What has expired makes room, even if there is none for this job.
        let _ = self.purge().await;
        self.database
            .store(Some(headers.len() + bytes), move |transaction| {
                let need = Need { client: job.client.name(), jobs: 1, bytes };
                limits.make_room(transaction, need)?.map_err(|full| ApiError::JobLimit {
                    limit: full.limit,
                    retry_after_s: full.retry_after_s(busy_s),
                })?;
                let now = now_ms();
                let row = params![
                    job.id,
                    job.client.name(),
                    now,
                    now.saturating_add(millis(job.timeout)),
                    job.priority.name(),
                    job.seed.cast_signed(),
                    job.model,
                    job.fingerprint,
                    job.webhook,
                    bytes,
                    headers,
                    &job.request.body[..]
                ];
                transaction.execute(insert, row)?;
                Ok(job.accepted(transaction.last_insert_rowid(), now))
            })
            .await
    }

    /// Sets how many processes have begun to generate a job.
    pub(crate) async fn set_begun(&self, id: &str, begun: u32) -> Result<()> {
        let id = id.to_owned();
        let set = "UPDATE jobs SET begun = ?2 WHERE id = ?1 AND begun <> ?2";
        self.database
            .call(move |transaction| Ok(transaction.execute(set, params![id, begun])?))
            .await?;
        Ok(())
    }

    /// Stores the end of a job in place of its request: its response, or that of its error. `None`
    /// if the job was deleted or has ended before: nothing is changed then. A result that comes after
    /// the deadline is refused with [`JobError::Deadline`]: who asked meanwhile was told that the job
    /// has failed.
    pub(crate) async fn finish(&self, id: &str, end: Response<Bytes>) -> Result<Option<EndedJob>> {
        let (id, limits) = (id.to_owned(), self.limits);
        let find = "
            SELECT client, bytes, webhook, created_ms, deadline_ms FROM jobs
            WHERE id = ?1 AND finished_ms IS NULL";
        let finish = "
            UPDATE jobs SET finished_ms = ?2, status = ?3, bytes = ?4, headers = ?5, body = ?6
            WHERE id = ?1";
        // An error is small, and has to be told.
        let is_result = end.status().is_success();
        let bytes = end.body().len();
        let _ = self.purge().await;
        self.database
            .store(is_result.then_some(bytes), move |transaction| {
                let read = |row: &Row<'_>| {
                    let ended = EndedJob { webhook: row.get(2)?, age: since(row.get(3)?) };
                    Ok((row.get(0)?, row.get(1)?, is_past(row.get(4)?), ended))
                };
                let found = transaction.query_row(find, [&id], read).optional()?;
                let Some((client, request, is_late, ended)) = found else { return Ok(None) };
                if is_result && is_late {
                    return Err(JobError::Deadline.into());
                }
                let (client, request): (String, usize) = (client, request);
                let more = bytes.saturating_sub(request);
                if is_result && more > 0 {
                    let need = Need { client: &client, jobs: 0, bytes: more };
                    let room = limits.make_room(transaction, need)?;
                    room.map_err(|_| ApiError::ResultLimit(bytes))?;
                }
                let (status, headers) = (end.status().as_u16(), encode(end.headers()));
                let row = params![id, now_ms(), status, bytes, headers, &end.body()[..]];
                transaction.execute(finish, row)?;
                Ok(Some(ended))
            })
            .await
    }

    /// Reads a job.
    pub(crate) async fn get(&self, id: &str) -> Result<JobRecord> {
        let id = id.to_owned();
        let columns = JobRecord::COLUMNS;
        let select = format!("SELECT {columns} FROM jobs WHERE id = ?1");
        self.read(move |transaction| {
            let job = transaction.query_row(&select, [id], JobRecord::read).optional()?;
            job.ok_or(ApiError::NoJob)
        })
        .await
    }

    /// The jobs of a client from a place in their list on, the newest first.
    pub(crate) async fn list(
        &self,
        client: &Client,
        from: Option<Cursor>,
    ) -> Result<Vec<JobRecord>> {
        let client = client.name().to_owned();
        let (columns, from) = (JobRecord::COLUMNS, from.map(|from| (from.created_ms, from.id)));
        let (created_ms, id) = from.unwrap_or((i64::MAX, String::new()));
        // If the job of the place is gone, those of the same millisecond are listed again.
        let select = format!(
            "SELECT {columns} FROM jobs
             WHERE client = ?1 AND (created_ms, seq) <
                 (?2, coalesce((SELECT seq FROM jobs WHERE id = ?3), 9223372036854775807))
             ORDER BY created_ms DESC, seq DESC"
        );
        self.read(move |transaction| {
            let mut select = transaction.prepare(&select)?;
            let jobs = select.query_map(params![client, created_ms, id], JobRecord::read)?;
            Ok(jobs.collect::<rusqlite::Result<_>>()?)
        })
        .await
    }

    /// The response of a finished job; `None` as long as it has not finished.
    pub(crate) async fn result(&self, id: &str) -> Result<Option<Response<Bytes>>> {
        let (name, sent) = (id.to_owned(), self.sent.clone());
        let read = self.read(move |transaction| {
            let head = head(transaction, &name).optional()?;
            let (Some(status), headers) = head.ok_or(ApiError::NoJob)? else { return Ok(None) };
            let body = sent.get(&name, || body(transaction, &name))?;
            Ok(Some(response(status, headers, body)))
        });
        let Some(response) = read.await? else { return Ok(None) };
        let mark = "UPDATE jobs SET fetched = 1 WHERE id = ?1 AND NOT fetched";
        let id = id.to_owned();
        // A result can be received from a disk that is full.
        let _ = self.database.call(move |transaction| Ok(transaction.execute(mark, [id])?)).await;
        Ok(Some(response))
    }

    /// Cancels and deletes a job; `None` if there is none.
    pub(crate) async fn remove(&self, id: &str) -> Result<Option<RemovedJob>> {
        let name = id.to_owned();
        let delete = "DELETE FROM jobs WHERE id = ?1 RETURNING finished_ms IS NULL, created_ms";
        let read = |row: &Row<'_>| {
            Ok(match row.get(0)? {
                true => RemovedJob::Unfinished(since(row.get(1)?)),
                false => RemovedJob::Ended,
            })
        };
        let removed = self
            .read(move |transaction| Ok(transaction.query_row(delete, [name], read).optional()?))
            .await?;
        self.running().remove(id);
        Ok(removed)
    }

    /// The jobs that have not ended, in the order of acceptance.
    pub(crate) async fn unfinished(&self) -> Result<Vec<UnfinishedJob>> {
        let columns = UnfinishedJob::COLUMNS;
        let select = format!("SELECT {columns} FROM jobs WHERE finished_ms IS NULL ORDER BY seq");
        self.read(move |transaction| {
            let mut select = transaction.prepare(&select)?;
            let jobs = select.query_map([], UnfinishedJob::read)?;
            Ok(jobs.collect::<rusqlite::Result<_>>()?)
        })
        .await
    }

    /// The request of a job that has not ended.
    pub(crate) async fn request(&self, id: &str) -> Result<StoredRequest> {
        let id = id.to_owned();
        self.read(move |transaction| match head(transaction, &id).optional()? {
            Some((None, headers)) => {
                Ok(StoredRequest { headers, body: body(transaction, &id)?.into() })
            }
            _ => Err(ApiError::NoJob),
        })
        .await
    }

    /// The finished jobs whose URL is not notified, and the URL.
    pub(crate) async fn unnotified(&self) -> Result<Vec<(String, String)>> {
        let select = "SELECT id, webhook FROM jobs WHERE finished_ms NOT NULL AND webhook NOT NULL";
        self.read(move |transaction| {
            let mut select = transaction.prepare(select)?;
            let jobs = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            Ok(jobs.collect::<rusqlite::Result<_>>()?)
        })
        .await
    }

    /// Records that the URL of a job is notified, or never will be.
    pub(crate) async fn set_notified(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        let notified = "UPDATE jobs SET webhook = NULL WHERE id = ?1";
        self.database.call(move |transaction| Ok(transaction.execute(notified, [id])?)).await?;
        Ok(())
    }

    /// Number of unfinished and of finished jobs.
    pub(crate) async fn count(&self) -> Result<[i64; 2]> {
        let count = "SELECT count(*), count(finished_ms) FROM jobs";
        self.read(move |transaction| {
            let read = |row: &Row<'_>| Ok((row.get(0)?, row.get(1)?));
            let (all, finished): (i64, i64) = transaction.query_row(count, [], read)?;
            Ok([all - finished, finished])
        })
        .await
    }

    /// Deletes expired results.
    pub(crate) async fn purge(&self) -> Result<()> {
        let limits = self.limits;
        self.database.call(move |transaction| Ok(limits.purge(transaction)?)).await
    }

    /// Reads, without what has expired. What cannot be deleted, because the disk is full, can still
    /// be read.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&rusqlite::Transaction<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let _ = self.purge().await;
        self.database.call(read).await
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, RunningJob>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a job in a task of its own, unless it has one.
    pub(crate) fn spawn(&self, id: String, work: impl Future<Output = ()> + Send + 'static) {
        // The task cannot look for itself before it is here.
        let mut running = self.running();
        if running.contains_key(&id) {
            return;
        }
        let task = AbortOnDropHandle::new(tokio::spawn(work));
        running.insert(id, RunningJob { monitor: None, _task: task });
    }

    /// Sets the view of a job that is submitted to the engine, or no longer is.
    pub(crate) fn watch(&self, id: &str, monitor: Option<JobMonitor>) {
        if let Some(job) = self.running().get_mut(id) {
            job.monitor = monitor;
        }
    }

    /// The view of a job that is submitted to the engine.
    pub(crate) fn monitor(&self, id: &str) -> Option<JobMonitor> {
        self.running().get(id)?.monitor.clone()
    }

    /// Ends the task of a job, which may be the caller's: it ends where it next waits.
    pub(crate) fn end(&self, id: &str) {
        self.running().remove(id);
    }

    /// The turn of a job whose end could not be stored to store it again after a pause: one job tries
    /// for all.
    pub(crate) async fn again(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.again.lock().await
    }

    /// Waits until no job of the client is before this one.
    pub(crate) async fn turn(&self, job: &UnfinishedJob) -> Turn<'_> {
        let UnfinishedJob { client, priority, seq, .. } = job;
        self.turns.wait(client, *priority, *seq).await
    }
}
