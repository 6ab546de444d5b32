//! Observation of a job that does not own it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;

use super::job::{JobId, Preview, Progress, Shown, Stops, Ticket};
use super::shared::EngineShared;

/// The position of a job in the queue, and the time until it is completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Number of images ahead of it in the queue; `None` when it has started.
    pub position: Option<usize>,
    /// Time until it is completed; `None` as long as nothing was measured.
    pub left: Option<Duration>,
}

/// A view of a job, which may outlive the ticket.
#[derive(Debug, Clone)]
pub struct JobMonitor {
    job: JobId,
    shared: Arc<EngineShared>,
    progress: watch::Receiver<Progress>,
    previews: Option<watch::Receiver<Shown>>,
    stops: Arc<Stops>,
}

impl JobMonitor {
    /// A view of the job of this ticket.
    pub(super) fn new(shared: &Arc<EngineShared>, ticket: &Ticket) -> Self {
        let (progress, stops) = (ticket.progress(), Arc::clone(&ticket.stops));
        let (job, shared, previews) = (ticket.job, Arc::clone(shared), ticket.previews());
        Self { job, shared, progress, previews, stops }
    }

    /// Progress in UNet calls; changes with each.
    pub fn progress(&mut self) -> &mut watch::Receiver<Progress> {
        &mut self.progress
    }

    /// The current progress.
    pub fn current(&self) -> Progress {
        *self.progress.borrow()
    }

    /// Changes with each preview; `None` if none are requested.
    pub fn previews(&mut self) -> Option<&mut watch::Receiver<Vec<Preview>>> {
        self.previews.as_mut()
    }

    /// The latest preview.
    pub fn preview(&self) -> Option<Preview> {
        self.previews.as_ref()?.borrow().last().cloned()
    }

    /// Ends the job after the current step, with partly denoised images.
    pub fn interrupt(&self) {
        self.stops.all.store(true, Ordering::Relaxed);
    }

    /// Whether the job was interrupted.
    pub fn interrupted(&self) -> bool {
        self.stops.all.load(Ordering::Relaxed)
    }

    /// Ends the images of the job that run after the current step, partly denoised; the others
    /// follow. Without a running image the wish ends when the next one is admitted.
    pub fn skip(&self) {
        if self.progress.borrow().started > 0 {
            self.stops.skipped.store(true, Ordering::Relaxed);
            self.stops.running.store(true, Ordering::Relaxed);
        }
    }

    /// Whether images of the job were skipped.
    pub fn skipped(&self) -> bool {
        self.stops.skipped.load(Ordering::Relaxed)
    }

    /// The position of the job and the time until it is completed, if no job is added or cancelled.
    pub fn estimate(&self) -> Estimate {
        let place = self.shared.queue().place(self.job);
        let pace = self.shared.pace();
        if let Some((position, work)) = place {
            return Estimate { position: Some(position), left: pace.time(pace.work_left + work) };
        }
        let Progress { completed, total, started } = *self.progress.borrow();
        let left = pace.time_of((total - completed).div_ceil(started.max(1)));
        Estimate { position: None, left }
    }
}
