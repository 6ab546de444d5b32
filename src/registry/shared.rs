//! The state of the registry, and the threads that look at the files of models.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sd_models::{AddOns, FileVersion, Source};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::config::RegistryConfig;
use super::error::{RegistryError, Result};
use super::folder;
use super::residents::Residents;
use crate::engine::Engine;

/// Maximum number of threads that look at the files of models, which may be on a slow file system.
const MAX_READERS: usize = 4;

/// Time for which a model that could not be loaded is not tried again, unless its files change: each
/// try may evict another model.
const FAILURE_RETENTION: Duration = Duration::from_secs(60);

/// Number of files that were looked at, at which all are looked at again.
const MAX_SEEN: usize = 10_000;

/// Starts an engine for the files of a model.
pub trait ModelLoader: Send + Sync + 'static {
    /// Size of the weights in memory, in bytes, from the headers of the files. Blocks, and may
    /// download files that the model lacks.
    fn estimate_bytes(&self, path: &Path) -> anyhow::Result<u64>;
    /// Starts loading the model.
    fn start(&self, path: &Path) -> io::Result<Engine>;
    /// The files of a model, for another model that is to read them; `None` is the default one.
    /// Blocks, and may download files that the model lacks.
    fn source(&self, _path: Option<&Path>) -> anyhow::Result<Source> {
        anyhow::bail!("it has no files")
    }
    /// Memory available for weights on the device, in bytes, if known.
    fn free_bytes(&self) -> Option<u64>;
    /// Whether a file holds a model, as far as its header tells. Blocks.
    fn is_model(&self, _file: &Path) -> bool {
        true
    }
    /// What requests can name beside the models.
    fn add_ons(&self) -> AddOns {
        AddOns::default()
    }
}

/// What the handles and the tasks of the registry share.
pub(super) struct RegistryShared {
    pub(super) default: Engine,
    loader: Option<Box<dyn ModelLoader>>,
    pub(super) settings: RegistryConfig,
    residents: Mutex<Residents>,
    /// Sent when a model was loaded or unloaded, and when a waiting request has left.
    pub(super) changed: watch::Sender<()>,
    /// Held while a model is loaded: two at once would count on the same free memory. Nobody waits
    /// under it for a model to become idle.
    pub(super) loading: tokio::sync::Mutex<()>,
    readers: Arc<Semaphore>,
    /// Models that could not be loaded, by path.
    failures: Mutex<HashMap<PathBuf, Failure>>,
    /// Whether files hold models, by path.
    seen: Mutex<HashMap<PathBuf, (FileVersion, bool)>>,
}

/// The files of a model that could not be loaded, when, and why.
type Failure = (folder::Version, Instant, RegistryError);

impl RegistryShared {
    pub(super) fn new(
        default: Engine,
        loader: Option<Box<dyn ModelLoader>>,
        settings: RegistryConfig,
    ) -> Arc<Self> {
        let readers = Arc::new(Semaphore::new(MAX_READERS));
        let (residents, changed, loading, failures, seen) = Default::default();
        Arc::new(Self {
            default,
            loader,
            settings,
            residents,
            changed,
            loading,
            readers,
            failures,
            seen,
        })
    }

    pub(super) fn residents(&self) -> MutexGuard<'_, Residents> {
        self.residents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn loader(&self) -> Result<&dyn ModelLoader> {
        let loader = self.loader.as_deref();
        loader.ok_or_else(|| RegistryError::broken("this server has one model"))
    }

    /// Runs `work`, which looks at files, on a blocking thread. The thread is counted until it
    /// ends, whether or not a request still waits.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = Arc::clone(&self.readers).acquire_owned().await;
        let shared = Arc::clone(self);
        let work = move || {
            let _held = permit;
            work(&shared)
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(RegistryError::broken(e)))
    }

    /// The names of the models of a directory, without those of files that hold something else, such
    /// as LoRAs. Blocks.
    pub(super) fn names(&self, folder: &Path) -> Vec<String> {
        let models = folder::models(folder);
        let listed = models.iter().filter(|(_, path)| path.is_dir() || self.is_model(path));
        listed.map(|(name, _)| name.clone()).collect()
    }

    /// Whether a file holds a model; each version of it is looked at once.
    fn is_model(&self, file: &Path) -> bool {
        let (Ok(loader), Ok(data)) = (self.loader(), file.metadata()) else { return true };
        let version = FileVersion::of(&data);
        let seen = || self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let known = seen().get(file).filter(|known| known.0 == version).map(|known| known.1);
        known.unwrap_or_else(|| {
            // Without the lock: a slow disk takes long.
            let is_model = loader.is_model(file);
            let mut seen = seen();
            if seen.len() >= MAX_SEEN {
                seen.clear();
            }
            seen.insert(file.to_owned(), (version, is_model));
            is_model
        })
    }

    /// The error of a model whose files have not changed since it could not be loaded. Blocks.
    pub(super) fn check_failures(&self, path: &Path) -> Result<()> {
        let known = self.failures().get(path).cloned();
        match known {
            Some((version, _, error)) if version == folder::version(path) => Err(error),
            _ => Ok(()),
        }
    }

    /// Blocks.
    pub(super) fn remember_failure(&self, path: PathBuf, error: RegistryError) {
        let failure = (folder::version(&path), Instant::now(), error);
        self.failures().insert(path, failure);
    }

    /// The failures of the last [`FAILURE_RETENTION`].
    fn failures(&self) -> MutexGuard<'_, HashMap<PathBuf, Failure>> {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.retain(|_, (_, at, _)| at.elapsed() < FAILURE_RETENTION);
        failures
    }
}
