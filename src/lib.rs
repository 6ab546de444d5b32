//! `sd-server`: a Stable Diffusion server. `docs/architecture.md` describes its modules in the
//! order in which a request passes them.

#![forbid(unsafe_code)]

pub mod cli;
pub mod engine;
pub mod host;
pub mod http;
pub mod image;
pub mod registry;
pub mod request;
pub mod server;
pub mod telemetry;

mod options;
mod source;

/// Runs the subcommand of the command line. An error is in the log.
pub fn run(config: cli::Config) -> anyhow::Result<()> {
    // Dropped last: the error is logged before.
    let _log = telemetry::init(config.log_format, &config.log_filter);
    config.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    (config.action)().inspect_err(|error| tracing::error!("{error:#}"))
}
