//! The models in memory. Plain data; the registry locks it, never while it waits.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::error::{RegistryError, Result};
use crate::engine::{Engine, EngineState};

/// A loaded model.
#[derive(Debug, Clone)]
pub struct LoadedModel {
    /// Its name.
    pub name: String,
    /// The path of its files.
    pub path: PathBuf,
    pub(super) engine: Engine,
    /// Size of the weights.
    pub(super) bytes: u64,
    /// When it was loaded.
    pub(super) since: Instant,
    /// When it was last seen in use.
    pub(super) used: Instant,
    /// Every lease holds a receiver: without one, no request can still be submitted.
    pub(super) leases: watch::Sender<()>,
}

/// The model selected by a request. As long as one exists, the model is not evicted, and unloading
/// waits, up to a timeout.
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
    pub(super) fn lease(&self) -> ModelLease {
        ModelLease { engine: self.engine.clone(), _lease: Some(self.leases.subscribe()) }
    }

    /// Whether no request has selected it and every accepted image has ended.
    pub(super) fn is_idle(&self) -> bool {
        self.leases.receiver_count() == 0 && self.engine.is_idle()
    }

    /// Waits until it is idle. It may be selected again at once.
    pub(super) async fn idle(&self) {
        self.leases.closed().await;
        self.engine.wait_idle().await;
    }

    fn is(&self, other: &Self) -> bool {
        self.engine.is(&other.engine)
    }
}

/// What has to be unloaded before a model can be loaded.
#[derive(Debug, Clone)]
pub(super) struct Shortage {
    /// Number of models.
    pub(super) models: usize,
    /// Size of their weights.
    pub(super) bytes: u64,
    /// Whether one of the models is for a device that was out of memory.
    pub(super) full: bool,
    /// What there is too little of.
    pub(super) reason: String,
}

impl Shortage {
    pub(super) fn is_over(&self) -> bool {
        self.models == 0 && self.bytes == 0
    }
}

/// The models in memory.
#[derive(Debug, Default)]
pub(super) struct Residents {
    /// In order of use, the most recently used last.
    loaded: Vec<LoadedModel>,
    /// Being unloaded: not selectable, but in memory.
    leaving: Vec<LoadedModel>,
    /// The engine of the model that is being loaded.
    pub(super) starting: Option<Engine>,
    /// The models that have to become idle for each waiting request. They are closed at times:
    /// otherwise a request could wait for ever for room.
    claims: BTreeMap<u64, Vec<LoadedModel>>,
    /// Since when there have been claims.
    claimed: Option<Instant>,
    next_claim: u64,
    /// Whether the server drains, so that nothing more is loaded.
    pub(super) closed: bool,
}

impl Residents {
    /// The loaded models. One whose thread has panicked is no longer loaded.
    pub(super) fn loaded(&mut self) -> &[LoadedModel] {
        self.loaded.retain(|model| !matches!(model.engine.state(), EngineState::Dead(_)));
        &self.loaded
    }

    pub(super) fn leaving(&self) -> &[LoadedModel] {
        &self.leaving
    }

    /// Every engine, of models that come and go too.
    pub(super) fn engines(&self) -> impl Iterator<Item = Engine> {
        let models = self.loaded.iter().chain(&self.leaving);
        models.map(|model| model.engine.clone()).chain(self.starting.clone())
    }

    /// Adds a model that was loaded, the most recently used. If the server drains, the model is
    /// dropped, which ends it.
    pub(super) fn insert(&mut self, model: LoadedModel) -> Result<()> {
        if self.closed {
            return Err(RegistryError::Stopping);
        }
        self.loaded.push(model);
        Ok(())
    }

    /// A loaded model, which becomes the most recently used.
    pub(super) fn select(&mut self, name: &str) -> Option<ModelLease> {
        let place = self.loaded().iter().position(|model| model.name == name)?;
        let mut model = self.loaded.remove(place);
        model.used = Instant::now();
        let lease = model.lease();
        self.loaded.push(model);
        Some(lease)
    }

    /// Until when a loaded model takes no new request; `None`: it takes them. A claimed model does
    /// every other turn: its accepted requests may take longer than the waiting one waits. The turns
    /// do not depend on which claims there are, so that many close it no longer than one.
    pub(super) fn closed_until(&mut self, name: &str, turn: Duration) -> Option<Instant> {
        self.loaded();
        let model = self.loaded.iter().find(|model| model.name == name)?;
        let is_claimed = self.claims.values().flatten().any(|claimed| claimed.is(model));
        let since = self.claimed.filter(|_| is_claimed)?.max(model.since);
        let turns = since.elapsed().as_millis() / turn.as_millis().max(1);
        let end = u32::try_from(turns + 1).ok().and_then(|turns| turn.checked_mul(turns))?;
        (turns % 2 == 1).then_some(since + end)
    }

    /// Adds models to a claim, or to a new one. Returns its number.
    pub(super) fn claim(&mut self, number: Option<u64>, models: Vec<LoadedModel>) -> u64 {
        self.next_claim += 1;
        let number = number.unwrap_or(self.next_claim);
        self.claimed.get_or_insert_with(Instant::now);
        let claimed = self.claims.entry(number).or_default();
        let new = models.into_iter().filter(|model| !claimed.iter().any(|other| other.is(model)));
        let new: Vec<_> = new.collect();
        claimed.extend(new);
        number
    }

    pub(super) fn release(&mut self, claim: u64) {
        self.claims.remove(&claim);
        if self.claims.is_empty() {
            self.claimed = None;
        }
    }

    /// Takes a model from the loaded ones, to unload it. If it is already leaving, waiting for its
    /// end is all there is to do.
    pub(super) fn leave(&mut self, name: &str) -> Result<(LoadedModel, bool)> {
        if let Some(place) = self.loaded().iter().position(|model| model.name == name) {
            let model = self.loaded.remove(place);
            self.leaving.push(model.clone());
            return Ok((model, true));
        }
        let leaving = self.leaving.iter().find(|model| model.name == name);
        leaving.map(|model| (model.clone(), false)).ok_or_else(|| RegistryError::unknown(name))
    }

    /// Takes the models from the loaded ones that nobody has used for so long, to unload them.
    pub(super) fn take_unused(&mut self, after: Duration) -> Vec<LoadedModel> {
        self.loaded();
        for model in self.loaded.iter_mut().filter(|model| !model.is_idle()) {
            model.used = Instant::now();
        }
        let unused = self.loaded.extract_if(.., |model| model.used.elapsed() >= after);
        let unused: Vec<_> = unused.collect();
        self.leaving.extend(unused.iter().cloned());
        unused
    }

    pub(super) fn is_leaving(&self, model: &LoadedModel) -> bool {
        self.leaving.iter().any(|other| other.is(model))
    }

    /// The memory of a model is free.
    pub(super) fn left(&mut self, model: &LoadedModel) {
        self.leaving.retain(|other| !other.is(model));
    }

    /// Size of the weights in memory.
    pub(super) fn bytes(&mut self) -> u64 {
        self.loaded();
        self.loaded.iter().chain(&self.leaving).map(|model| model.bytes).sum()
    }

    /// The least recently used idle models that end a shortage; `None` if too few are idle.
    pub(super) fn idle(&self, shortage: &Shortage) -> Option<Vec<LoadedModel>> {
        enough(self.loaded.iter().filter(|model| model.is_idle()), shortage)
    }

    /// The least recently used models that end a shortage once they are idle. Models that are
    /// leaving count first. `None` if all of them are not enough.
    pub(super) fn busy(&self, shortage: &Shortage) -> Option<Vec<LoadedModel>> {
        enough(self.leaving.iter().chain(&self.loaded), shortage)
    }
}

fn enough<'a>(
    models: impl Iterator<Item = &'a LoadedModel>,
    shortage: &Shortage,
) -> Option<Vec<LoadedModel>> {
    let (mut missing, mut bytes, mut chosen) = (shortage.models, shortage.bytes, Vec::new());
    for model in models {
        if missing == 0 && bytes == 0 {
            break;
        }
        missing = missing.saturating_sub(1);
        bytes = bytes.saturating_sub(model.bytes);
        chosen.push(model.clone());
    }
    (missing == 0 && bytes == 0).then_some(chosen)
}
