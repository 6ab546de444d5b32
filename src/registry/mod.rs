//! The models of a server: the default model, which is never unloaded, and models loaded by name.
//! In multi-model mode SageMaker loads and unloads them; otherwise they are the directories and
//! files of a directory, loaded on demand, and the least recently used idle one is evicted: a model
//! with accepted requests finishes them first, and the newcomer waits. All share one device: its
//! time, and the memory budget of a UNet call; each has its own queue. This folder does not read
//! model files: that is the [`ModelLoader`]'s task.
//!
//! Loading, unloading and eviction are tasks of their own: they complete whether or not the client
//! that asked still waits.

mod config;
mod error;
mod folder;
mod loading;
mod residents;
mod room;
mod shared;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sd_models::{AddOns, Source};
use tokio::time::{Instant, timeout_at};

use crate::engine::{Engine, EngineState};
pub use config::RegistryConfig;
pub use error::RegistryError;
use error::Result;
pub use residents::{LoadedModel, ModelLease};
pub use shared::ModelLoader;
use shared::RegistryShared;

/// Least time between two looks for models that nobody uses.
const MIN_LOOK: Duration = Duration::from_millis(10);

/// The handle shared by the HTTP handlers.
#[derive(Clone)]
pub struct ModelRegistry {
    shared: Arc<RegistryShared>,
}

/// A server with one model.
impl From<Engine> for ModelRegistry {
    fn from(default: Engine) -> Self {
        Self { shared: RegistryShared::new(default, None, RegistryConfig::default()) }
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
        Self { shared: RegistryShared::new(default, Some(Box::new(loader)), settings) }
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

    /// What requests can name beside models, with a model that is not loaded yet.
    pub fn add_ons(&self) -> AddOns {
        self.shared.loader().map_or_else(|_| AddOns::default(), ModelLoader::add_ons)
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
        let names = self.shared.read(move |shared| Ok(shared.names(&folder)));
        names.await.unwrap_or_default()
    }

    /// The files of the default model or of one of the directory, which is not loaded; of a server
    /// whose models SageMaker loads, of a loaded one. None of an unknown one.
    pub async fn source(&self, name: &str) -> Result<Option<Source>> {
        let is_default = self.default_engine().model().is_ok_and(|model| model.name == name);
        let loaded = self.loaded().into_iter().find(|model| model.name == name);
        let loaded = loaded.filter(|_| self.multi_model()).map(|model| model.path);
        let name = name.to_owned();
        let read = self.shared.read(move |shared| {
            let path = match loaded {
                _ if is_default => None,
                Some(path) => Some(path),
                None => Some(shared.path(&name)?),
            };
            shared.loader()?.source(path.as_deref()).map_err(RegistryError::damaged)
        });
        match read.await {
            Err(RegistryError::Unknown(_)) => Ok(None),
            read => read.map(Some),
        }
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
        let late = |_| RegistryError::Deadline;
        let waiting = Arc::new(());
        let mut changed = self.shared.changed.subscribe();
        let (mut known, mut claim) = (None, None);
        loop {
            changed.mark_unchanged();
            let closed = {
                let mut residents = self.shared.residents();
                let closed = residents.closed_until(name, self.shared.settings.turn);
                if closed.is_none()
                    && let Some(lease) = residents.select(name)
                {
                    return Ok(lease);
                }
                closed
            };
            if let Some(end) = closed {
                // It is loaded: it needs no room, and no turn of those who load models.
                claim = None;
                if timeout_at(end.min(deadline), changed.changed()).await.is_err()
                    && end >= deadline
                {
                    let retry_after_s = end.duration_since(deadline).as_secs() + 1;
                    return Err(RegistryError::Busy { name: name.to_owned(), retry_after_s });
                }
                continue;
            }
            let mut newcomer = match known.take() {
                Some(newcomer) => newcomer,
                None => timeout_at(deadline, self.shared.find(name)).await.map_err(late)??,
            };
            newcomer.wanted = Some(Arc::downgrade(&waiting));
            let load = self.shared.spawn(newcomer, true);
            let (back, loaded) = timeout_at(deadline, load).await.map_err(late)?;
            let Err(busy @ RegistryError::Busy { .. }) = loaded else { return loaded };
            let room = self.shared.claim_room(&back, &mut claim)?;
            known = Some(back);
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
        let name = name.to_owned();
        let find = self.shared.read(move |shared| shared.newcomer(name, path));
        self.shared.spawn(find.await?, false).await.1.map(drop)
    }

    /// Unloads a model, after finishing its accepted requests within the timeout. Its memory is
    /// free when this returns.
    pub async fn unload(&self, name: &str) -> Result<()> {
        let (model, first) = self.shared.residents().leave(name)?;
        if first {
            self.shared.retire(&model);
        }
        self.shared.left(&model).await;
        Ok(())
    }

    /// Unloads the models that nobody has used for as long as the settings say, as long as the
    /// registry exists.
    pub(crate) fn unload_unused(&self) -> impl Future<Output = ()> + 'static {
        /// How often they are looked for within that time.
        const LOOKS: u32 = 8;
        let (registry, after) = (Arc::downgrade(&self.shared), self.shared.settings.unload_after);
        async move {
            let Some(after) = after else { return };
            loop {
                tokio::time::sleep((after / LOOKS).max(MIN_LOOK)).await;
                let Some(shared) = registry.upgrade() else { return };
                let unused = shared.residents().take_unused(after);
                unused.iter().for_each(|model| shared.retire(model));
            }
        }
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
}
