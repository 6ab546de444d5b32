//! The engine: a bounded queue in front of one thread that owns the model.
//!
//! A handler hands over specs with [`Engine::submit`] and gets a [`Ticket`]; waiting on the ticket
//! yields the pictures, dropping it withdraws them. Pictures of different requests share UNet
//! evaluations and come and go between steps (`worker`). Nothing here knows HTTP, and nothing
//! outside `worker` touches a model.

mod batch;
mod device;
mod job;
mod model;
mod monitor;
mod pace;
mod queue;
mod shared;
mod state;
mod worker;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use std::{io, thread};

use sd_models::ModelInfo;
use tokio::sync::watch;

use crate::host::{gpu, memory};
use crate::telemetry::{GPUS, Id, Metrics};
pub use device::Device;
pub use job::{Client, Drawn, Failure, Job, Preview, Progress, Ticket};
pub use model::{Model, Trajectory};
pub use monitor::{Outlook, Watch};
use queue::{Queue, Refused};
use shared::Shared;
pub use state::{Death, Phase, Safety, Settings};

/// The handle that handlers share.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// Starts the model thread on a device of its own.
    pub fn start<M: Model>(
        settings: Settings,
        load: impl FnOnce() -> anyhow::Result<M> + Send + 'static,
    ) -> io::Result<Self> {
        Self::start_on(&Device::default(), settings, load)
    }

    /// Starts the model thread, which loads and warms the model and then serves the queue, taking
    /// turns with the other models of the device.
    pub fn start_on<M: Model>(
        device: &Device,
        settings: Settings,
        load: impl FnOnce() -> anyhow::Result<M> + Send + 'static,
    ) -> io::Result<Self> {
        let engine = Self::new(device, settings, Phase::Loading);
        let theirs = Arc::clone(&engine.shared);
        let work = move || {
            worker::main(theirs, load);
            // The model is gone; the next one needs its memory.
            sd_models::return_freed_memory();
        };
        let thread = thread::Builder::new().name("model".into()).spawn(work)?;
        *engine.shared.thread() = Some(thread);
        Ok(engine)
    }

    /// An engine without a model, for a server whose models are all chosen by name.
    pub fn absent(device: &Device, settings: Settings) -> Self {
        Self::new(device, settings, Phase::Absent)
    }

    fn new(device: &Device, settings: Settings, phase: Phase) -> Self {
        let shared = Shared {
            settings,
            queue: Mutex::new(Queue::new(settings.max_queue)),
            arrived: Condvar::new(),
            phase: watch::Sender::new(phase),
            pace: Mutex::default(),
            metrics: Arc::clone(&device.metrics),
            device: device.clone(),
            jobs: AtomicU64::new(0),
            busy: watch::Sender::new(()),
            thread: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Where the engine stands; never blocks.
    pub fn phase(&self) -> Phase {
        self.shared.phase.borrow().clone()
    }

    /// The model, if it is ready to draw.
    pub fn model(&self) -> Result<Arc<ModelInfo>, Failure> {
        match &*self.shared.phase.borrow() {
            Phase::Absent => Err(Failure::Absent),
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
            Phase::Dead(death) => Err(death.into()),
            other => Err(anyhow::anyhow!("the engine is not ready: {other:?}")),
        }
    }

    /// Queues one job: all of its pictures or none.
    pub fn submit(&self, job: impl Into<Job>) -> Result<Ticket, Failure> {
        let (model, job) = (self.model()?, job.into());
        let id = self.shared.jobs.fetch_add(1, Ordering::Relaxed);
        let (ticket, mut orders) =
            job::open(id, job, &self.shared.phase, &self.shared.busy, &self.shared.metrics);
        let refuse = |orders: Vec<job::Order>, failure: Failure| {
            orders.into_iter().for_each(|order| order.refuse(failure.clone()));
            failure
        };
        let budget = self.shared.budget();
        let too_large = |order: &job::Order| model.peak_bytes(&order.spec) > budget;
        if orders.iter().any(too_large) {
            return Err(refuse(orders, Failure::OutOfMemory));
        }
        let mut queue = self.shared.queue();
        // The queue's own word counts: the phase may have changed since.
        let pushed = queue.push(&mut orders);
        let retry_after_s = self.shared.retry_after(&queue, orders.len());
        drop(queue);
        match pushed {
            Ok(evicted) => drop(refuse(evicted, Failure::Full { retry_after_s })),
            Err(Refused::Full) => return Err(refuse(orders, Failure::Full { retry_after_s })),
            Err(Refused::Closed) => return Err(refuse(orders, Failure::Stopping)),
        }
        self.shared.arrived.notify_one();
        Ok(ticket)
    }

    /// Seconds until there should be room for one more picture.
    pub fn retry_after(&self) -> u64 {
        self.shared.retry_after(&self.shared.queue(), 1)
    }

    /// A view of the job of this ticket.
    pub fn watch(&self, ticket: &Ticket) -> Watch {
        Watch::new(&self.shared, ticket)
    }

    /// Rows of one evaluation.
    pub fn max_batch_rows(&self) -> usize {
        self.shared.settings.max_batch_rows
    }

    /// What becomes of pictures that should not be shown.
    pub fn safety(&self) -> Safety {
        self.shared.settings.safety
    }

    /// The measurements of this process.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Brings the gauges up to date. Takes milliseconds where there are GPUs.
    pub fn gauge(&self) {
        self.gauge_with(std::slice::from_ref(self));
    }

    /// Brings the gauges up to date; `all` are the engines of the device, this one included.
    pub fn gauge_with(&self, all: &[Self]) {
        let metrics = self.metrics();
        let set = |id, value: usize| metrics.set(id, &[], value as f64);
        set(Id::PicturesWaiting, all.iter().map(|engine| engine.shared.queue().len()).sum());
        set(Id::PicturesDrawing, all.iter().map(|engine| engine.shared.pace().pictures).sum());
        set(Id::Ready, usize::from(matches!(self.phase(), Phase::Ready(_))));
        let bytes = [
            (Id::BudgetBytes, self.shared.device.budget_bytes()),
            (Id::HostBytes, memory::resident()),
            (Id::HostAvailableBytes, memory::available()),
        ];
        for (id, bytes) in bytes {
            if let Some(bytes) = bytes {
                metrics.set(id, &[], bytes as f64);
            }
        }
        for (name, gpu) in GPUS.into_iter().zip(gpu::read()) {
            let values = [
                (Id::GpuUsedBytes, gpu.memory_used_bytes),
                (Id::GpuBytes, gpu.memory_bytes),
                (Id::GpuBusy, gpu.busy),
                (Id::GpuWatts, gpu.power_watts),
                (Id::GpuCelsius, gpu.temperature_celsius),
            ];
            for (id, value) in values {
                if let Some(value) = value {
                    metrics.set(id, &[name], value);
                }
            }
        }
    }

    /// Takes no more jobs and finishes those it has.
    pub fn drain(&self) {
        self.shared.queue().close();
        self.shared.enter(Phase::Draining);
        self.shared.arrived.notify_one();
    }

    /// Takes no more jobs, finishes those it has within `patience`, and returns when the model's
    /// memory is free.
    pub async fn retire(&self, patience: Duration) {
        self.drain();
        let Some(thread) = self.shared.thread().take() else { return };
        let ended = tokio::task::spawn_blocking(move || drop(thread.join()));
        let mut ended = std::pin::pin!(ended);
        if tokio::time::timeout(patience, ended.as_mut()).await.is_err() {
            self.stop();
            let _ = ended.await;
        }
    }

    /// Returns when every picture that was accepted has ended.
    pub async fn idle(&self) {
        self.shared.busy.closed().await;
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
            if let Phase::Dead(death) = &*phase.borrow_and_update() {
                return death.to_string();
            }
            if phase.changed().await.is_err() {
                return "the engine is gone".into();
            }
        }
    }
}
