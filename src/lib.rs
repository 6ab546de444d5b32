//! `sd-server`: a Stable Diffusion server. `docs/architecture.md` takes a request through its
//! modules.

#![forbid(unsafe_code)]

pub mod api;
pub mod compat;
pub mod config;
pub mod engine;
pub mod http;
pub mod image;
pub mod models;
pub mod telemetry;

mod bench;
mod generate;
mod gpu;
mod healthcheck;
mod hub;
mod memory;
mod package;
mod verify;

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use sd_models::Pipeline;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::info;

use config::{Action, Config, Place};
use engine::{Engine, Phase};
use models::{Library, Models};

/// Time to write the answers of those who were given up.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// After the model thread has died, the time in which `/ping` says so.
const LAST_WORDS: Duration = Duration::from_secs(1);

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
        Action::Verify(asked) => verify::run(*asked),
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
    // Before anyone can know that there is a server to end.
    let shutdown = signal();
    let address = (config.host.as_str(), config.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {}:{}", config.host, config.port))?;
    // The only line on standard output: with port 0 it tells which port it became.
    writeln!(std::io::stdout(), "listening on http://{}", listener.local_addr()?)?;
    let device = engine::Device::default();
    let first = match config.preload {
        true => Engine::start_on(&device, config.engine, loader(config.model.clone()))?,
        false => Engine::absent(&device, config.engine),
    };
    let files = Files { device, engine: config.engine, model: config.model };
    let models = Models::new(first, files, config.models);
    serve(models, config.http, listener, config.drain_timeout, shutdown).await
}

/// Starts an engine on the configured model, which the model thread fetches and loads.
fn start(settings: engine::Settings, model: config::Model) -> Result<Engine> {
    Ok(Engine::start(settings, loader(model))?)
}

fn loader(model: config::Model) -> impl FnOnce() -> Result<Pipeline> + Send {
    || Ok(Pipeline::load(&hub::locate(model)?)?)
}

/// Models in directories and files, on the configured device.
struct Files {
    device: engine::Device,
    engine: engine::Settings,
    /// All but the place.
    model: config::Model,
}

impl Files {
    fn at(&self, path: &Path) -> config::Model {
        let place = if path.is_file() { Place::Checkpoint } else { Place::Directory };
        config::Model { place: place(path.into()), ..self.model.clone() }
    }
}

impl Library for Files {
    fn weigh(&self, path: &Path) -> Result<u64> {
        let model = self.at(path);
        let (half, bytes, checking) = (model.half(), model.weight_bytes(), model.checking);
        Ok(sd_models::parameters(&hub::locate(model)?.source, half, checking)? * bytes)
    }

    fn start(&self, path: &Path) -> io::Result<Engine> {
        Engine::start_on(&self.device, self.engine, loader(self.at(path)))
    }

    fn free_bytes(&self) -> Option<u64> {
        // What a GPU has left is not known here; there the device itself says no.
        if self.model.half() { None } else { memory::available() }
    }
}

/// Serves until `shutdown`, then finishes what fits in the drain timeout and answers the rest and
/// whoever comes with 503. An error means that the model thread is gone and the process should be
/// too.
pub async fn serve(
    models: impl Into<Models>,
    settings: http::Settings,
    listener: TcpListener,
    drain_timeout: Duration,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let (close, closed) = watch::channel(false);
    let models = models.into();
    let app = http::router(models.clone(), settings.clone());
    let mut server = tokio::spawn(http::listen(listener, app, settings, closed));

    // Who comes from now on hears 503, as long as there is anything left to do.
    let end = tokio::select! {
        () = shutdown => {
            info!(
                drain_ms = drain_timeout.as_millis() as u64,
                "stopping: finishing what was accepted"
            );
            models.drain();
            let end = Instant::now() + drain_timeout;
            let _ = timeout_at(end, models.idle()).await;
            end
        }
        _ = models.first().died() => {
            sleep(LAST_WORDS).await;
            Instant::now()
        }
    };
    close.send_replace(true);
    if timeout_at(end, &mut server).await.is_err() {
        models.stop();
        // Connections that still hang after this are closed with the process.
        let _ = timeout(LAST_ANSWERS, &mut server).await;
    }
    match models.first().phase() {
        Phase::Dead(death) => Err(death.into()),
        _ => Ok(()),
    }
}

/// Completes at SIGTERM or SIGINT, from this call on and not only when it is waited for. As process
/// 1 of a container nobody else would handle them.
fn signal() -> impl Future<Output = ()> {
    use tokio::signal::unix::{SignalKind, signal};
    let handlers = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async move {
        let (Ok(mut term), Ok(mut int)) = handlers else {
            tracing::warn!("signals cannot be handled; only SIGKILL will end this process");
            return std::future::pending().await;
        };
        tokio::select! {
            _ = term.recv() => info!("SIGTERM"),
            _ = int.recv() => info!("SIGINT"),
        }
    }
}
