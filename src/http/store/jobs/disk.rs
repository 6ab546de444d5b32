//! The free space of the file system of the database. A reserve of it is for what makes room: a
//! deletion takes records in the log, and the log can be emptied only while the file may grow.

use std::fmt;
use std::path::PathBuf;

use rusqlite::Connection;

/// Maximum size of the reserve. A small file system has a quarter of its size.
const MAX_RESERVE: u64 = 16 << 20;

/// Size of a page of the database, in bytes; SQLite's default.
const PAGE: u64 = 4096;

/// The space of a file system, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Space {
    pub(super) free: u64,
    pub(super) total: u64,
}

impl Space {
    fn reserve(self) -> u64 {
        MAX_RESERVE.min(self.total / 4)
    }

    /// Whether the reserve stays beside `bytes` in the log and in the file.
    fn has_room(self, bytes: u64) -> bool {
        self.free >= bytes.saturating_mul(2).saturating_add(self.reserve())
    }
}

/// The file system of a database.
pub(super) struct Disk(Box<dyn Fn() -> Option<Space> + Send>);

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Disk").field(&(self.0)()).finish()
    }
}

impl Disk {
    /// A file system whose space, if it is known, is what `space` returns.
    pub(super) fn new(space: impl Fn() -> Option<Space> + Send + 'static) -> Self {
        Self(Box::new(space))
    }

    /// The file system of a directory.
    pub(super) fn of(dir: PathBuf) -> Self {
        Self::new(move || {
            let found = rustix::fs::statvfs(&dir).ok()?;
            let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
            Some(Space { free: bytes(found.f_bavail), total: bytes(found.f_blocks) })
        })
    }

    /// Whether there is room for `bytes` and the reserve, once the database has given back what it
    /// does not use.
    pub(super) fn make_room(&self, connection: &Connection, bytes: usize) -> bool {
        loop {
            // If the space is not known, writing says whether there is any.
            if (self.0)().is_none_or(|space| space.has_room(bytes as u64)) {
                return true;
            }
            if !self.give_back(connection) {
                return false;
            }
        }
    }

    /// While space is short, keeps the log small and gives back pages that are not used.
    pub(super) fn tidy(&self, connection: &Connection) {
        if (self.0)().is_some_and(|space| !space.has_room(space.reserve())) {
            self.give_back(connection);
        }
    }

    /// Moves the records of the log to the file, and shortens the file by as many free pages as the
    /// reserve has room to move; whether it has become shorter.
    fn give_back(&self, connection: &Connection) -> bool {
        let reserve = (self.0)().map_or(0, Space::reserve);
        let step = || -> rusqlite::Result<bool> {
            // The log keeps its size, so that the next deletion has room on a disk that others fill.
            let checkpoint = "PRAGMA wal_checkpoint(RESTART)";
            connection.query_row(checkpoint, [], |_| Ok(()))?;
            let count = |pragma| -> rusqlite::Result<i64> {
                connection.pragma_query_value(None, pragma, |row| row.get(0))
            };
            if count("freelist_count")? == 0 {
                return Ok(false);
            }
            let before = count("page_count")?;
            let vacuum = format!("PRAGMA incremental_vacuum({})", (reserve / 4 / PAGE).max(1));
            let mut vacuum = connection.prepare(&vacuum)?;
            let mut pages_freed = vacuum.query([])?;
            while pages_freed.next()?.is_some() {}
            connection.query_row(checkpoint, [], |_| Ok(()))?;
            Ok(count("page_count")? < before)
        };
        step().unwrap_or(false)
    }
}
