//! The state shared by the handle and the model thread.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use sd_models::ModelInfo;
use tokio::sync::watch;

use super::device::DeviceScheduler;
use super::pace::Throughput;
use super::queue::Queue;
use super::state::{EngineConfig, EngineState};
use crate::telemetry::Metrics;

/// The queue, state and measurements of an engine.
#[derive(Debug)]
pub(super) struct EngineShared {
    pub(super) settings: EngineConfig,
    pub(super) queue: Mutex<Queue>,
    /// Signalled when a task arrives, when its files have been read, and when the queue closes.
    pub(super) arrived: Condvar,
    pub(super) state: watch::Sender<EngineState>,
    pub(super) pace: Mutex<Throughput>,
    pub(super) device: DeviceScheduler,
    pub(super) jobs: AtomicU64,
    /// Every task holds a receiver: without one, the engine is idle.
    pub(super) busy: watch::Sender<()>,
    pub(super) metrics: Arc<Metrics>,
    /// Whether the model thread can load its model again.
    pub(super) reloads: bool,
    /// Whether the model is in memory, and whether clients want it there.
    pub(super) rest: watch::Sender<Rest>,
    /// The model thread, until it is joined.
    pub(super) thread: Mutex<Option<thread::JoinHandle<()>>>,
}

/// Whether a model is in memory. It is unloaded only when it is idle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rest {
    /// Whether it is unloaded.
    pub(super) unloaded: bool,
    /// Whether it is to be unloaded.
    pub(super) unload: bool,
    /// Whether it is to be loaded again.
    pub(super) reload: bool,
    /// How often it could not be loaded again.
    pub(super) failures: u64,
}

impl EngineShared {
    /// The lock is held briefly, never across a model call.
    pub(super) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn thread(&self) -> MutexGuard<'_, Option<thread::JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pace(&self) -> Throughput {
        *self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory budget of one UNet call or VAE decode, in bytes.
    pub(super) fn budget(&self) -> u64 {
        self.device.budget_bytes().unwrap_or(u64::MAX)
    }

    /// Estimated time until there is room for this number of images, in seconds.
    pub(super) fn retry_after(&self, queue: &Queue, images: usize) -> u64 {
        let missing = (queue.len() + images).saturating_sub(self.settings.max_queue).max(1);
        self.pace().retry_after(missing, queue.len(), queue.work())
    }

    /// Rejects new jobs and finishes accepted ones.
    pub(super) fn drain(&self) {
        self.queue().close();
        self.set_state(EngineState::Draining);
        self.arrived.notify_one();
    }

    /// Tells the model thread what is wanted of the model's memory.
    pub(super) fn wish(&self, change: impl FnOnce(&mut Rest)) {
        // The thread looks at it under this lock, so it cannot miss the change.
        let queue = self.queue();
        self.rest.send_modify(change);
        drop(queue);
        self.arrived.notify_one();
    }

    /// The model as it was loaded again.
    pub(super) fn set_model(&self, info: ModelInfo) {
        self.state.send_if_modified(|state| {
            let ready = matches!(state, EngineState::Ready(_));
            if ready {
                *state = EngineState::Ready(Arc::new(info));
            }
            ready
        });
    }

    /// Changes to a later state; an earlier one is ignored.
    pub(super) fn set_state(&self, next: EngineState) {
        self.state.send_if_modified(|state| {
            let later = next.rank() > state.rank();
            if later {
                *state = next;
            }
            later
        });
    }
}
