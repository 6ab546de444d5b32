//! Room for a model: what is missing, which models leave for it, and their end. Nothing is loaded
//! here.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, timeout_at};
use tracing::info;

use super::error::{RegistryError, Result};
use super::residents::{LoadedModel, ModelLease, Residents, Shortage};
use super::shared::RegistryShared;

/// A model to load.
#[derive(Debug, Clone)]
pub(super) struct Newcomer {
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Size of its weights.
    pub(super) bytes: u64,
    /// Whether the device was out of memory for it although there seemed to be room.
    pub(super) full: bool,
    /// Gone when the request no longer waits for it; `None`: it is loaded in any case.
    pub(super) wanted: Option<Weak<()>>,
}

/// The models that a waiting request needs to become idle, until this is dropped.
pub(super) struct Claim {
    registry: Arc<RegistryShared>,
    number: u64,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.registry.residents().release(self.number);
        self.registry.changed.send_replace(());
    }
}

/// How there is room for a newcomer.
pub(super) enum Room {
    /// A concurrent request has loaded it.
    Loaded(ModelLease),
    /// When these models have left; they may be none.
    Evicted(Vec<LoadedModel>),
}

impl RegistryShared {
    /// Claims the models that have to become idle for a newcomer. The result waits until one that is
    /// busy now is idle.
    pub(super) fn claim_room(
        self: &Arc<Self>,
        newcomer: &Newcomer,
        claim: &mut Option<Claim>,
    ) -> Result<impl Future<Output = ()> + use<>> {
        let shortage = self.shortage(newcomer)?;
        let mut residents = self.residents();
        let busy: Vec<_> = residents.loaded().iter().filter(|m| !m.is_idle()).cloned().collect();
        // If it is loaded, it is closed, and there is nothing to claim for it.
        let mut there_is_room = false;
        if residents.loaded().iter().all(|model| model.name != newcomer.name) {
            // After the list of busy models: one that became idle meanwhile is in either.
            there_is_room = residents.idle(&shortage).is_some();
            let number = claim.as_ref().map(|claim| claim.number);
            let models = residents.busy(&shortage).unwrap_or_default();
            let number = residents.claim(number, models);
            claim.get_or_insert_with(|| Claim { registry: Arc::clone(self), number });
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
    pub(super) fn retire(self: &Arc<Self>, model: &LoadedModel) {
        let (shared, model) = (Arc::clone(self), model.clone());
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
    pub(super) async fn left(&self, model: &LoadedModel) {
        let mut changed = self.changed.subscribe();
        // The sender lives as long as `self`.
        let _ = changed.wait_for(|()| !self.residents().is_leaving(model)).await;
    }

    /// Evicts idle models if there is no room.
    pub(super) fn make_room(
        self: &Arc<Self>,
        newcomer: &mut Newcomer,
        evict: bool,
    ) -> Result<Room> {
        let shortage = self.shortage(newcomer)?;
        newcomer.full = false;
        let mut residents = self.residents();
        if residents.closed {
            return Err(RegistryError::Stopping);
        }
        let name = &newcomer.name;
        let busy = |residents: &mut Residents| {
            let retry_after_s = residents.loaded().first().map_or(1, |m| m.engine.retry_after());
            Err(RegistryError::Busy { name: name.clone(), retry_after_s: retry_after_s.max(1) })
        };
        if residents.loaded().iter().any(|model| model.name == *name) {
            return match residents.closed_until(name, self.settings.turn).is_some() {
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
        // One whose thread dies at this moment has left by itself.
        let idle: Vec<_> =
            idle.into_iter().filter(|model| residents.leave(&model.name).is_ok()).collect();
        drop(residents);
        idle.iter().for_each(|model| self.retire(model));
        Ok(Room::Evicted(idle))
    }

    pub(super) fn has_models(&self) -> bool {
        let mut residents = self.residents();
        residents.loaded().len() + residents.leaving().len() > 0
    }

    /// What is missing for a model in addition to those in memory.
    fn shortage(&self, newcomer: &Newcomer) -> Result<Shortage> {
        let (settings, free) = (&self.settings, self.loader()?.free_bytes());
        let mut residents = self.residents();
        let count = residents.loaded().len() + residents.leaving().len();
        let free = settings.memory_bytes.map(|all| all.saturating_sub(residents.bytes())).or(free);
        let bytes = free.map_or(0, |free| newcomer.bytes.saturating_sub(free));
        let models = (count + 1).saturating_sub(settings.max_models);
        let full = newcomer.full && count > 0;
        let reason = match (models, free) {
            (1.., _) => format!("{count} models are loaded, the maximum of --max-models"),
            (_, Some(free)) => {
                let limit = match settings.memory_bytes {
                    Some(_) => "within --models-memory-bytes",
                    None => "in the host's memory",
                };
                format!("it needs {} bytes, and {free} are free {limit}", newcomer.bytes)
            }
            (_, None) => "the device is out of memory".into(),
        };
        Ok(Shortage { models: models.max(usize::from(full)), bytes, full, reason })
    }
}
