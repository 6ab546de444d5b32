//! The models of a server: the one that it was started on, which stays, and those that come and go
//! by name while it runs. SageMaker loads and unloads them itself; or they are the directories and files
//! of a folder, loaded when they are asked for, and the one that has not been used for longest makes
//! room. All share one device: turns, the memory of an evaluation, the queue's bounds for each.
//! Where files come from and how a model starts is the [`ModelLoader`]'s business.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fmt, io};

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tracing::info;

use crate::engine::{Engine, EngineState, WorkerError};
use crate::source::is_checkpoint;

/// How to get an engine for the files of a model.
pub trait ModelLoader: Send + Sync + 'static {
    /// Bytes that its weights will take, from the headers of its files.
    fn estimate_bytes(&self, path: &Path) -> anyhow::Result<u64>;
    /// Begins to load it.
    fn start(&self, path: &Path) -> io::Result<Engine>;
    /// Bytes that weights can still have on the device, where that is known.
    fn free_bytes(&self) -> Option<u64>;
}

/// The bounds of the models that come and go.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// How many may be loaded.
    pub max_models: usize,
    /// What their weights may take in all; what the device has left when absent.
    pub memory_bytes: Option<u64>,
    /// The folder whose directories and single files are models.
    pub folder: Option<PathBuf>,
    /// Whether SageMaker says which models are loaded.
    pub multi_model: bool,
    /// How long a model that has to go may finish what it has accepted.
    pub patience: Duration,
}

/// Why a model is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// There is one of this name.
    #[error("the model {0:?} is already loaded")]
    Loaded(String),
    /// There is none of this name.
    #[error("the model {0:?} does not exist")]
    Unknown(String),
    /// Others must go first.
    #[error("not enough room for the model: {0}")]
    NoRoom(String),
    /// Its files are not a model.
    #[error("the model cannot be loaded: {0}")]
    Broken(String),
}

/// A loaded model.
#[derive(Debug, Clone)]
pub struct LoadedModel {
    /// What it is called.
    pub name: String,
    /// Where its files are.
    pub path: PathBuf,
    engine: Engine,
    bytes: u64,
    /// Everybody who has chosen it and may still submit holds a receiver.
    chosen: watch::Sender<()>,
}

/// A model that a request means. It stays, within reason, until this is dropped.
#[derive(Debug, Clone)]
pub struct ModelLease {
    /// Where its pictures are drawn.
    pub engine: Engine,
    /// Of a model that comes and goes.
    _stays: Option<watch::Receiver<()>>,
}

impl From<Engine> for ModelLease {
    fn from(engine: Engine) -> Self {
        Self { engine, _stays: None }
    }
}

impl LoadedModel {
    fn choose(&self) -> ModelLease {
        ModelLease { engine: self.engine.clone(), _stays: Some(self.chosen.subscribe()) }
    }
}

/// The handle that handlers share.
#[derive(Clone)]
pub struct ModelRegistry {
    shared: Arc<RegistryShared>,
}

struct RegistryShared {
    first: Engine,
    library: Option<Box<dyn ModelLoader>>,
    settings: RegistryConfig,
    /// The one used last at the end.
    loaded: Mutex<Vec<LoadedModel>>,
    /// Held while one is loaded: two at a time would count on the same memory.
    loading: tokio::sync::Mutex<()>,
}

/// A server with one model.
impl From<Engine> for ModelRegistry {
    fn from(first: Engine) -> Self {
        let patience = Duration::ZERO;
        let none = RegistryConfig {
            max_models: 0,
            memory_bytes: None,
            folder: None,
            multi_model: false,
            patience,
        };
        Self::build(first, None, none)
    }
}

impl fmt::Debug for ModelRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.loaded()).finish()
    }
}

impl ModelRegistry {
    /// Models from a loader, beside the default one.
    pub fn new(first: Engine, library: impl ModelLoader, settings: RegistryConfig) -> Self {
        Self::build(first, Some(Box::new(library)), settings)
    }

    fn build(
        first: Engine,
        library: Option<Box<dyn ModelLoader>>,
        settings: RegistryConfig,
    ) -> Self {
        let (loaded, loading) = Default::default();
        Self { shared: Arc::new(RegistryShared { first, library, settings, loaded, loading }) }
    }

    /// The one that the server was started on; absent where all are chosen by name.
    pub fn default_engine(&self) -> &Engine {
        &self.shared.first
    }

    /// Whether SageMaker says which models are loaded.
    pub fn multi_model(&self) -> bool {
        self.shared.settings.multi_model
    }

    /// Those that are loaded, the one used last at the end.
    pub fn loaded(&self) -> Vec<LoadedModel> {
        self.shared.loaded().clone()
    }

    /// Every engine.
    pub fn engines(&self) -> Vec<Engine> {
        let mut engines = vec![self.default_engine().clone()];
        engines.extend(self.loaded().into_iter().map(|model| model.engine));
        engines
    }

    /// Where the server stands: a device that is lost is lost for all.
    pub fn state(&self) -> EngineState {
        let lost = |engine: &Engine| matches!(engine.state(), EngineState::DeviceLost);
        if self.engines().iter().any(lost) {
            EngineState::DeviceLost
        } else {
            self.default_engine().state()
        }
    }

    /// The names in the folder, sorted.
    pub async fn names(&self) -> Vec<String> {
        self.files().await.into_keys().collect()
    }

    /// The models of the folder, which may be far away: it is read on another thread.
    async fn files(&self) -> BTreeMap<String, PathBuf> {
        let Some(folder) = self.shared.settings.folder.clone() else { return BTreeMap::new() };
        let files = tokio::task::spawn_blocking(move || files(&folder)).await;
        files.unwrap_or_default()
    }

    /// A model that is loaded. It counts as used.
    pub fn get(&self, name: &str) -> Result<ModelLease, RegistryError> {
        let mut loaded = self.shared.loaded();
        // One that panicked is as good as gone.
        loaded.retain(|model| !matches!(model.engine.state(), EngineState::Dead(_)));
        let place = loaded.iter().position(|model| model.name == name);
        let model = place.map(|place| loaded.remove(place));
        let model = model.ok_or_else(|| RegistryError::Unknown(name.into()))?;
        let chosen = model.choose();
        loaded.push(model);
        Ok(chosen)
    }

    /// A model of the folder, loaded if need be, for which others may have to go.
    pub async fn choose(&self, name: &str) -> Result<ModelLease, RegistryError> {
        if self.default_engine().model().is_ok_and(|model| model.name == name) {
            return Ok(self.default_engine().clone().into());
        }
        if let Ok(chosen) = self.get(name) {
            return Ok(chosen);
        }
        let path =
            self.files().await.remove(name).ok_or_else(|| RegistryError::Unknown(name.into()))?;
        match self.spawn(name, path, true).await {
            // Somebody else asked for it first.
            Err(RegistryError::Loaded(_)) => self.get(name),
            done => done,
        }
    }

    /// Loads a model from its files, if there is room.
    pub async fn load(&self, name: &str, path: PathBuf) -> Result<(), RegistryError> {
        self.spawn(name, path, false).await.map(drop)
    }

    /// Unloads a model. What it has accepted is finished, within reason; its memory is free when
    /// this returns.
    pub async fn unload(&self, name: &str) -> Result<(), RegistryError> {
        let gone = {
            let mut loaded = self.shared.loaded();
            let place = loaded.iter().position(|model| model.name == name);
            place
                .map(|place| loaded.remove(place))
                .ok_or_else(|| RegistryError::Unknown(name.into()))?
        };
        let end = Instant::now() + self.shared.settings.patience;
        // Who has chosen it and not submitted yet is let in.
        let _ = timeout_at(end, gone.chosen.closed()).await;
        gone.engine.retire(end.saturating_duration_since(Instant::now())).await;
        info!(name, "unloaded");
        Ok(())
    }

    /// Takes no more jobs and finishes those there are.
    pub fn drain(&self) {
        self.engines().iter().for_each(Engine::drain);
    }

    /// Returns when every picture that was accepted has ended.
    pub async fn wait_idle(&self) {
        for engine in self.engines() {
            engine.wait_idle().await;
        }
    }

    /// Gives up what is not finished.
    pub fn abort(&self) {
        self.engines().iter().for_each(Engine::abort);
    }

    /// Loads in a task of its own: when the client leaves, the next one finds the model loaded.
    async fn spawn(
        &self,
        name: &str,
        path: PathBuf,
        evict: bool,
    ) -> Result<ModelLease, RegistryError> {
        let (models, name) = (self.clone(), name.to_owned());
        let load = tokio::spawn(async move { models.load_exclusively(name, path, evict).await });
        load.await.unwrap_or_else(|error| Err(RegistryError::Broken(error.to_string())))
    }

    async fn load_exclusively(
        self,
        name: String,
        path: PathBuf,
        evict: bool,
    ) -> Result<ModelLease, RegistryError> {
        let _one_at_a_time = self.shared.loading.lock().await;
        if self.get(&name).is_ok() {
            return Err(RegistryError::Loaded(name));
        }
        let (models, files) = (self.clone(), path.clone());
        let estimate_bytes = move || models.library()?.estimate_bytes(&files).map_err(broken);
        let bytes = tokio::task::spawn_blocking(estimate_bytes).await.map_err(broken)??;
        // Nobody goes for one that is too large for all of it.
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
        let model = LoadedModel { name, path, engine, bytes, chosen: watch::Sender::new(()) };
        let chosen = model.choose();
        self.shared.loaded().push(model);
        Ok(chosen)
    }

    /// A model that is ready.
    async fn start(&self, path: &Path) -> Result<Engine, RegistryError> {
        let engine = self.library()?.start(path).map_err(broken)?;
        let Err(error) = engine.ready().await else { return Ok(engine) };
        engine.retire(Duration::ZERO).await;
        let full = error.downcast_ref().is_some_and(|death: &WorkerError| death.out_of_memory);
        let refuse = if full { RegistryError::NoRoom } else { RegistryError::Broken };
        Err(refuse(error.to_string()))
    }

    fn library(&self) -> Result<&dyn ModelLoader, RegistryError> {
        let library = self.shared.library.as_deref();
        library.ok_or_else(|| RegistryError::Broken("this server has one model".into()))
    }

    /// Whether weights of this size fit beside those that are there.
    fn room(&self, bytes: u64) -> Result<(), RegistryError> {
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

    /// Bytes of the weights that are loaded, and those that there is room for beside them, where
    /// that is known.
    fn memory(&self) -> Result<Option<(u64, u64)>, RegistryError> {
        let taken: u64 = self.shared.loaded().iter().map(|model| model.bytes).sum();
        let free = self.shared.settings.memory_bytes.map(|all| all.saturating_sub(taken));
        Ok(free.or(self.library()?.free_bytes()).map(|free| (taken, free)))
    }
}

impl RegistryShared {
    fn loaded(&self) -> MutexGuard<'_, Vec<LoadedModel>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The models of a folder: its directories, and its single files without their endings. Of two with
/// one name the directory counts, or the file that comes last in the alphabet: a .safetensors
/// before a .ckpt.
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

fn broken(error: impl fmt::Display) -> RegistryError {
    RegistryError::Broken(format!("{error:#}"))
}
