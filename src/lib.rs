//! `sd-server`: a Stable Diffusion server. The modules are listed in the order in which a request
//! passes through them; `docs/architecture.md` is the long form.

#![forbid(unsafe_code)]

pub mod api;
pub mod config;
pub mod engine;
pub mod http;
pub mod image;
pub mod telemetry;

mod bench;
mod generate;
mod healthcheck;
mod hub;
mod memory;
mod package;

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use sd_models::Pipeline;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::info;

use config::{Action, Config};
use engine::Engine;

/// Time to write the answers of those who were given up.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Does what the command line asks for.
pub fn run(config: Config) -> Result<()> {
    telemetry::init(config.log_format, &config.log_filter)?;
    match config.action {
        Action::Serve(serve) => block_on(listen_and_serve(*serve)),
        Action::Generate(generate) => block_on(generate::run(*generate)),
        Action::Download(download) => {
            let path = download.run()?;
            Ok(writeln!(std::io::stdout(), "{}", path.display())?)
        }
        Action::Package(package) => {
            let path = package.run()?;
            Ok(writeln!(std::io::stdout(), "{}", path.display())?)
        }
        Action::Bench(plan) => block_on(bench::run(*plan)),
        Action::Healthcheck { address } => healthcheck::run(&address),
    }
}

fn block_on(work: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    // The model thread may be in the middle of a step; it ends with the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    done
}

/// Binds first, so that `/ping` can say 503 while the model loads.
async fn listen_and_serve(config: config::Serve) -> Result<()> {
    let address = (config.host.as_str(), config.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {}:{}", config.host, config.port))?;
    // The only line on standard output: with port 0 it tells which port it became.
    writeln!(std::io::stdout(), "listening on http://{}", listener.local_addr()?)?;
    let engine = start(config.engine, config.model)?;
    serve(engine, config.http, listener, config.drain_timeout, signal()).await
}

/// Starts an engine on the configured model, which the model thread fetches and loads.
fn start(settings: engine::Settings, model: config::Model) -> Result<Engine> {
    Ok(Engine::start(settings, || Ok(Pipeline::load(&hub::locate(model)?)?))?)
}

/// Serves until `shutdown`, then finishes what fits in the drain timeout. An error means that
/// the model thread is gone and the process should be too.
pub async fn serve(
    engine: Engine,
    settings: http::Settings,
    listener: TcpListener,
    drain_timeout: Duration,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let (close, closed) = watch::channel(false);
    let app = http::router(engine.clone(), settings.clone());
    let mut server = tokio::spawn(http::listen(listener, app, settings, closed));

    let reason = tokio::select! {
        () = shutdown => None,
        reason = engine.died() => Some(reason),
    };
    close.send_replace(true);
    if reason.is_none() {
        info!(drain_ms = drain_timeout.as_millis() as u64, "stopping: finishing what was accepted");
        engine.drain();
        if timeout(drain_timeout, &mut server).await.is_ok() {
            return Ok(());
        }
    }
    engine.stop();
    // Connections that still hang after this are closed with the process.
    let _ = timeout(LAST_ANSWERS, &mut server).await;
    reason.map_or(Ok(()), |reason| Err(anyhow::Error::msg(reason)))
}

/// Completes at SIGTERM or SIGINT. As process 1 of a container nobody else would handle them.
async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::warn!("signals cannot be handled; only SIGKILL will end this process");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => info!("SIGTERM"),
        _ = int.recv() => info!("SIGINT"),
    }
}
