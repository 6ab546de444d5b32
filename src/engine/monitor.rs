//! A view of a job from outside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::job::{JobId, Progress, Ticket};
use super::shared::EngineShared;

/// Where a job stands, for those who wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Pictures ahead of it in the queue; `None` when it has begun.
    pub position: Option<usize>,
    /// Until it is done, as far as can be told.
    pub left: Option<Duration>,
}

/// A view of a job that does not hold it: it may be kept when the ticket is gone.
#[derive(Debug, Clone)]
pub struct JobMonitor {
    job: JobId,
    shared: Arc<EngineShared>,
    progress: watch::Receiver<Progress>,
    interrupted: Arc<AtomicBool>,
}

impl JobMonitor {
    /// A view of the job of this ticket.
    pub(super) fn new(shared: &Arc<EngineShared>, ticket: &Ticket) -> Self {
        let (progress, interrupted) = (ticket.progress(), Arc::clone(&ticket.interrupted));
        Self { job: ticket.job, shared: Arc::clone(shared), progress, interrupted }
    }

    /// Evaluations made and to make; changes with each.
    pub fn progress(&mut self) -> &mut watch::Receiver<Progress> {
        &mut self.progress
    }

    /// Evaluations made and to make.
    pub fn current(&self) -> Progress {
        *self.progress.borrow()
    }

    /// Ends the drawing after the step that is being made: the job comes to what there is of it.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
    }

    /// Where the job stands. An estimate: it does not know who is still to come or to leave.
    pub fn outlook(&self) -> Estimate {
        let place = self.shared.queue().place(self.job);
        let pace = self.shared.pace();
        if let Some((position, work)) = place {
            return Estimate { position: Some(position), left: pace.time(pace.drawing + work) };
        }
        let Progress { completed, total, started } = *self.progress.borrow();
        Estimate {
            position: None,
            left: pace.time_of((total - completed).div_ceil(started.max(1))),
        }
    }
}
