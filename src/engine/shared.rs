//! What the handle and the model thread have in common.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::sync::watch;

use super::device::Device;
use super::pace::Pace;
use super::queue::Queue;
use super::state::{Phase, Settings};
use crate::telemetry::Metrics;

/// What the handle and the model thread have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) settings: Settings,
    pub(super) queue: Mutex<Queue>,
    /// Signalled when an order arrives, when its files have been read, and when the queue closes.
    pub(super) arrived: Condvar,
    pub(super) phase: watch::Sender<Phase>,
    pub(super) pace: Mutex<Pace>,
    pub(super) device: Device,
    pub(super) jobs: AtomicU64,
    /// Every order holds a receiver: without one, nothing is left to do.
    pub(super) busy: watch::Sender<()>,
    pub(super) metrics: Arc<Metrics>,
    /// The model thread, until somebody waits for its end.
    pub(super) thread: Mutex<Option<thread::JoinHandle<()>>>,
}

impl Shared {
    /// The lock is held for a few moves of pointers and never across a model call.
    pub(super) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn thread(&self) -> MutexGuard<'_, Option<thread::JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pace(&self) -> Pace {
        *self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that one evaluation or decoding may take.
    pub(super) fn budget(&self) -> u64 {
        self.device.budget_bytes().unwrap_or(u64::MAX)
    }

    /// Seconds until there should be room for so many more pictures.
    pub(super) fn retry_after(&self, queue: &Queue, pictures: usize) -> u64 {
        let missing = (queue.len() + pictures).saturating_sub(self.settings.max_queue).max(1);
        self.pace().retry_after(missing, queue.len(), queue.work())
    }

    /// Moves to a later phase; an earlier one is ignored.
    pub(super) fn enter(&self, next: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = next.rank() > phase.rank();
            if later {
                *phase = next;
            }
            later
        });
    }
}
