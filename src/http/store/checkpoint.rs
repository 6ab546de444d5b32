//! The model that AUTOMATIC1111's clients have chosen.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The model that was chosen for requests that name none; without it, the one that is there.
#[derive(Debug, Default, Clone)]
pub(crate) struct SelectedCheckpoint(Arc<Mutex<Option<String>>>);

impl SelectedCheckpoint {
    fn slot(&self) -> MutexGuard<'_, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self) -> Option<String> {
        self.slot().clone()
    }

    pub(crate) fn set(&self, name: &str) {
        *self.slot() = Some(name.to_owned());
    }
}
