//! Loading a model from its files: one at a time, in a task of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::info;

use super::error::{RegistryError, Result};
use super::folder;
use super::residents::{LoadedModel, ModelLease};
use super::room::{Newcomer, Room};
use super::shared::RegistryShared;
use crate::engine::{Engine, WorkerError};

impl RegistryShared {
    /// A model of the directory, unless it could not be loaded a moment ago.
    pub(super) async fn find(self: &Arc<Self>, name: &str) -> Result<Newcomer> {
        let name = name.to_owned();
        let find = move |shared: &Self| {
            let path = shared.path(&name)?;
            shared.check_failures(&path)?;
            shared.newcomer(name, path)
        };
        self.read(find).await
    }

    /// Where the files of a model of the directory are. Blocks.
    pub(super) fn path(&self, name: &str) -> Result<PathBuf> {
        let folder = self.settings.folder.as_deref();
        let path = folder.and_then(|folder| folder::models(folder).remove(name));
        path.ok_or_else(|| RegistryError::unknown(name))
    }

    /// Measures a model. Blocks.
    pub(super) fn newcomer(&self, name: String, path: PathBuf) -> Result<Newcomer> {
        let bytes = self.loader()?.estimate_bytes(&path).map_err(RegistryError::damaged)?;
        Ok(Newcomer { name, path, bytes, full: false, wanted: None })
    }

    /// Loads in a separate task: if the client disconnects, loading continues for the next one.
    pub(super) async fn spawn(
        self: &Arc<Self>,
        newcomer: Newcomer,
        evict: bool,
    ) -> (Newcomer, Result<ModelLease>) {
        let (models, mut model) = (Arc::clone(self), newcomer.clone());
        let load = tokio::spawn(async move {
            let loaded = models.load_exclusively(&mut model, evict).await;
            (model, loaded)
        });
        load.await.unwrap_or_else(|error| (newcomer, Err(RegistryError::broken(error))))
    }

    async fn load_exclusively(
        self: &Arc<Self>,
        model: &mut Newcomer,
        evict: bool,
    ) -> Result<ModelLease> {
        let _one_at_a_time = self.loading.lock().await;
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
                Err(error @ (RegistryError::Broken(_) | RegistryError::Damaged(_))) => {
                    let (path, failure) = (model.path.clone(), error.clone());
                    let remember = move |shared: &Self| {
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
        let leases = watch::Sender::new(());
        let now = Instant::now();
        let model = LoadedModel { name, path, engine, bytes, since: now, used: now, leases };
        let lease = model.lease();
        self.residents().insert(model)?;
        self.changed.send_replace(());
        Ok(lease)
    }

    /// Starts a model and waits until it is ready.
    async fn start(&self, path: &Path) -> Result<Engine> {
        let engine = self.loader()?.start(path).map_err(RegistryError::broken)?;
        self.residents().starting = Some(engine.clone());
        let ready = engine.ready().await;
        let closed = {
            let mut residents = self.residents();
            residents.starting = None;
            residents.closed
        };
        let Err(error) = ready else { return Ok(engine) };
        if closed {
            // Nothing waits for its thread, which may load for minutes more.
            return Err(RegistryError::Stopping);
        }
        engine.retire(Duration::ZERO).await;
        let refuse = match error.downcast_ref() {
            Some(WorkerError { out_of_memory: true, .. }) => RegistryError::NoRoom,
            Some(WorkerError { of_files: true, .. }) => RegistryError::Damaged,
            _ => RegistryError::Broken,
        };
        Err(refuse(error.to_string()))
    }
}
