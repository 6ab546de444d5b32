//! The models of a server: the default model, which is never unloaded, and models loaded by name.
//! In multi-model mode SageMaker loads and unloads them; otherwise they are the directories and
//! files of a directory, loaded on demand, and the least recently used one is evicted. All share
//! one device: its time, and the memory budget of a UNet call; each has its own queue. This file
//! does not read model files: that is the [`ModelLoader`]'s task.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fmt, io};

use clap::builder::FalseyValueParser;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tracing::info;

use crate::engine::{Engine, EngineState, WorkerError};
use crate::options::{bytes, min};
use crate::source::is_checkpoint;

/// Starts an engine for the files of a model.
pub trait ModelLoader: Send + Sync + 'static {
    /// Size of the weights in memory, in bytes, from the headers of the files.
    fn estimate_bytes(&self, path: &Path) -> anyhow::Result<u64>;
    /// Starts loading the model.
    fn start(&self, path: &Path) -> io::Result<Engine>;
    /// Memory available for weights on the device, in bytes, if known.
    fn free_bytes(&self) -> Option<u64>;
}

/// The bounds of the models that are loaded by name, which are options of `serve`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Several models")]
pub struct RegistryConfig {
    /// Directory whose directories and single files are models that requests can select by name.
    /// They are loaded on demand; when the limit is reached, the least recently used model is
    /// evicted. The model of --model is never evicted; without --model none is loaded on start
    #[arg(long = "models-dir", env = "SD_MODELS_DIR")]
    pub folder: Option<PathBuf>,
    /// Multi-model mode: SageMaker loads and unloads models through /models
    #[arg(long, env = "SAGEMAKER_MULTI_MODEL", value_parser = FalseyValueParser::new())]
    pub multi_model: bool,
    /// Maximum number of models loaded by name. At the limit, the least recently used model is
    /// evicted; SageMaker's `POST /models` gets 507 instead
    #[arg(long, env = "SD_MAX_MODELS", default_value = "8", value_parser = min::<1>)]
    pub max_models: usize,
    /// Maximum memory for the weights of models loaded by name, in bytes. At the limit, as for
    /// --max-models. Default: the free memory of the host; on a GPU no limit but the device's own
    #[arg(long = "models-memory-bytes", env = "SD_MODELS_MEMORY_BYTES", value_parser = bytes)]
    pub memory_bytes: Option<u64>,
    /// Time to finish the accepted requests of a model that is unloaded.
    #[arg(skip)]
    pub drain_timeout: Duration,
}

/// Why a model is not available.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// A model of this name is already loaded.
    #[error("the model {0:?} is already loaded")]
    Loaded(String),
    /// No model has this name.
    #[error("the model {0:?} does not exist")]
    Unknown(String),
    /// There is no room until another model is unloaded.
    #[error("not enough room for the model: {0}")]
    NoRoom(String),
    /// The files cannot be loaded.
    #[error("the model cannot be loaded: {0}")]
    Broken(String),
}

type Result<T> = std::result::Result<T, RegistryError>;

/// A loaded model.
#[derive(Debug, Clone)]
pub struct LoadedModel {
    /// Its name.
    pub name: String,
    /// The path of its files.
    pub path: PathBuf,
    engine: Engine,
    bytes: u64,
    /// Every lease holds a receiver: without one, no request can still be submitted.
    leases: watch::Sender<()>,
}

/// The model selected by a request. Unloading waits until this is dropped, up to a timeout.
#[derive(Debug, Clone)]
pub struct ModelLease {
    /// The engine of the model.
    pub engine: Engine,
    /// Held for models loaded by name.
    _lease: Option<watch::Receiver<()>>,
}

impl From<Engine> for ModelLease {
    fn from(engine: Engine) -> Self {
        Self { engine, _lease: None }
    }
}

impl LoadedModel {
    fn lease(&self) -> ModelLease {
        ModelLease { engine: self.engine.clone(), _lease: Some(self.leases.subscribe()) }
    }
}

/// The handle shared by the HTTP handlers.
#[derive(Clone)]
pub struct ModelRegistry {
    shared: Arc<RegistryShared>,
}

struct RegistryShared {
    default: Engine,
    loader: Option<Box<dyn ModelLoader>>,
    settings: RegistryConfig,
    /// In order of use, the most recently used last.
    loaded: Mutex<Vec<LoadedModel>>,
    /// Held while a model is loaded: two at once would count on the same free memory.
    loading: tokio::sync::Mutex<()>,
}

/// A server with one model.
impl From<Engine> for ModelRegistry {
    fn from(default: Engine) -> Self {
        Self::build(default, None, RegistryConfig::default())
    }
}

impl fmt::Debug for ModelRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.loaded()).finish()
    }
}

impl ModelRegistry {
    /// The default model, and a loader for models by name.
    pub fn new(default: Engine, loader: impl ModelLoader, settings: RegistryConfig) -> Self {
        Self::build(default, Some(Box::new(loader)), settings)
    }

    fn build(
        default: Engine,
        loader: Option<Box<dyn ModelLoader>>,
        settings: RegistryConfig,
    ) -> Self {
        let (loaded, loading) = Default::default();
        Self { shared: Arc::new(RegistryShared { default, loader, settings, loaded, loading }) }
    }

    /// The model the server was started with; its engine is `Absent` if all are loaded by name.
    pub fn default_engine(&self) -> &Engine {
        &self.shared.default
    }

    /// Whether SageMaker loads and unloads the models.
    pub fn multi_model(&self) -> bool {
        self.shared.settings.multi_model
    }

    /// The models loaded by name, the most recently used last.
    pub fn loaded(&self) -> Vec<LoadedModel> {
        self.shared.loaded().clone()
    }

    /// All engines.
    pub fn engines(&self) -> Vec<Engine> {
        let mut engines = vec![self.default_engine().clone()];
        engines.extend(self.loaded().into_iter().map(|model| model.engine));
        engines
    }

    /// The state of the server. A lost device is lost for all models.
    pub fn state(&self) -> EngineState {
        let lost = |engine: &Engine| matches!(engine.state(), EngineState::DeviceLost);
        if self.engines().iter().any(lost) {
            EngineState::DeviceLost
        } else {
            self.default_engine().state()
        }
    }

    /// The names of the models in the directory, sorted.
    pub async fn names(&self) -> Vec<String> {
        self.files().await.into_keys().collect()
    }

    /// The models in the directory. It may be on a slow file system, so a blocking thread reads it.
    async fn files(&self) -> BTreeMap<String, PathBuf> {
        let Some(folder) = self.shared.settings.folder.clone() else { return BTreeMap::new() };
        let files = tokio::task::spawn_blocking(move || files(&folder)).await;
        files.unwrap_or_default()
    }

    /// A loaded model, which becomes the most recently used.
    pub fn get(&self, name: &str) -> Result<ModelLease> {
        let mut loaded = self.shared.loaded();
        // A model whose thread panicked is no longer loaded.
        loaded.retain(|model| !matches!(model.engine.state(), EngineState::Dead(_)));
        let model = take(&mut loaded, name)?;
        let lease = model.lease();
        loaded.push(model);
        Ok(lease)
    }

    /// A model of the directory, loaded if necessary; others may be evicted for it.
    pub async fn choose(&self, name: &str) -> Result<ModelLease> {
        if self.default_engine().model().is_ok_and(|model| model.name == name) {
            return Ok(self.default_engine().clone().into());
        }
        if let Ok(lease) = self.get(name) {
            return Ok(lease);
        }
        let path = self.files().await.remove(name).ok_or_else(|| unknown(name))?;
        match self.spawn(name, path, true).await {
            // A concurrent request loaded it.
            Err(RegistryError::Loaded(_)) => self.get(name),
            done => done,
        }
    }

    /// Loads a model from its files, if there is room.
    pub async fn load(&self, name: &str, path: PathBuf) -> Result<()> {
        self.spawn(name, path, false).await.map(drop)
    }

    /// Unloads a model, after finishing its accepted requests within the timeout. Its memory is
    /// free when this returns.
    pub async fn unload(&self, name: &str) -> Result<()> {
        let model = take(&mut self.shared.loaded(), name)?;
        let end = Instant::now() + self.shared.settings.drain_timeout;
        // Requests that selected the model can still submit.
        let _ = timeout_at(end, model.leases.closed()).await;
        model.engine.retire(end.saturating_duration_since(Instant::now())).await;
        info!(name, "unloaded");
        Ok(())
    }

    /// Rejects new jobs and finishes accepted ones.
    pub fn drain(&self) {
        self.engines().iter().for_each(Engine::drain);
    }

    /// Returns when every accepted image has ended.
    pub async fn wait_idle(&self) {
        for engine in self.engines() {
            engine.wait_idle().await;
        }
    }

    /// Cancels what is not finished.
    pub fn abort(&self) {
        self.engines().iter().for_each(Engine::abort);
    }

    /// Loads in a separate task: if the client disconnects, loading continues for the next one.
    async fn spawn(&self, name: &str, path: PathBuf, evict: bool) -> Result<ModelLease> {
        let (models, name) = (self.clone(), name.to_owned());
        let load = tokio::spawn(async move { models.load_exclusively(name, path, evict).await });
        load.await.unwrap_or_else(|error| Err(RegistryError::Broken(error.to_string())))
    }

    async fn load_exclusively(
        self,
        name: String,
        path: PathBuf,
        evict: bool,
    ) -> Result<ModelLease> {
        let _one_at_a_time = self.shared.loading.lock().await;
        if self.get(&name).is_ok() {
            return Err(RegistryError::Loaded(name));
        }
        let (models, files) = (self.clone(), path.clone());
        let estimate_bytes = move || models.loader()?.estimate_bytes(&files).map_err(broken);
        let bytes = tokio::task::spawn_blocking(estimate_bytes).await.map_err(broken)??;
        // Nothing is evicted for a model that would not fit into all of the memory.
        let evict = evict && self.memory()?.is_none_or(|(taken, free)| bytes <= taken + free);
        let engine = loop {
            let refusal = match self.room(bytes) {
                Ok(()) => match self.start(&path).await {
                    Err(refusal @ RegistryError::NoRoom(_)) => refusal,
                    started => break started?,
                },
                Err(refusal) => refusal,
            };
            let oldest = self.loaded().first().map(|model| model.name.clone());
            match oldest.filter(|_| evict) {
                Some(oldest) => self.unload(&oldest).await?,
                None => return Err(refusal),
            }
        };
        info!(name, bytes, "loaded");
        let model = LoadedModel { name, path, engine, bytes, leases: watch::Sender::new(()) };
        let lease = model.lease();
        self.shared.loaded().push(model);
        Ok(lease)
    }

    /// Starts a model and waits until it is ready.
    async fn start(&self, path: &Path) -> Result<Engine> {
        let engine = self.loader()?.start(path).map_err(broken)?;
        let Err(error) = engine.ready().await else { return Ok(engine) };
        engine.retire(Duration::ZERO).await;
        let full = error.downcast_ref().is_some_and(|death: &WorkerError| death.out_of_memory);
        let refuse = if full { RegistryError::NoRoom } else { RegistryError::Broken };
        Err(refuse(error.to_string()))
    }

    fn loader(&self) -> Result<&dyn ModelLoader> {
        let loader = self.shared.loader.as_deref();
        loader.ok_or_else(|| RegistryError::Broken("this server has one model".into()))
    }

    /// Checks that weights of this size fit in addition to the loaded ones.
    fn room(&self, bytes: u64) -> Result<()> {
        let max_models = self.shared.settings.max_models;
        if self.shared.loaded().len() >= max_models {
            return Err(RegistryError::NoRoom(format!(
                "{max_models} models are loaded, the maximum"
            )));
        }
        match self.memory()? {
            Some((_, free)) if bytes > free => {
                Err(RegistryError::NoRoom(format!("it needs {bytes} bytes, and {free} are free")))
            }
            _ => Ok(()),
        }
    }

    /// Size of the loaded weights and of the free memory, in bytes, if known.
    fn memory(&self) -> Result<Option<(u64, u64)>> {
        let taken: u64 = self.shared.loaded().iter().map(|model| model.bytes).sum();
        let free = self.shared.settings.memory_bytes.map(|all| all.saturating_sub(taken));
        Ok(free.or(self.loader()?.free_bytes()).map(|free| (taken, free)))
    }
}

impl RegistryShared {
    fn loaded(&self) -> MutexGuard<'_, Vec<LoadedModel>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The models of a directory by name: its directories, and its single files without extension. If
/// two have one name, the directory is used, else the last file in alphabetical order: .safetensors
/// rather than .ckpt.
fn files(folder: &Path) -> BTreeMap<String, PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let (mut models, mut files) = (Vec::new(), Vec::new());
    for path in entries.map(|entry| entry.path()) {
        if path.join("model_index.json").is_file() {
            models.push((path.file_name().map(OsStr::to_owned), path));
        } else if is_checkpoint(&path) {
            files.push((path.file_stem().map(OsStr::to_owned), path));
        }
    }
    files.sort();
    let named = |(name, path): (Option<OsString>, PathBuf)| Some((name?.into_string().ok()?, path));
    files.into_iter().chain(models).filter_map(named).collect()
}

/// Removes a model from the loaded ones.
fn take(loaded: &mut Vec<LoadedModel>, name: &str) -> Result<LoadedModel> {
    let place = loaded.iter().position(|model| model.name == name);
    place.map(|place| loaded.remove(place)).ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> RegistryError {
    RegistryError::Unknown(name.into())
}

fn broken(error: impl fmt::Display) -> RegistryError {
    RegistryError::Broken(format!("{error:#}"))
}
