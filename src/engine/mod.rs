//! The engine: a bounded queue in front of one thread that owns the model.
//!
//! A handler hands over specs with [`Engine::submit`] and gets a [`Ticket`]; waiting on the ticket
//! yields the pictures, dropping it withdraws them. Pictures of different requests share UNet
//! evaluations and come and go between steps (`worker`). Nothing here knows HTTP, and nothing
//! outside `worker` touches a model.

mod batch;
mod job;
mod queue;
mod worker;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

use sd_models::{ModelInfo, Rgb, Size, Spec};
use tokio::sync::watch;
use tokio::time::Instant;

pub use job::{Drawn, Failure, Progress, Ticket};
use queue::{Queue, Refused};

/// What the worker drives: `sd_models::Pipeline`, or a fake in tests.
pub trait Model: 'static {
    /// A picture in the making.
    type Trajectory: Trajectory;
    /// Name, device, defaults and limits.
    fn info(&self) -> &ModelInfo;
    /// Encodes the text and draws the noise.
    fn begin(&self, spec: &Spec) -> sd_models::Result<Self::Trajectory>;
    /// One evaluation for each member; all have the same size.
    fn step(&self, batch: &mut [&mut Self::Trajectory]) -> sd_models::Result<()>;
    /// The picture of a finished trajectory.
    fn decode(&self, trajectory: &Self::Trajectory) -> sd_models::Result<Rgb>;
}

/// What the worker must know of a picture in the making.
pub trait Trajectory {
    /// Whether nothing is left but to decode it.
    fn done(&self) -> bool;
    /// Evaluations made and to make.
    fn progress(&self) -> (usize, usize);
    /// Rows that one evaluation takes in a batch.
    fn rows(&self) -> usize;
    /// Pictures of one size can share an evaluation.
    fn size(&self) -> Size;
    /// What the client should know, such as a prompt that was cut.
    fn warnings(&self) -> &[String];
}

/// The bounds of the engine.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Pictures that may wait for a place in a batch.
    pub max_queue: usize,
    /// Rows of one UNet evaluation; a picture with guidance takes two.
    pub max_batch_rows: usize,
}

/// Where the engine stands. It moves downwards only.
#[derive(Debug, Clone)]
pub enum Phase {
    /// The model is being fetched, read or warmed.
    Loading,
    /// Pictures are drawn.
    Ready(Arc<ModelInfo>),
    /// What was accepted is finished; nothing more is taken.
    Draining,
    /// What was accepted and is not finished will not be.
    Stopped,
    /// The device is gone, and every picture with it; only a new process can help.
    DeviceLost,
    /// The model thread ended; the sentence says why.
    Dead(String),
}

/// The handle that handlers share.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// What the handle and the model thread have in common.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    queue: Mutex<Queue>,
    /// Signalled when an order arrives and when the queue closes.
    arrived: Condvar,
    phase: watch::Sender<Phase>,
}

impl Engine {
    /// Starts the model thread, which loads and warms the model and then serves the queue.
    pub fn start<M: Model>(
        settings: Settings,
        load: impl FnOnce() -> anyhow::Result<M> + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            settings,
            queue: Mutex::new(Queue::new(settings.max_queue)),
            arrived: Condvar::new(),
            phase: watch::Sender::new(Phase::Loading),
        });
        let theirs = Arc::clone(&shared);
        thread::Builder::new().name("model".into()).spawn(move || worker::main(theirs, load))?;
        Ok(Self { shared })
    }

    /// Where the engine stands; never blocks.
    pub fn phase(&self) -> Phase {
        self.shared.phase.borrow().clone()
    }

    /// The model, if it is ready to draw.
    pub fn model(&self) -> Result<Arc<ModelInfo>, Failure> {
        match &*self.shared.phase.borrow() {
            Phase::Loading => Err(Failure::Loading),
            Phase::Ready(info) => Ok(Arc::clone(info)),
            Phase::Draining | Phase::Stopped => Err(Failure::Stopping),
            Phase::DeviceLost => Err(Failure::DeviceLost),
            Phase::Dead(_) => Err(Failure::Model),
        }
    }

    /// Waits until the model can draw; the error says why it never will.
    pub async fn ready(&self) -> anyhow::Result<Arc<ModelInfo>> {
        let mut phase = self.shared.phase.subscribe();
        let settled = phase.wait_for(|phase| !matches!(phase, Phase::Loading)).await?.clone();
        match settled {
            Phase::Ready(info) => Ok(info),
            Phase::Dead(reason) => Err(anyhow::Error::msg(reason)),
            other => Err(anyhow::anyhow!("the engine is not ready: {other:?}")),
        }
    }

    /// Queues one job: all of its pictures or none.
    pub fn submit(&self, specs: Vec<Spec>, deadline: Option<Instant>) -> Result<Ticket, Failure> {
        self.model()?;
        let (ticket, orders) = job::open(specs, deadline, self.shared.phase.subscribe());
        // The queue's own word counts: the phase may have changed since.
        match self.shared.queue().push(orders) {
            Ok(()) => {}
            Err(Refused::Full) => return Err(Failure::Full),
            Err(Refused::Closed) => return Err(Failure::Stopping),
        }
        self.shared.arrived.notify_one();
        Ok(ticket)
    }

    /// Takes no more jobs and finishes those it has.
    pub fn drain(&self) {
        self.shared.queue().close();
        self.shared.enter(Phase::Draining);
    }

    /// Gives up what is not finished; every ticket says so at once.
    pub fn stop(&self) {
        self.shared.enter(Phase::Stopped);
        // The worker looks at the phase under this lock: it cannot miss the change.
        drop(self.shared.queue().clear());
        self.shared.arrived.notify_one();
    }

    /// Returns when the model thread has ended by itself, with the reason.
    pub async fn died(&self) -> String {
        let mut phase = self.shared.phase.subscribe();
        loop {
            if let Phase::Dead(reason) = &*phase.borrow_and_update() {
                return reason.clone();
            }
            if phase.changed().await.is_err() {
                return "the engine is gone".into();
            }
        }
    }
}

impl Shared {
    /// The lock is held for a few moves of pointers and never across a model call.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves to a later phase; an earlier one is ignored.
    fn enter(&self, next: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = next.rank() > phase.rank();
            if later {
                *phase = next;
            }
            later
        });
    }
}

impl Phase {
    fn rank(&self) -> u8 {
        match self {
            Self::Loading => 0,
            Self::Ready(_) => 1,
            Self::Draining => 2,
            Self::Stopped => 3,
            Self::DeviceLost => 4,
            Self::Dead(_) => 5,
        }
    }
}

impl Model for sd_models::Pipeline {
    type Trajectory = sd_models::Trajectory;

    fn info(&self) -> &ModelInfo {
        self.info()
    }

    fn begin(&self, spec: &Spec) -> sd_models::Result<Self::Trajectory> {
        self.begin(spec)
    }

    fn step(&self, batch: &mut [&mut Self::Trajectory]) -> sd_models::Result<()> {
        self.step(batch)
    }

    fn decode(&self, trajectory: &Self::Trajectory) -> sd_models::Result<Rgb> {
        self.decode(trajectory)
    }
}

impl Trajectory for sd_models::Trajectory {
    fn done(&self) -> bool {
        self.done()
    }

    fn progress(&self) -> (usize, usize) {
        self.progress()
    }

    fn rows(&self) -> usize {
        self.rows()
    }

    fn size(&self) -> Size {
        self.size()
    }

    fn warnings(&self) -> &[String] {
        self.warnings()
    }
}
