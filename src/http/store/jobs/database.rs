//! The SQLite database of the jobs, and the thread that uses it: in a directory, or in memory.
//!
//! A transaction that was committed survives a power failure (`synchronous=FULL`): its log record
//! is on the disk before the response 202 is sent. That costs one `fsync` for each change of a job,
//! milliseconds beside the seconds of an image.

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use rustix::fs::{FallocateFlags, fallocate};
use tokio::sync::{mpsc, oneshot};
use tracing::{error, warn};

use super::disk::Disk;
use crate::http::error::{ApiError, Result};
use crate::request::ValidationError;

/// The file in the directory. SQLite adds its log beside it.
const FILE: &str = "jobs.sqlite3";

/// Maximum number of handlers whose work waits for the thread; more wait to hand it over.
const MAX_WAITING: usize = 64;

/// Time for which another process may still hold the file: one that is being replaced by this one.
const BUSY_TIMEOUT: Duration = Duration::from_secs(3);

/// The steps from each version of the schema to the next. The first creates it.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        client TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        deadline_ms INTEGER NOT NULL,
        priority TEXT NOT NULL,
        seed INTEGER NOT NULL,
        model TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        -- How many processes have begun to generate it.
        begun INTEGER NOT NULL DEFAULT 0,
        -- The URL to notify; NULL once it was notified.
        webhook TEXT,
        -- The end of the job; NULL before.
        finished_ms INTEGER,
        status INTEGER,
        -- Whether a client has received the result.
        fetched INTEGER NOT NULL DEFAULT 0,
        -- Size of the request, then of the result.
        bytes INTEGER NOT NULL,
        -- Of the request, then of the result.
        headers BLOB NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE INDEX jobs_by_client ON jobs (client, finished_ms, fetched, bytes);
    CREATE INDEX jobs_by_end ON jobs (finished_ms);
"];

/// Interval at which errors are logged: a disk that stays full would fill the log.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Size of the log that is reserved when there is room, in bytes: so much can be deleted on a disk
/// that others have filled to the last byte.
const LOG_BYTES: u64 = 1 << 18;

/// Maximum size of a file that is checked when it is opened, in bytes: it is read as a whole.
const MAX_CHECKED_BYTES: u64 = 256 << 20;

/// Work for the thread.
type Work = Box<dyn FnOnce(&mut Connection, Option<&Disk>) + Send>;

/// The handle of the database. The thread ends with the last handle.
#[derive(Debug)]
pub(super) struct Database {
    work: mpsc::Sender<Work>,
    /// When an error was last logged.
    logged: Arc<Mutex<Option<Instant>>>,
}

impl Database {
    /// Opens the database of a directory, which is created if necessary, or one in memory. The
    /// error names the option, the directory and the reason. It is a [`ValidationError`] unless it
    /// may pass: another process uses the directory, or its disk is full.
    pub(super) fn open(dir: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(dir) = dir {
            return Self::on(dir, Disk::of(dir.to_owned()));
        }
        let mut connection = Connection::open_in_memory()?;
        // Gives the memory of deleted results back.
        connection.execute_batch("PRAGMA auto_vacuum = FULL")?;
        migrate(&mut connection)?;
        Self::start(connection, None)
    }

    /// The database of a directory on this file system.
    pub(super) fn on(dir: &Path, disk: Disk) -> anyhow::Result<Self> {
        let connection = connect(dir).map_err(|error| refusal(dir, &error))?;
        disk.tidy(&connection);
        Self::start(connection, Some(disk))
    }

    fn start(mut connection: Connection, disk: Option<Disk>) -> anyhow::Result<Self> {
        let (work, mut receiver) = mpsc::channel::<Work>(MAX_WAITING);
        let serve = move || {
            while let Some(work) = receiver.blocking_recv() {
                work(&mut connection, disk.as_ref());
            }
        };
        thread::Builder::new().name("jobs".into()).spawn(serve)?;
        Ok(Self { work, logged: Arc::default() })
    }

    /// Runs `work` in a transaction on the thread: all of its changes are durable when this returns
    /// a value, and none are made when it returns an error.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.store(None, work).await
    }

    /// The same for work that stores so many bytes: it is refused, as on a full disk, unless the
    /// room that deletions need stays free.
    pub(super) async fn store<T: Send + 'static>(
        &self,
        bytes: Option<usize>,
        work: impl FnOnce(&Transaction<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (sender, result) = oneshot::channel();
        let logged = Arc::clone(&self.logged);
        let work = move |connection: &mut Connection, disk: Option<&Disk>| {
            let fits = |bytes| disk.is_none_or(|disk| disk.make_room(connection, bytes));
            let done = if bytes.is_none_or(fits) { transact(connection, work) } else { full() };
            if let Err(ApiError::Storage(error)) = &done {
                log(&logged, error);
            }
            // The handler may have been cancelled.
            let _ = sender.send(done);
            if let Some(disk) = disk {
                disk.tidy(connection);
            }
        };
        let closed = || ApiError::Storage(rusqlite::Error::UnwindingPanic);
        self.work.send(Box::new(work)).await.map_err(|_| closed())?;
        result.await.map_err(|_| closed())?
    }
}

/// Logs an error, unless one was logged a moment ago.
fn log(logged: &Mutex<Option<Instant>>, error: &rusqlite::Error) {
    let mut logged = logged.lock().unwrap_or_else(PoisonError::into_inner);
    if logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
        *logged = Some(Instant::now());
        error!("the database of the jobs: {error}");
    }
}

fn full<T>() -> Result<T> {
    let full = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
    Err(ApiError::Storage(rusqlite::Error::SqliteFailure(full, None)))
}

fn transact<T>(
    connection: &mut Connection,
    work: impl FnOnce(&Transaction<'_>) -> Result<T>,
) -> Result<T> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let value = work(&transaction)?;
    transaction.commit()?;
    Ok(value)
}

fn connect(dir: &Path) -> anyhow::Result<Connection> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let path = dir.join(FILE);
    // SQLite would let other users of the host read prompts and images.
    OpenOptions::new().create(true).append(true).mode(0o600).open(&path)?;
    let mut connection = Connection::open(&path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // A log that is deleted at the end leaves its space to others, and the next start without any.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    // Exclusive: the file is locked as long as the process lives, and by no other process. The log
    // is small: it takes room that deletions need on a full disk. Free pages can be given back.
    let settings = format!(
        "
        PRAGMA locking_mode = EXCLUSIVE;
        PRAGMA auto_vacuum = INCREMENTAL;
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = FULL;
        PRAGMA journal_size_limit = {LOG_BYTES};
        PRAGMA wal_autocheckpoint = 16;
        "
    );
    let opened = connection.execute_batch(&settings);
    opened?;
    if path.metadata()?.len() <= MAX_CHECKED_BYTES {
        let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if found != "ok" {
            warn!("{FILE}: {found}");
            let damaged = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
            return Err(rusqlite::Error::SqliteFailure(damaged, Some(found)).into());
        }
    }
    migrate(&mut connection)?;
    let vacuum: i64 = connection.pragma_query_value(None, "auto_vacuum", |row| row.get(0))?;
    if vacuum == 0 {
        // An older version has created it. Without room for a copy it stays as it is.
        let _ = connection.execute_batch("VACUUM");
    }
    // Gives the disk the log of the last process back, if there is room to move its records.
    let _ = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
    reserve_log(dir);
    Ok(connection)
}

/// Reserves the space of the log, if there is any left. What follows its records counts for nothing.
fn reserve_log(dir: &Path) {
    let log = OpenOptions::new().write(true).open(dir.join(format!("{FILE}-wal")));
    if let Ok(log) = log {
        let _ = fallocate(&log, FallocateFlags::empty(), 0, LOG_BYTES);
    }
}

/// Why a directory cannot be used, in words for its operator.
fn refusal(dir: &Path, error: &anyhow::Error) -> anyhow::Error {
    use std::io::ErrorKind as Io;
    let io = error.downcast_ref().map(std::io::Error::kind);
    let code = error.downcast_ref().and_then(rusqlite::Error::sqlite_error_code);
    let (passes, reason) = match (io, code) {
        (Some(Io::AlreadyExists | Io::NotADirectory), _) => (false, "it is not a directory".into()),
        (Some(Io::IsADirectory), _) => (false, format!("{FILE} in it is a directory")),
        (Some(Io::PermissionDenied | Io::ReadOnlyFilesystem), _)
        | (_, Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied)) => {
            (false, "this user cannot write to it".into())
        }
        (_, Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt)) => {
            let reason = "is not a database, or damaged: move it and its -wal away";
            (false, format!("{FILE} in it {reason}, and jobs begin anew"))
        }
        (Some(Io::StorageFull), _) | (_, Some(ErrorCode::DiskFull)) => {
            (true, "its disk is full".into())
        }
        (_, Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)) => {
            (true, "another process uses it".into())
        }
        (None, None) => (false, format!("{error:#}")),
        _ => (true, format!("{error:#}")),
    };
    let message = format!("{} cannot be used: {reason}", dir.display());
    match passes {
        true => anyhow!("--data-dir {message}"),
        false => ValidationError::malformed("--data-dir", message).into(),
    }
}

/// Brings the schema to the current version.
fn migrate(connection: &mut Connection) -> anyhow::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: usize = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let latest = MIGRATIONS.len();
    let Some(missing) = MIGRATIONS.get(version..) else {
        bail!("a newer sd-server has written it: schema {version}, this one reads up to {latest}");
    };
    // Nothing is written without need: what is on a full disk can still be read.
    if !missing.is_empty() {
        for step in missing {
            transaction.execute_batch(step)?;
        }
        transaction.pragma_update(None, "user_version", latest)?;
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    impl Database {
        /// Whether every transaction fails.
        pub(in super::super) async fn set_read_only(&self, is_read_only: bool) {
            let (sender, done) = oneshot::channel();
            let set = move |connection: &mut Connection, _: Option<&Disk>| {
                connection.pragma_update(None, "query_only", is_read_only).expect("a setting");
                let _ = sender.send(());
            };
            self.work.send(Box::new(set)).await.expect("the thread lives");
            done.await.expect("it is set");
        }
    }

    /// Counts the lines of a log.
    #[derive(Clone, Default)]
    struct Lines(Arc<AtomicUsize>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
            self.0.fetch_add(lines, Ordering::Relaxed);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_error_that_stays_is_one_line_a_minute() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let (logged, error) = (Mutex::new(None), rusqlite::Error::InvalidQuery);
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..100 {
                log(&logged, &error);
            }
            assert_eq!(lines.0.load(Ordering::Relaxed), 1);
            let moment = |at: Option<Instant>| at?.checked_sub(LOG_INTERVAL);
            let mut at = logged.lock().expect("unpoisoned");
            *at = moment(*at);
            drop(at);
            log(&logged, &error);
            log(&logged, &error);
            assert_eq!(lines.0.load(Ordering::Relaxed), 2);
        });
    }

    fn refusal(dir: &Path) -> String {
        format!("{:#}", Database::open(Some(dir)).expect_err("refused"))
    }

    #[test]
    fn an_older_schema_is_migrated_and_a_newer_one_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        // Version 0: a database without tables.
        let file = Connection::open(dir.path().join(FILE)).expect("a file");
        file.execute_batch("PRAGMA user_version = 0; VACUUM").expect("written");
        drop(file);
        drop(connect(dir.path()).expect("migrated"));
        let file = Connection::open(dir.path().join(FILE)).expect("a file");
        let rows: i64 =
            file.query_row("SELECT count(*) FROM jobs", [], |row| row.get(0)).expect("a table");
        assert_eq!(rows, 0);
        file.pragma_update(None, "user_version", MIGRATIONS.len() + 1).expect("written");
        drop(file);
        let refusal = refusal(dir.path());
        assert!(refusal.contains("a newer sd-server") && refusal.contains("schema 2"), "{refusal}");
        assert!(refusal.contains(&*dir.path().to_string_lossy()), "{refusal}");
    }

    #[test]
    fn a_directory_that_cannot_be_used_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let _held = connect(dir.path()).expect("opened");
        assert!(refusal(dir.path()).contains("another process uses it"));
        let file = dir.path().join("file");
        std::fs::write(&file, "text").expect("written");
        assert!(refusal(&file).ends_with("it is not a directory"), "{}", refusal(&file));
        let other = tempfile::tempdir().expect("a directory");
        std::fs::write(other.path().join(FILE), "text ".repeat(100)).expect("written");
        assert!(refusal(other.path()).contains("not a database"), "{}", refusal(other.path()));
        std::fs::remove_file(other.path().join(FILE)).expect("removed");
        std::fs::create_dir(other.path().join(FILE)).expect("created");
        assert!(refusal(other.path()).ends_with("is a directory"), "{}", refusal(other.path()));
    }

    #[test]
    fn a_damaged_file_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().expect("a directory");
        drop(connect(dir.path()).expect("created"));
        let path = dir.path().join(FILE);
        let mut file = std::fs::read(&path).expect("a file");
        file[4096..].fill(0xa5);
        std::fs::write(&path, file).expect("written");
        let refusal = refusal(dir.path());
        assert!(refusal.contains("damaged: move it and its -wal away"), "{refusal}");
    }

    #[test]
    fn the_space_of_the_log_is_reserved_and_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let length = || dir.path().join(format!("{FILE}-wal")).metadata().expect("a log").len();
        for _ in 0..2 {
            let connection = connect(dir.path()).expect("opened");
            assert_eq!(length(), LOG_BYTES);
            connection.execute_batch("CREATE TABLE a (b); DROP TABLE a").expect("written");
            let checkpoint = "PRAGMA wal_checkpoint(RESTART)";
            connection.query_row(checkpoint, [], |_| Ok(())).expect("moved");
            drop(connection);
            assert_eq!(length(), LOG_BYTES);
        }
    }
}
