//! The life of a server: bind, load, serve, drain.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::engine::{DeviceScheduler, Engine, EngineState};
use crate::host::memory;
use crate::registry::{ModelLoader, ModelRegistry};
use crate::source::{ModelConfig, ModelLocation};
use crate::{engine, http, registry, source};

/// Time to write the answers of those who were given up.
const FINAL_RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// After the model thread has died, the time in which `/ping` says so.
const UNHEALTHY_LINGER: Duration = Duration::from_secs(1);

/// Settings of `serve`.
#[derive(Debug)]
pub struct Serve {
    /// The model.
    pub model: ModelConfig,
    /// Whether it is loaded at the start, rather than models that are chosen by name.
    pub preload: bool,
    /// Bounds of the models that are chosen by name.
    pub models: registry::RegistryConfig,
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 lets the system choose.
    pub port: u16,
    /// Bounds of the HTTP side.
    pub http: http::HttpConfig,
    /// Bounds of the engine.
    pub engine: engine::EngineConfig,
    /// From SIGTERM to giving up what is not finished.
    pub drain_timeout: Duration,
}

/// Binds first, so that `/ping` can say 503 while the model loads.
pub(crate) async fn listen_and_serve(config: Serve) -> Result<()> {
    // Before anyone can know that there is a server to end.
    let shutdown = signal();
    let address = (config.host.as_str(), config.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {}:{}", config.host, config.port))?;
    // The only line on standard output: with port 0 it tells which port it became.
    writeln!(std::io::stdout(), "listening on http://{}", listener.local_addr()?)?;
    let device = DeviceScheduler::default();
    let first = match config.preload {
        true => Engine::start_on(&device, config.engine, loader(config.model.clone()))?,
        false => Engine::absent(&device, config.engine),
    };
    let files = DiskLoader { device, engine: config.engine, model: config.model };
    let models = ModelRegistry::new(first, files, config.models);
    serve(models, config.http, listener, config.drain_timeout, shutdown).await
}

/// Models in directories and files, on the configured device.
struct DiskLoader {
    device: DeviceScheduler,
    engine: engine::EngineConfig,
    /// All but the place.
    model: ModelConfig,
}

impl DiskLoader {
    fn at(&self, path: &Path) -> ModelConfig {
        let place =
            if path.is_file() { ModelLocation::Checkpoint } else { ModelLocation::Directory };
        ModelConfig { place: place(path.into()), ..self.model.clone() }
    }
}

impl ModelLoader for DiskLoader {
    fn estimate_bytes(&self, path: &Path) -> Result<u64> {
        let model = self.at(path);
        let (half, bytes, checking) = (model.half(), model.weight_bytes(), model.checking);
        Ok(sd_models::parameters(&source::locate(model)?.source, half, checking)? * bytes)
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
    models: impl Into<ModelRegistry>,
    settings: http::HttpConfig,
    listener: TcpListener,
    drain_timeout: Duration,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let close = CancellationToken::new();
    let models = models.into();
    let app = http::router(models.clone(), settings.clone());
    let mut server =
        tokio::spawn(http::listen(listener, app, settings, close.clone().cancelled_owned()));

    // Who comes from now on hears 503, as long as there is anything left to do.
    let end = tokio::select! {
        () = shutdown => {
            info!(
                drain_ms = drain_timeout.as_millis() as u64,
                "draining: finishing accepted requests"
            );
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
        // Connections that still hang after this are closed with the process.
        let _ = timeout(FINAL_RESPONSE_TIMEOUT, &mut server).await;
    }
    match models.default_engine().state() {
        EngineState::Dead(death) => Err(death.into()),
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

fn loader(model: ModelConfig) -> impl FnOnce() -> Result<sd_models::Pipeline> + Send {
    move || source::load(model)
}
