//! The life of a server: bind, load, serve, drain.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use futures_util::future::OptionFuture;
use sd_models::{AddOns, Checkpoint, Source};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};

use crate::engine::{DeviceScheduler, Engine, EngineConfig, EngineState};
use crate::host::memory;
use crate::http::{self, HttpConfig};
use crate::registry::{ModelLoader, ModelRegistry, RegistryConfig};
use crate::request::Limits;
use crate::source::{self, ModelConfig, ModelLocation};
use crate::telemetry;

/// Time to write the responses of cancelled requests.
const FINAL_RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Time for which `/ping` reports that the model thread has terminated, before the process exits.
const UNHEALTHY_LINGER: Duration = Duration::from_secs(1);

/// Time for which further signals are the first one again: a terminal or `timeout` and the parent
/// process often send the same one each.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(200);

/// Number of files for anything but connections: models, the hub, the database of jobs.
const OTHER_FILES: u64 = 256;

/// Configuration of `serve`.
#[derive(Debug)]
pub(crate) struct Serve {
    /// The model.
    pub(crate) model: ModelConfig,
    /// Whether it is loaded on start; otherwise models are only loaded by name.
    pub(crate) preload: bool,
    /// Limits of the models loaded by name.
    pub(crate) models: RegistryConfig,
    /// Address to listen on.
    pub(crate) host: String,
    /// Port to listen on; 0 lets the system choose.
    pub(crate) port: u16,
    /// Limits of the HTTP layer.
    pub(crate) http: HttpConfig,
    /// Limits of the engine.
    pub(crate) engine: EngineConfig,
    /// Time from SIGTERM until unfinished requests are cancelled.
    pub(crate) drain_timeout: Duration,
}

/// Opens the data directory, then binds the port, so that `/ping` can return 503 while the model
/// loads.
pub(crate) async fn listen_and_serve(mut config: Serve) -> Result<()> {
    let connections = &mut config.http.max_connections;
    *connections = allow_connections(*connections);
    // Installed before the port is bound, so that no signal is missed.
    let shutdown = signal();
    let jobs = config.http.open_jobs()?;
    let address = (config.host.as_str(), config.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {}:{}", config.host, config.port))?;
    // The only line on standard output: with port 0 it reports the chosen port.
    if let Err(error) = writeln!(io::stdout(), "listening on http://{}", listener.local_addr()?) {
        warn!("the address cannot be written to standard output: {error}");
    }
    let device = DeviceScheduler::default();
    let limits = config.http.limits;
    let first = match config.preload {
        true => start(&device, config.engine, config.model.clone(), limits)?,
        false => Engine::absent(&device, config.engine),
    };
    let files = DiskLoader { device, engine: config.engine, model: config.model, limits };
    let models = ModelRegistry::new(first, files, config.models);
    let app = http::router_with(models.clone(), config.http.clone(), jobs);
    serve_app(app, models, config.http, listener, config.drain_timeout, shutdown).await
}

/// Raises the limit on open files for so many connections. Returns the number that it allows: with
/// more, even health checks could not be accepted.
fn allow_connections(wanted: usize) -> usize {
    let others = OTHER_FILES + http::RESERVED_CONNECTIONS as u64;
    let limit = match rlimit::increase_nofile_limit(wanted as u64 + others) {
        Ok(limit) => limit,
        Err(error) => {
            warn!("the limit on open files is not known: {error}");
            return wanted;
        }
    };
    let allowed = usize::try_from(limit.saturating_sub(others)).unwrap_or(wanted).max(1);
    if allowed < wanted {
        warn!("the limit on open files, {limit}, allows {allowed} of {wanted} connections");
    }
    allowed.min(wanted)
}

/// Loads models from directories and files onto the configured device.
struct DiskLoader {
    device: DeviceScheduler,
    engine: EngineConfig,
    /// The configuration of every model, except its location.
    model: ModelConfig,
    limits: Limits,
}

impl DiskLoader {
    fn at(&self, path: &Path) -> ModelConfig {
        let location =
            if path.is_file() { ModelLocation::Checkpoint } else { ModelLocation::Directory };
        ModelConfig { location: location(path.into()), ..self.model.clone() }
    }
}

impl ModelLoader for DiskLoader {
    fn estimate_bytes(&self, path: &Path) -> Result<u64> {
        let model = self.at(path);
        let (half, bytes) = (model.half(), model.weight_bytes());
        Ok(sd_models::parameters(&source::locate(model)?, half)? * bytes)
    }

    fn start(&self, path: &Path) -> io::Result<Engine> {
        // The registry unloads it: then it has room for others.
        let engine = EngineConfig { unload_after: None, ..self.engine };
        start(&self.device, engine, self.at(path), self.limits)
    }

    fn source(&self, path: Option<&Path>) -> Result<Source> {
        let model = path.map_or_else(|| self.model.clone(), |path| self.at(path));
        Ok(source::locate(model)?.source)
    }

    fn is_model(&self, file: &Path) -> bool {
        let checkpoint = Checkpoint { file: file.into(), vocabulary: None };
        checkpoint.check().is_ok()
    }

    fn add_ons(&self) -> AddOns {
        self.model.add_ons.clone()
    }

    fn free_bytes(&self) -> Option<u64> {
        // The free memory of a GPU is not known here; loading fails if it is insufficient.
        if self.model.half() { None } else { memory::available() }
    }
}

/// Serves until `shutdown`, then drains: new requests get 503, accepted ones are finished within
/// `drain_timeout`, the rest gets 503. An error means that the model thread has terminated and the
/// process should exit.
pub async fn serve(
    models: impl Into<ModelRegistry>,
    settings: HttpConfig,
    listener: TcpListener,
    drain_timeout: Duration,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let models = models.into();
    let app = http::router(models.clone(), settings.clone())?;
    serve_app(app, models, settings, listener, drain_timeout, shutdown).await
}

async fn serve_app(
    app: Router,
    models: ModelRegistry,
    settings: HttpConfig,
    listener: TcpListener,
    drain_timeout: Duration,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let close = CancellationToken::new();
    let server = http::listen(listener, app, settings, close.clone().cancelled_owned());
    // Dropped when the time is over, with the connections that are still open.
    let mut server = AbortOnDropHandle::new(tokio::spawn(server));

    // While draining, the server still accepts connections and returns 503.
    let end = tokio::select! {
        () = shutdown => {
            let drain_ms = drain_timeout.as_millis() as u64;
            info!(drain_ms, "draining: finishing accepted requests");
            models.drain();
            let end = Instant::now() + drain_timeout;
            let _ = timeout_at(end, models.wait_idle()).await;
            end
        }
        _ = models.default_engine().terminated() => {
            sleep(UNHEALTHY_LINGER).await;
            Instant::now()
        }
    };
    close.cancel();
    if timeout_at(end, &mut server).await.is_err() {
        models.abort();
        let _ = timeout(FINAL_RESPONSE_TIMEOUT, &mut server).await;
    }
    match models.default_engine().state() {
        EngineState::Dead(death) => Err(death.into()),
        _ => Ok(()),
    }
}

/// Completes at SIGTERM, SIGINT or SIGHUP; the second signal ends the process at once. The handlers
/// are installed by the call, not by the first poll. Process 1 of a container has no default ones.
fn signal() -> impl Future<Output = ()> {
    use tokio::signal::unix::{Signal, SignalKind, signal};
    let handlers = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    // A handler would undo `nohup`.
    let mut hangup = if ignores_hangup() { None } else { signal(SignalKind::hangup()).ok() };
    async move {
        let (Ok(mut term), Ok(mut int)) = handlers else {
            warn!("signals cannot be handled; only SIGKILL will end this process");
            return std::future::pending().await;
        };
        // The exit code of a process that the signal has killed.
        let mut next = async move || {
            let hup = OptionFuture::from(hangup.as_mut().map(Signal::recv));
            tokio::select! {
                _ = term.recv() => ("SIGTERM", 128 + 15),
                _ = int.recv() => ("SIGINT", 128 + 2),
                Some(_) = hup => ("SIGHUP", 128 + 1),
            }
        };
        let (name, _) = next().await;
        info!("{name}");
        let repeated = Instant::now() + SIGNAL_INTERVAL;
        tokio::spawn(async move {
            while timeout_at(repeated, next()).await.is_ok() {}
            let (name, code) = next().await;
            warn!("{name} again: exiting without finishing accepted requests");
            telemetry::end();
            std::process::exit(code);
        });
    }
}

/// Whether the process was started with SIGHUP ignored, as `nohup` does.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit n - 1 is signal n.
    ignored
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}

fn start(
    device: &DeviceScheduler,
    engine: EngineConfig,
    model: ModelConfig,
    limits: Limits,
) -> io::Result<Engine> {
    Engine::start_reloading(device, engine, move || {
        let model = source::load(model.clone())?;
        limits.check_defaults(model.info()).map_err(anyhow::Error::msg)?;
        Ok(model)
    })
}
