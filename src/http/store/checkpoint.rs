//! The model that AUTOMATIC1111's clients have selected.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The model of requests that name none; if `None`, the default one.
#[derive(Debug, Default)]
pub(crate) struct SelectedCheckpoint(Mutex<Option<String>>);

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
