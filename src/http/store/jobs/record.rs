//! The rows of the database: jobs, their requests and their results.

use std::time::{Duration, SystemTime};

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use rusqlite::{Row, Transaction};

use crate::engine::{Client, Priority};

/// A job to be accepted.
#[derive(Debug, Clone)]
pub(crate) struct NewJob {
    pub(crate) id: String,
    pub(crate) client: Client,
    /// Time until it fails, from now on.
    pub(crate) timeout: Duration,
    pub(crate) priority: Priority,
    /// The seed of its first image.
    pub(crate) seed: u64,
    /// The name of the model that generates it.
    pub(crate) model: String,
    /// The fingerprint of that model.
    pub(crate) fingerprint: String,
    /// The URL to notify of its end.
    pub(crate) webhook: Option<String>,
    /// The request, if the store is durable.
    pub(crate) request: StoredRequest,
}

/// The parts of a request by which it is read again after a restart.
#[derive(Debug, Clone, Default)]
pub(crate) struct StoredRequest {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// A job that has not ended.
#[derive(Debug, Clone)]
pub(crate) struct UnfinishedJob {
    /// Number of the job, in the order of acceptance.
    pub(crate) seq: i64,
    pub(crate) id: String,
    pub(crate) client: Client,
    /// Time until it fails; zero if that has passed.
    pub(crate) left: Duration,
    /// The same, when it was accepted.
    pub(crate) timeout: Duration,
    pub(crate) priority: Priority,
    pub(crate) seed: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: String,
    /// How many processes have begun to generate it.
    pub(crate) begun: u32,
}

/// What clients see of a job.
#[derive(Debug, Clone)]
pub(crate) struct JobRecord {
    pub(crate) id: String,
    /// When it was accepted, in milliseconds since 1970.
    pub(crate) created_ms: i64,
    /// Time until it fails, from then on.
    pub(crate) timeout: Duration,
    pub(crate) priority: String,
    /// Whether and how it has ended.
    pub(crate) end: Option<JobEnd>,
}

/// The end of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum JobEnd {
    Completed,
    /// The body of its error.
    Failed(Vec<u8>),
    /// Its deadline has passed. It has failed, whether or not that could be stored.
    Late,
}

/// A job that has just ended.
#[derive(Debug)]
pub(crate) struct EndedJob {
    /// The URL to notify.
    pub(crate) webhook: Option<String>,
    /// Time since it was accepted.
    pub(crate) age: Duration,
}

/// A job that was deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RemovedJob {
    /// It had ended.
    Ended,
    /// It had not; the time since it was accepted.
    Unfinished(Duration),
}

impl NewJob {
    /// The job, once it is stored under this number.
    pub(super) fn accepted(self, seq: i64, created_ms: i64) -> (UnfinishedJob, JobRecord) {
        let Self { id, client, timeout, priority, seed, model, fingerprint, .. } = self;
        let record = JobRecord {
            id: id.clone(),
            created_ms,
            timeout,
            priority: priority.name().to_owned(),
            end: None,
        };
        let (left, begun) = (timeout, 0);
        let job = UnfinishedJob {
            seq,
            id,
            client,
            left,
            timeout,
            priority,
            seed,
            model,
            fingerprint,
            begun,
        };
        (job, record)
    }
}

impl UnfinishedJob {
    pub(super) const COLUMNS: &str = "seq, id, client, created_ms, deadline_ms, priority, seed, \
                                      model, fingerprint, begun";

    pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let deadline: i64 = row.get("deadline_ms")?;
        Ok(Self {
            seq: row.get("seq")?,
            id: row.get("id")?,
            client: Client::named(&row.get::<_, String>("client")?),
            left: between(now_ms(), deadline),
            timeout: between(row.get("created_ms")?, deadline),
            priority: row.get::<_, String>("priority")?.parse().unwrap_or_default(),
            seed: row.get::<_, i64>("seed")?.cast_unsigned(),
            model: row.get("model")?,
            fingerprint: row.get("fingerprint")?,
            begun: row.get("begun")?,
        })
    }
}

impl JobRecord {
    pub(super) const COLUMNS: &str = "id, created_ms, deadline_ms, priority, status, \
                                      CASE WHEN status >= 400 THEN body END AS error";

    pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let status: Option<u16> = row.get("status")?;
        let error: Option<Vec<u8>> = row.get("error")?;
        let (created_ms, deadline) = (row.get("created_ms")?, row.get("deadline_ms")?);
        let end = match (status, error) {
            (Some(_), Some(error)) => Some(JobEnd::Failed(error)),
            (Some(_), None) => Some(JobEnd::Completed),
            (None, _) => is_past(deadline).then_some(JobEnd::Late),
        };
        Ok(Self {
            id: row.get("id")?,
            created_ms,
            timeout: between(created_ms, deadline),
            priority: row.get("priority")?,
            end,
        })
    }
}

/// The headers of a job's request; once it has ended, the status and the headers of its result.
pub(super) fn head(
    transaction: &Transaction<'_>,
    id: &str,
) -> rusqlite::Result<(Option<u16>, HeaderMap)> {
    let read = |row: &Row<'_>| Ok((row.get(0)?, decode(&row.get::<_, Vec<u8>>(1)?)));
    transaction.query_row("SELECT status, headers FROM jobs WHERE id = ?1", [id], read)
}

/// The body of a job's request; once it has ended, that of its result.
pub(super) fn body(transaction: &Transaction<'_>, id: &str) -> rusqlite::Result<Vec<u8>> {
    transaction.query_row("SELECT body FROM jobs WHERE id = ?1", [id], |row| row.get(0))
}

/// A response from its parts.
pub(super) fn response(status: u16, headers: HeaderMap, body: Bytes) -> Response<Bytes> {
    let mut response = Response::new(body);
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    *response.headers_mut() = headers;
    response
}

/// Headers as lines of `name: value`. Values contain no line ends.
pub(super) fn encode(headers: &HeaderMap) -> Vec<u8> {
    let line = |(name, value): (&HeaderName, &HeaderValue)| {
        [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\n"].concat()
    };
    headers.iter().flat_map(line).collect()
}

fn decode(lines: &[u8]) -> HeaderMap {
    let header = |line: &[u8]| {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let value = line.get(colon + 2..)?;
        Some((line[..colon].try_into().ok()?, HeaderValue::from_bytes(value).ok()?))
    };
    lines.split(|byte| *byte == b'\n').filter_map(header).collect()
}

/// The time, in milliseconds since 1970.
pub(super) fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    millis(now)
}

/// The time since then, in milliseconds since 1970.
pub(super) fn since(then_ms: i64) -> Duration {
    between(then_ms, now_ms())
}

/// Whether a deadline has passed.
pub(super) fn is_past(deadline_ms: i64) -> bool {
    deadline_ms <= now_ms()
}

/// The time from one to another, in milliseconds since 1970; zero if that is earlier.
fn between(from_ms: i64, to_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(to_ms.saturating_sub(from_ms)).unwrap_or(0))
}

pub(super) fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
