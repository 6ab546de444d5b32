//! The models of a server: the default model, which is never unloaded, and models loaded by name.
//! In multi-model mode SageMaker loads and unloads them; otherwise they are the directories and
//! files of a directory, loaded on demand, and the least recently used idle one is evicted: a model
//! with accepted requests finishes them first, and the newcomer waits. All share one device: its
//! time, and the memory budget of a UNet call; each has its own queue. This file does not read
//! model files: that is the [`ModelLoader`]'s task.
//!
//! Loading, unloading and eviction are tasks of their own: they complete whether or not the client
//! that asked still waits.

mod config;
mod error;
mod folder;
mod residents;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use std::{fmt, io};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};
use tracing::info;

use crate::engine::{Engine, EngineState, WorkerError};
pub use config::RegistryConfig;
pub use error::RegistryError;
use error::Result;
pub use residents::{LoadedModel, ModelLease};
use residents::{Residents, Shortage};

/// Maximum number of threads that look at the files of models, which may be on a slow file system.
const MAX_READERS: usize = 4;

/// Time for which a model that could not be loaded is not tried again, unless its files change: each
/// try may evict another model.
const FAILURE_RETENTION: Duration = Duration::from_secs(60);

/// Starts an engine for the files of a model.
pub trait ModelLoader: Send + Sync + 'static {
    /// Size of the weights in memory, in bytes, from the headers of the files. Blocks, and may
    /// download files that the model lacks.
    fn estimate_bytes(&self, path: &Path) -> anyhow::Result<u64>;
    /// Starts loading the model.
    fn start(&self, path: &Path) -> io::Result<Engine>;
    /// Memory available for weights on the device, in bytes, if known.
    fn free_bytes(&self) -> Option<u64>;
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
    residents: Mutex<Residents>,
    /// Sent when a model was loaded or unloaded, and when a waiting request has left.
    changed: watch::Sender<()>,
    /// Held while a model is loaded: two at once would count on the same free memory. Nobody waits
    /// under it for a model to become idle.
    loading: tokio::sync::Mutex<()>,
    readers: Arc<Semaphore>,
    /// Models that could not be loaded, by path: the files, when, and why.
    failures: Mutex<HashMap<PathBuf, (folder::Version, Instant, RegistryError)>>,
}

/// A model to load.
#[derive(Debug, Clone)]
struct Newcomer {
    name: String,
    path: PathBuf,
    /// Size of its weights.
    bytes: u64,
    /// Whether the device was out of memory for it although there seemed to be room.
    full: bool,
    /// Gone when the request no longer waits for it; `None`: it is loaded in any case.
    wanted: Option<Weak<()>>,
}

/// The models that a waiting request needs to become idle, until this is dropped.
struct Claim {
    registry: ModelRegistry,
    number: u64,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.registry.shared.residents().release(self.number);
        self.registry.shared.changed.send_replace(());
    }
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
        let readers = Arc::new(Semaphore::new(MAX_READERS));
        let (residents, changed, loading, failures) = Default::default();
        let shared = RegistryShared {
            default,
            loader,
            settings,
            residents,
            changed,
            loading,
            readers,
            failures,
        };
        Self { shared: Arc::new(shared) }
    }

    /// The model the server was started with; its engine is `Absent` if all are loaded by name.
    pub fn default_engine(&self) -> &Engine {
        &self.shared.default
    }

    /// Whether SageMaker loads and unloads the models.
    pub fn multi_model(&self) -> bool {
        self.shared.settings.multi_model
    }

    /// The directory below which the models of SageMaker must be.
    pub fn multi_model_root(&self) -> &Path {
        &self.shared.settings.multi_model_root
    }

    /// The models loaded by name, the most recently used last.
    pub fn loaded(&self) -> Vec<LoadedModel> {
        self.shared.residents().loaded().to_vec()
    }

    /// All engines, including those of models that are being loaded or unloaded.
    pub fn engines(&self) -> Vec<Engine> {
        let mut engines = vec![self.default_engine().clone()];
        engines.extend(self.shared.residents().engines());
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
        let Some(folder) = self.shared.settings.folder.clone() else { return Vec::new() };
        let names = self.read(move |_| Ok(folder::models(&folder).into_keys().collect()));
        names.await.unwrap_or_default()
    }

    /// A loaded model, which becomes the most recently used.
    pub fn get(&self, name: &str) -> Result<ModelLease> {
        self.shared.residents().select(name).ok_or_else(|| RegistryError::unknown(name))
    }

    /// A model of the directory, loaded if necessary. Idle models may be evicted for it; if none is
    /// idle, this waits until `deadline` for one.
    pub async fn choose(&self, name: &str, deadline: Instant) -> Result<ModelLease> {
        if self.default_engine().model().is_ok_and(|model| model.name == name) {
            return Ok(self.default_engine().clone().into());
        }
        let ready = {
            let mut residents = self.shared.residents();
            if residents.is_claimed(name) { None } else { residents.select(name) }
        };
        if let Some(lease) = ready {
            return Ok(lease);
        }
        let late = |_| RegistryError::Deadline;
        let mut newcomer = timeout_at(deadline, self.find(name)).await.map_err(late)??;
        let waiting = Arc::new(());
        newcomer.wanted = Some(Arc::downgrade(&waiting));
        let mut changed = self.shared.changed.subscribe();
        let mut claim = None;
        loop {
            changed.mark_unchanged();
            let load = self.spawn(newcomer, true);
            let (back, loaded) = timeout_at(deadline, load).await.map_err(late)?;
            let Err(busy @ RegistryError::Busy { .. }) = loaded else { return loaded };
            newcomer = back;
            let room = self.claim_room(&newcomer, &mut claim)?;
            let retry = async {
                tokio::select! {
                    _ = changed.changed() => {}
                    () = room => {}
                }
            };
            timeout_at(deadline, retry).await.map_err(|_| busy)?;
        }
    }

    /// Loads a model from its files, if there is room.
    pub async fn load(&self, name: &str, path: PathBuf) -> Result<()> {
        let (name, loader) = (name.to_owned(), self.clone());
        let find = self.read(move |_| loader.newcomer(name, path));
        self.spawn(find.await?, false).await.1.map(drop)
    }

    /// Unloads a model, after finishing its accepted requests within the timeout. Its memory is
    /// free when this returns.
    pub async fn unload(&self, name: &str) -> Result<()> {
        let (model, first) = self.shared.residents().leave(name)?;
        if first {
            self.retire(&model);
        }
        self.left(&model).await;
        Ok(())
    }

    /// Rejects new jobs and models, and finishes accepted ones.
    pub fn drain(&self) {
        self.shared.residents().closed = true;
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

    /// Runs `work`, which looks at files, on a blocking thread. The thread is counted until it
    /// ends, whether or not a request still waits.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&RegistryShared) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = Arc::clone(&self.shared.readers).acquire_owned().await;
        let shared = Arc::clone(&self.shared);
        let work = move || {
            let _held = permit;
            work(&shared)
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(RegistryError::broken(e)))
    }

    /// A model of the directory, unless it could not be loaded a moment ago.
    async fn find(&self, name: &str) -> Result<Newcomer> {
        let (name, registry) = (name.to_owned(), self.clone());
        let find = move |shared: &RegistryShared| {
            let folder = shared.settings.folder.as_deref();
            let path = folder.and_then(|folder| folder::models(folder).remove(&name));
            let path = path.ok_or_else(|| RegistryError::unknown(&name))?;
            shared.check_failures(&path)?;
            registry.newcomer(name, path)
        };
        self.read(find).await
    }

    /// Measures a model. Blocks.
    fn newcomer(&self, name: String, path: PathBuf) -> Result<Newcomer> {
        let bytes = self.loader()?.estimate_bytes(&path).map_err(RegistryError::broken)?;
        Ok(Newcomer { name, path, bytes, full: false, wanted: None })
    }

    /// Claims the models that have to become idle for a newcomer. The result waits until one that is
    /// busy now is idle.
    fn claim_room(
        &self,
        newcomer: &Newcomer,
        claim: &mut Option<Claim>,
    ) -> Result<impl Future<Output = ()> + use<>> {
        let shortage = self.shortage(newcomer)?;
        let mut residents = self.shared.residents();
        let busy: Vec<_> = residents.loaded().iter().filter(|m| !m.is_idle()).cloned().collect();
        // If it is loaded, it is claimed itself, and there is nothing to claim for it.
        let mut there_is_room = false;
        if residents.loaded().iter().all(|model| model.name != newcomer.name) {
            // After the list of busy models: one that became idle meanwhile is in either.
            there_is_room = residents.idle(&shortage).is_some();
            let number = claim.as_ref().map(|claim| claim.number);
            let models = residents.busy(&shortage).unwrap_or_default();
            let number = residents.claim(number, models);
            claim.get_or_insert_with(|| Claim { registry: self.clone(), number });
        }
        let mut idle: FuturesUnordered<_> =
            busy.into_iter().map(|model| async move { model.idle().await }).collect();
        Ok(async move {
            if !there_is_room && idle.next().await.is_none() {
                std::future::pending::<()>().await;
            }
        })
    }

    /// Unloads a model that was taken from the loaded ones.
    fn retire(&self, model: &LoadedModel) {
        let (shared, model) = (Arc::clone(&self.shared), model.clone());
        tokio::spawn(async move {
            let end = Instant::now() + shared.settings.drain_timeout;
            // Requests that selected the model can still submit.
            let _ = timeout_at(end, model.leases.closed()).await;
            model.engine.retire(end.saturating_duration_since(Instant::now())).await;
            info!(name = model.name, "unloaded");
            shared.residents().left(&model);
            shared.changed.send_replace(());
        });
    }

    /// Returns when a model has left.
    async fn left(&self, model: &LoadedModel) {
        let mut changed = self.shared.changed.subscribe();
        // The sender lives as long as `self`.
        let _ = changed.wait_for(|()| !self.shared.residents().is_leaving(model)).await;
    }

    /// Loads in a separate task: if the client disconnects, loading continues for the next one.
    async fn spawn(&self, newcomer: Newcomer, evict: bool) -> (Newcomer, Result<ModelLease>) {
        let (models, mut model) = (self.clone(), newcomer.clone());
        let load = tokio::spawn(async move {
            let loaded = models.load_exclusively(&mut model, evict).await;
            (model, loaded)
        });
        load.await.unwrap_or_else(|error| (newcomer, Err(RegistryError::broken(error))))
    }

    async fn load_exclusively(&self, model: &mut Newcomer, evict: bool) -> Result<ModelLease> {
        let _one_at_a_time = self.shared.loading.lock().await;
        if model.wanted.as_ref().is_some_and(|waiting| waiting.strong_count() == 0) {
            return Err(RegistryError::Deadline);
        }
        let engine = loop {
            let idle = match self.make_room(model, evict)? {
                Room::Loaded(lease) => return Ok(lease),
                Room::Evicted(models) => models,
            };
            for evicted in idle {
                self.left(&evicted).await;
            }
            match self.start(&model.path).await {
                Err(RegistryError::NoRoom(_)) if evict && self.has_models() => model.full = true,
                Err(error @ RegistryError::Broken(_)) => {
                    let (path, failure) = (model.path.clone(), error.clone());
                    let remember = move |shared: &RegistryShared| {
                        shared.remember_failure(path, failure);
                        Ok(())
                    };
                    self.read(remember).await?;
                    return Err(error);
                }
                started => break started?,
            }
        };
        let (name, path, bytes) = (model.name.clone(), model.path.clone(), model.bytes);
        info!(name, bytes, "loaded");
        let model = LoadedModel { name, path, engine, bytes, leases: watch::Sender::new(()) };
        let lease = model.lease();
        self.shared.residents().insert(model)?;
        self.shared.changed.send_replace(());
        Ok(lease)
    }

    /// Evicts idle models if there is no room.
    fn make_room(&self, newcomer: &mut Newcomer, evict: bool) -> Result<Room> {
        let shortage = self.shortage(newcomer)?;
        newcomer.full = false;
        let mut residents = self.shared.residents();
        if residents.closed {
            return Err(RegistryError::Stopping);
        }
        let name = &newcomer.name;
        let busy = |residents: &mut Residents| {
            let retry_after_s = residents.loaded().first().map_or(1, |m| m.engine.retry_after());
            Err(RegistryError::Busy { name: name.clone(), retry_after_s: retry_after_s.max(1) })
        };
        if residents.loaded().iter().any(|model| model.name == *name) {
            return match residents.is_claimed(name) {
                _ if !evict => Err(RegistryError::Loaded(name.clone())),
                true => busy(&mut residents),
                false => residents
                    .select(name)
                    .map(Room::Loaded)
                    .ok_or_else(|| RegistryError::unknown(name)),
            };
        }
        if shortage.is_over() {
            return Ok(Room::Evicted(Vec::new()));
        }
        // Nothing is evicted for a model that would not fit into all of the memory.
        if !evict || residents.busy(&shortage).is_none() {
            return Err(RegistryError::NoRoom(shortage.reason));
        }
        let Some(idle) = residents.idle(&shortage) else {
            newcomer.full = shortage.full;
            return busy(&mut residents);
        };
        for model in &idle {
            residents.leave(&model.name)?;
        }
        drop(residents);
        idle.iter().for_each(|model| self.retire(model));
        Ok(Room::Evicted(idle))
    }

    /// Starts a model and waits until it is ready.
    async fn start(&self, path: &Path) -> Result<Engine> {
        let engine = self.loader()?.start(path).map_err(RegistryError::broken)?;
        self.shared.residents().starting = Some(engine.clone());
        let ready = engine.ready().await;
        let closed = {
            let mut residents = self.shared.residents();
            residents.starting = None;
            residents.closed
        };
        let Err(error) = ready else { return Ok(engine) };
        if closed {
            // Nothing waits for its thread, which may load for minutes more.
            return Err(RegistryError::Stopping);
        }
        engine.retire(Duration::ZERO).await;
        let full = error.downcast_ref().is_some_and(|death: &WorkerError| death.out_of_memory);
        let refuse = if full { RegistryError::NoRoom } else { RegistryError::Broken };
        Err(refuse(error.to_string()))
    }

    fn has_models(&self) -> bool {
        let mut residents = self.shared.residents();
        residents.loaded().len() + residents.leaving().len() > 0
    }

    fn loader(&self) -> Result<&dyn ModelLoader> {
        let loader = self.shared.loader.as_deref();
        loader.ok_or_else(|| RegistryError::broken("this server has one model"))
    }

    /// What is missing for a model in addition to those in memory.
    fn shortage(&self, newcomer: &Newcomer) -> Result<Shortage> {
        let (settings, free) = (&self.shared.settings, self.loader()?.free_bytes());
        let mut residents = self.shared.residents();
        let count = residents.loaded().len() + residents.leaving().len();
        let free = settings.memory_bytes.map(|all| all.saturating_sub(residents.bytes())).or(free);
        let bytes = free.map_or(0, |free| newcomer.bytes.saturating_sub(free));
        let models = (count + 1).saturating_sub(settings.max_models);
        let full = newcomer.full && count > 0;
        let reason = match (models, free) {
            (1.., _) => format!("{} models are loaded, the maximum", settings.max_models),
            (_, Some(free)) => format!("it needs {} bytes, and {free} are free", newcomer.bytes),
            (_, None) => "the device is out of memory".into(),
        };
        Ok(Shortage { models: models.max(usize::from(full)), bytes, full, reason })
    }
}

/// How there is room for a newcomer.
enum Room {
    /// A concurrent request has loaded it.
    Loaded(ModelLease),
    /// When these models have left; they may be none.
    Evicted(Vec<LoadedModel>),
}

impl RegistryShared {
    fn residents(&self) -> MutexGuard<'_, Residents> {
        self.residents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error of a model whose files have not changed since it could not be loaded. Blocks.
    fn check_failures(&self, path: &Path) -> Result<()> {
        let failures = || self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures().retain(|_, (_, at, _)| at.elapsed() < FAILURE_RETENTION);
        let known = failures().get(path).cloned();
        match known {
            Some((version, _, error)) if version == folder::version(path) => Err(error),
            _ => Ok(()),
        }
    }

    /// Blocks.
    fn remember_failure(&self, path: PathBuf, error: RegistryError) {
        let failure = (folder::version(&path), Instant::now(), error);
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.insert(path, failure);
    }
}
