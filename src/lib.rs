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

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use cli::{Action, Config, bench, generate, healthcheck};

/// Runs the subcommand of the command line.
pub fn run(config: Config) -> Result<()> {
    telemetry::init(config.log_format, &config.log_filter)?;
    match config.action {
        Action::Serve(serve) => block_on(server::listen_and_serve(*serve)),
        Action::Generate(generate) => block_on(generate::run(*generate)),
        Action::Download(download) => print(&download.run()?),
        Action::Package(package) => print(&package.run()?),
        Action::Bench(bench) => block_on(bench::load::run(*bench)),
        Action::Verify(verify) => bench::device::run(*verify),
        Action::Healthcheck { address } => healthcheck::run(&address),
    }
}

fn print(path: &Path) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{}", path.display())?)
}

fn block_on(work: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    // The model thread may be in the middle of a step; it is not waited for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    done
}
