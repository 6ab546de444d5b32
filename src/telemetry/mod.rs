//! Telemetry: the log, one line per event to standard error; and the metrics, in `metrics`.

mod metrics;

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

pub use metrics::Metrics;

/// The format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text, coloured on a terminal.
    Text,
    /// One JSON object per line, for log collectors.
    Json,
}

/// Starts the log. Panics are logged too, so that a JSON log contains nothing else.
pub fn init(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    started.map_err(|error| anyhow::anyhow!("cannot start the log: {error}"))
}
