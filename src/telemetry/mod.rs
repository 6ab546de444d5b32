//! Telemetry: the log, one line per event to standard error; and the metrics, in `metrics`.

mod metrics;

use std::io::{self, IsTerminal as _};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

pub use metrics::Metrics;

/// Number of lines that are held while the reader of standard error is slow. More are dropped.
const BUFFERED_LINES: usize = 8192;

/// Time to write the buffered lines when the process ends.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(1500);

/// Counts the dropped lines, once the log is started.
static DROPPED_LINES: OnceLock<ErrorCounter> = OnceLock::new();

/// The format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text, coloured on a terminal.
    Text,
    /// One JSON object per line, for log collectors.
    Json,
}

/// The thread that writes the log.
static WRITER: Mutex<Option<WorkerGuard>> = Mutex::new(None);

/// The log, which ends when this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Log(());

/// Starts the log. A thread of its own writes it, so that nothing waits for the reader of standard
/// error. Panics are logged too, so that a JSON log contains nothing else. A log that the process
/// has already is kept.
pub fn init(format: LogFormat, filter: &str) -> Log {
    let lines = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(BUFFERED_LINES);
    let (writer, guard) = lines.thread_name("log").finish(io::stderr());
    let _ = DROPPED_LINES.set(writer.error_counter());
    let filter = EnvFilter::new(filter);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    let _ = match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    *WRITER.lock().unwrap_or_else(PoisonError::into_inner) = Some(guard);
    Log(())
}

impl Drop for Log {
    fn drop(&mut self) {
        end();
    }
}

/// Ends the log: writes the lines that are still buffered, for up to [`FLUSH_TIMEOUT`]. Before
/// `std::process::exit`, which drops nothing.
pub(crate) fn end() {
    let Some(writer) = WRITER.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    let (done, flushed) = mpsc::channel::<()>();
    // In a thread, since the writer reports a full buffer on standard output, whose reader may have
    // stalled as well.
    let flush = move || {
        drop(writer);
        drop(done);
    };
    if thread::Builder::new().name("log end".into()).spawn(flush).is_ok() {
        let _ = flushed.recv_timeout(FLUSH_TIMEOUT);
    }
}

/// Number of lines that were dropped because the reader of standard error was too slow.
pub(crate) fn dropped_lines() -> u64 {
    DROPPED_LINES.get().map_or(0, |dropped| dropped.dropped_lines() as u64)
}

/// Checks a filter of the log.
pub(crate) fn log_filter(text: &str) -> Result<String, String> {
    // tracing would take a misspelt level for the name of a module, and log nothing else.
    let bare = |part: &&str| !part.contains(['=', '[', ']', '{', '}', '"']);
    let unknown = |part: &&str| part.trim().parse::<LevelFilter>().is_err();
    if let Some(part) = text.split(',').filter(bare).find(unknown) {
        return Err(format!(
            "{part:?} is no level; use error, warn, info, debug, trace or off, and for a module \
             its name and a level, such as sd_server=debug"
        ));
    }
    match EnvFilter::try_new(text) {
        Ok(_) => Ok(text.into()),
        Err(error) => Err(format!("{error}; an example is warn,sd_server=debug")),
    }
}
