//! What the model thread knows of its images: those that run, those that wait for files, and what
//! those of each size take.

use std::collections::HashMap;
use std::iter::successors;
use std::ops::Deref;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use sd_models::{Error, ModelInfo, Rgb, Spec};
use tracing::error;

use super::files::{PendingFiles, Reader};
use crate::engine::batch::{DeficitRoundRobin, StepKind};
use crate::engine::job::{ImageTask, JobError};
use crate::engine::model::{Model, Trajectory};
use crate::engine::shared::EngineShared;
use crate::engine::state::EngineState;

/// Held by the thread. When the thread ends, by return or panic, this sets the state and empties
/// the queue.
pub(super) struct PanicGuard(pub(super) Arc<EngineShared>);

impl Deref for PanicGuard {
    type Target = EngineShared;

    fn deref(&self) -> &EngineShared {
        &self.0
    }
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if thread::panicking() {
            self.set_state(EngineState::Dead(
                anyhow::Error::msg("the model thread panicked").into(),
            ));
        }
        drop(self.queue().clear());
    }
}

/// A running image and its task.
pub(super) struct Slot<T> {
    pub(super) task: ImageTask,
    pub(super) trajectory: T,
    pub(super) begun: Instant,
    /// The decoded image, if only the safety check is left.
    pub(super) decoded: Option<Rgb>,
    /// Whether its job is interrupted: it is decoded without further steps.
    pub(super) interrupted: bool,
}

impl<T: Trajectory> Slot<T> {
    /// Whether only decoding and the safety check are left.
    pub(super) fn done(&self) -> bool {
        self.interrupted || self.trajectory.done()
    }

    /// The kind of its next step.
    pub(super) fn kind(&self) -> StepKind {
        let (size, enlarging) = (self.trajectory.size(), self.trajectory.enlarging());
        StepKind { size, enlarging }
    }
}

/// Rows and memory of the images of one kind of steps.
pub(super) struct KindLoad {
    pub(super) kind: StepKind,
    pub(super) rows: usize,
    pub(super) bytes: u64,
}

impl KindLoad {
    /// Sums rows and memory by kind.
    pub(super) fn all<'a>(
        info: &ModelInfo,
        images: impl Iterator<Item = (StepKind, &'a Spec)>,
    ) -> Vec<Self> {
        let mut loads: Vec<Self> = Vec::new();
        for (kind, spec) in images {
            let (rows, bytes) = (spec.rows(), info.step_bytes(spec, kind.size));
            match loads.iter_mut().find(|load| load.kind == kind) {
                Some(load) => (load.rows, load.bytes) = (load.rows + rows, load.bytes + bytes),
                None => loads.push(Self { kind, rows, bytes }),
            }
        }
        loads
    }
}

pub(super) struct Worker<M: Model> {
    /// Dropped first: the state changes before the running images are cancelled.
    pub(super) engine: PanicGuard,
    pub(super) model: M,
    pub(super) slots: Vec<Slot<M::Trajectory>>,
    pub(super) reading: Vec<PendingFiles>,
    /// The threads that had not ended when the queue was last searched, of images that are no
    /// longer wanted, too.
    pub(super) readers: Vec<Arc<Reader>>,
    /// Number of jobs that had arrived when the queue was last searched.
    pub(super) last_arrival: u64,
    pub(super) rotation: DeficitRoundRobin,
    /// Maximum rows per kind after the device was out of memory for more; until no image of that
    /// kind is left.
    pub(super) caps: HashMap<StepKind, usize>,
    /// The time that this model has used the device.
    pub(super) time_used: Duration,
    /// Duration of the last step, which limits the duration of one admission round.
    pub(super) last_step: Duration,
    /// Memory of the refiners that the budget does not count as free.
    pub(super) refiner_bytes: u64,
    /// Whether steps may have freed memory that the allocator keeps.
    pub(super) keeps_memory: bool,
    /// Whether the device is lost.
    pub(super) lost: bool,
}

impl<M: Model> Worker<M> {
    pub(super) fn new(model: M, engine: PanicGuard) -> Self {
        Self {
            engine,
            model,
            slots: Vec::new(),
            reading: Vec::new(),
            readers: Vec::new(),
            last_arrival: 0,
            rotation: DeficitRoundRobin::default(),
            caps: HashMap::new(),
            time_used: Duration::ZERO,
            last_step: Duration::ZERO,
            refiner_bytes: 0,
            // The warm-up has, too.
            keeps_memory: true,
            lost: false,
        }
    }

    /// Maximum number of rows per step of this kind.
    pub(super) fn max_rows(&self, kind: StepKind) -> usize {
        let rows = self.engine.settings.max_batch_rows;
        self.caps.get(&kind).map_or(rows, |cap| rows.min(*cap))
    }

    /// Rows and memory of the running images, by kind.
    pub(super) fn loads(&self) -> Vec<KindLoad> {
        KindLoad::all(self.model.info(), stepping(&self.slots))
    }

    /// Logs an error, only here, and returns what a client may know of it.
    pub(super) fn failure(&mut self, error: &Error, stage: &'static str) -> JobError {
        match error {
            Error::Spec { field, reason } => JobError::Spec { field, reason: reason.clone() },
            Error::OutOfMemory(_) => {
                error!(stage, "{}", chain(error));
                JobError::OutOfMemory
            }
            Error::DeviceLost(_) => {
                error!(stage, "device lost, restart required: {}", chain(error));
                self.lost = true;
                // Before any client receives the error, so that `/ping` already returns 503.
                self.engine.set_state(EngineState::DeviceLost);
                JobError::DeviceLost
            }
            _ => {
                error!(stage, "{}", chain(error));
                JobError::Model
            }
        }
    }
}

/// The images that still step, and the kinds of their steps.
pub(super) fn stepping<T: Trajectory>(
    slots: &[Slot<T>],
) -> impl Iterator<Item = (StepKind, &Spec)> {
    let stepping = slots.iter().filter(|slot| !slot.done());
    stepping.map(|slot| (slot.kind(), &slot.task.spec))
}

/// An error and its causes, in one line.
pub(super) fn chain(error: &Error) -> String {
    let causes = successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
