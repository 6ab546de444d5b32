//! The bounds of the jobs, and what is deleted to stay within them.

use std::time::Duration;

use rusqlite::{Transaction, params};

use super::record::{millis, now_ms};

/// The bounds of the jobs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JobLimits {
    /// Maximum number of jobs, finished ones included.
    pub(crate) jobs: usize,
    /// Maximum number of jobs of one client.
    pub(crate) jobs_per_client: usize,
    /// Maximum size of all results, and of the stored requests, in bytes.
    pub(crate) bytes: usize,
    /// Time for which a result is retained.
    pub(crate) retention: Duration,
}

/// What is to be stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Need<'a> {
    pub(super) client: &'a str,
    pub(super) jobs: usize,
    pub(super) bytes: usize,
}

/// The limit without room, and when there may be some.
#[derive(Debug, Clone, Copy)]
pub(super) struct NoRoom {
    /// The option.
    pub(super) limit: &'static str,
    /// Seconds until a result expires that takes the room.
    expiry_s: Option<u64>,
    /// Whether jobs that have not ended take the room.
    busy: bool,
}

impl NoRoom {
    /// Seconds until there may be room, if an unfinished job needs `busy_s`.
    pub(super) fn retry_after_s(self, busy_s: u64) -> u64 {
        let busy = self.busy.then_some(busy_s);
        busy.into_iter().chain(self.expiry_s).min().unwrap_or(busy_s)
    }
}

impl JobLimits {
    /// Maximum size for one client, in bytes.
    pub(crate) fn bytes_per_client(&self) -> usize {
        self.bytes.div_ceil(2)
    }

    /// Deletes results until there is room: expired ones, the client's own, and those of others
    /// that have been received. Results whose webhook has not been notified stay. On `NoRoom` the
    /// transaction should be rolled back.
    pub(super) fn make_room(
        &self,
        transaction: &Transaction<'_>,
        need: Need<'_>,
    ) -> rusqlite::Result<Result<(), NoRoom>> {
        self.purge(transaction)?;
        while let Some((limit, own)) = self.exceeded(transaction, need)? {
            let delete = "
                DELETE FROM jobs WHERE seq = (
                    SELECT seq FROM jobs
                    WHERE finished_ms IS NOT NULL AND webhook IS NULL
                        AND (client = ?1 OR (fetched AND NOT ?2))
                    ORDER BY client = ?1 DESC, fetched DESC, finished_ms, seq LIMIT 1)";
            if transaction.execute(delete, params![need.client, own])? == 0 {
                return self.no_room(transaction, need.client, limit, own).map(Err);
            }
        }
        Ok(Ok(()))
    }

    fn no_room(
        &self,
        transaction: &Transaction<'_>,
        client: &str,
        limit: &'static str,
        own: bool,
    ) -> rusqlite::Result<NoRoom> {
        let held = "
            SELECT min(finished_ms), count(*) > count(finished_ms) FROM jobs
            WHERE client = ?1 OR NOT ?2";
        let left = |finished: i64| finished.saturating_add(millis(self.retention)) - now_ms();
        let seconds = |finished: i64| left(finished).max(0) as u64 / 1000 + 1;
        transaction.query_row(held, params![client, own], |row| {
            let expiry_s = row.get::<_, Option<i64>>(0)?.map(seconds);
            Ok(NoRoom { limit, expiry_s, busy: row.get(1)? })
        })
    }

    /// The limit that would be exceeded, and whether it is the client's own.
    fn exceeded(
        &self,
        transaction: &Transaction<'_>,
        need: Need<'_>,
    ) -> rusqlite::Result<Option<(&'static str, bool)>> {
        let held = "
            SELECT count(*), total(bytes),
                count(*) FILTER (WHERE client = ?1), total(bytes) FILTER (WHERE client = ?1)
            FROM jobs";
        let read = |row: &rusqlite::Row<'_>| -> rusqlite::Result<[f64; 4]> {
            Ok([
                row.get::<_, i64>(0)? as f64,
                row.get(1)?,
                row.get::<_, i64>(2)? as f64,
                row.get(3)?,
            ])
        };
        let [jobs, bytes, own_jobs, own_bytes] =
            transaction.query_row(held, [need.client], read)?;
        let (more_jobs, more_bytes) = (need.jobs as f64, need.bytes as f64);
        let bounds = [
            (own_jobs + more_jobs, self.jobs_per_client, "--max-jobs-per-client", true),
            (jobs + more_jobs, self.jobs, "--max-jobs", false),
            (own_bytes + more_bytes, self.bytes_per_client(), "--max-job-bytes", true),
            (bytes + more_bytes, self.bytes, "--max-job-bytes", false),
        ];
        let exceeded = |(value, bound, ..): &(f64, usize, _, _)| *value > *bound as f64;
        Ok(bounds.into_iter().find(exceeded).map(|(_, _, limit, own)| (limit, own)))
    }

    /// Deletes expired results.
    pub(super) fn purge(&self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        let expired = now_ms().saturating_sub(millis(self.retention));
        transaction.execute("DELETE FROM jobs WHERE finished_ms <= ?1", [expired]).map(drop)
    }
}
