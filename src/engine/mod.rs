//! The engine: a bounded queue in front of one thread that owns the model.
//!
//! A handler submits specs with [`Engine::submit`] and gets a [`Ticket`]; waiting on the ticket
//! yields the images, dropping it cancels them. Images of different requests share UNet calls, and
//! join and leave between steps (`worker`). Nothing here depends on HTTP, and nothing outside
//! `worker` uses a model.

mod batch;
mod client;
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

use anyhow::Context as _;
use sd_models::ModelInfo;
use tokio::sync::watch;

use crate::host::{gpu, memory};
use crate::telemetry::{self, Metrics};
pub use client::{Client, Priority};
pub use device::DeviceScheduler;
pub use job::{GeneratedImage, Job, JobError, Preview, Previews, Progress, Ticket, Uncounted};
pub use model::{Model, ReadFiles, Running, Trajectory};
pub use monitor::{Estimate, JobMonitor};
use queue::{PushError, Queue};
use shared::EngineShared;
pub(crate) use state::is_out_of_memory;
pub use state::{EngineConfig, EngineState, Safety, WorkerError};

/// The handle shared by the HTTP handlers. When the last one is dropped, accepted jobs are finished
/// and the model thread ends, which frees the model's memory.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<EngineShared>,
    _handle: Arc<DrainOnDrop>,
}

/// Owned by the handles alone: the model thread holds the shared state, too.
#[derive(Debug)]
struct DrainOnDrop(Arc<EngineShared>);

impl Drop for DrainOnDrop {
    fn drop(&mut self) {
        self.0.drain();
    }
}

impl Engine {
    /// Starts the model thread on a device of its own.
    pub fn start<M: Model>(
        settings: EngineConfig,
        load: impl FnOnce() -> anyhow::Result<M> + Send + 'static,
    ) -> io::Result<Self> {
        Self::start_on(&DeviceScheduler::default(), settings, load)
    }

    /// Starts the model thread, which loads and warms up the model and then serves the queue.
    /// Models of the same device take turns.
    pub fn start_on<M: Model>(
        device: &DeviceScheduler,
        settings: EngineConfig,
        load: impl FnOnce() -> anyhow::Result<M> + Send + 'static,
    ) -> io::Result<Self> {
        let mut load = Some(load);
        let once = move || load.take().context("a model is loaded once")?();
        Self::start_thread(device, settings, false, once)
    }

    /// The same with a model that can be loaded again: it is unloaded on request, and after
    /// [`EngineConfig::unload_after`] without an image.
    pub fn start_reloading<M: Model>(
        device: &DeviceScheduler,
        settings: EngineConfig,
        load: impl FnMut() -> anyhow::Result<M> + Send + 'static,
    ) -> io::Result<Self> {
        Self::start_thread(device, settings, true, load)
    }

    fn start_thread<M: Model>(
        device: &DeviceScheduler,
        settings: EngineConfig,
        reloads: bool,
        load: impl FnMut() -> anyhow::Result<M> + Send + 'static,
    ) -> io::Result<Self> {
        let engine = Self::new(device, settings, EngineState::Loading, reloads);
        let shared = Arc::clone(&engine.shared);
        let scheduler = device.clone();
        let work = move || {
            worker::main(shared, load);
            // The model is dropped; the next one needs its memory, and the others have more.
            sd_models::return_freed_memory();
            scheduler.forget_budget();
        };
        let thread = thread::Builder::new().name("model".into()).spawn(work)?;
        *engine.shared.thread() = Some(thread);
        Ok(engine)
    }

    /// An engine without a model, for a server whose models are all loaded by name.
    pub fn absent(device: &DeviceScheduler, settings: EngineConfig) -> Self {
        Self::new(device, settings, EngineState::Absent, false)
    }

    fn new(
        device: &DeviceScheduler,
        settings: EngineConfig,
        state: EngineState,
        reloads: bool,
    ) -> Self {
        let shared = EngineShared {
            settings,
            queue: Mutex::new(Queue::new(settings.max_queue)),
            arrived: Condvar::new(),
            state: watch::Sender::new(state),
            pace: Mutex::default(),
            metrics: Arc::clone(&device.metrics),
            device: device.clone(),
            jobs: AtomicU64::new(0),
            busy: watch::Sender::new(()),
            reloads,
            rest: watch::Sender::default(),
            thread: Mutex::default(),
        };
        let shared = Arc::new(shared);
        Self { _handle: Arc::new(DrainOnDrop(Arc::clone(&shared))), shared }
    }

    /// Whether this is a handle of the same engine.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// The state of the engine. Never blocks.
    pub fn state(&self) -> EngineState {
        self.shared.state.borrow().clone()
    }

    /// The model, if it is ready.
    pub fn model(&self) -> Result<Arc<ModelInfo>, JobError> {
        match &*self.shared.state.borrow() {
            EngineState::Absent => Err(JobError::Absent),
            EngineState::Loading => Err(JobError::Loading),
            EngineState::Ready(info) => Ok(Arc::clone(info)),
            EngineState::Draining | EngineState::Stopped => Err(JobError::Stopping),
            EngineState::DeviceLost => Err(JobError::DeviceLost),
            EngineState::Dead(_) => Err(JobError::Model),
        }
    }

    /// Waits until the model is ready; the error states why it cannot be loaded.
    pub async fn ready(&self) -> anyhow::Result<Arc<ModelInfo>> {
        let mut state = self.shared.state.subscribe();
        let settled = state.wait_for(|state| !matches!(state, EngineState::Loading)).await?.clone();
        match settled {
            EngineState::Ready(info) => Ok(info),
            EngineState::Dead(death) => Err(death.into()),
            other => Err(anyhow::anyhow!("the engine is not ready: {other:?}")),
        }
    }

    /// Whether the model is in memory. One that is ready may be unloaded, until it is needed.
    pub fn is_loaded(&self) -> bool {
        self.model().is_ok() && !self.shared.rest.borrow().unloaded
    }

    /// Unloads the model, once every accepted image has ended. A model that cannot be loaded again
    /// stays. The next image loads it.
    pub async fn unload(&self) {
        if !self.shared.reloads || self.model().is_err() {
            return;
        }
        self.shared.wish(|rest| rest.unload = !rest.unloaded);
        let mut rest = self.shared.rest.subscribe();
        // The sender lives as long as `self`.
        let _ = rest.wait_for(|rest| rest.unloaded || !rest.unload).await;
    }

    /// Loads the model if it is unloaded. An error if there is none, or the engine ends.
    pub async fn reload(&self) -> Result<(), JobError> {
        self.model()?;
        let mut rest = self.shared.rest.subscribe();
        let mut state = self.shared.state.subscribe();
        let failures = rest.borrow().failures;
        self.shared.wish(|rest| (rest.unload, rest.reload) = (false, rest.unloaded));
        let settled = rest.wait_for(|rest| !rest.unloaded || rest.failures > failures);
        let ended = state.wait_for(|state| !matches!(state, EngineState::Ready(_)));
        // The senders live as long as `self`.
        let has_failed = tokio::select! {
            biased;
            rest = settled => rest.is_ok_and(|rest| rest.unloaded),
            _ = ended => true,
        };
        if has_failed { Err(self.model().err().unwrap_or(JobError::Unloaded)) } else { Ok(()) }
    }

    /// Queues a job: all of its images or none.
    pub fn submit(&self, job: impl Into<Job>) -> Result<Ticket, JobError> {
        let (model, job) = (self.model()?, job.into());
        let id = self.shared.jobs.fetch_add(1, Ordering::Relaxed);
        let (ticket, mut tasks) =
            job::open(id, job, &self.shared.state, &self.shared.busy, &self.shared.metrics);
        let reject = |tasks: Vec<job::ImageTask>, failure: JobError| {
            tasks.into_iter().for_each(|task| task.reject(failure.clone()));
            failure
        };
        let budget = self.shared.budget();
        let is_tiled = self.shared.settings.vae_tiling;
        tasks.iter_mut().for_each(|task| model.choose_tiles(&mut task.spec, is_tiled, budget));
        if tasks.iter().any(|task| model.peak_bytes(&task.spec) > budget) {
            return Err(reject(tasks, JobError::OutOfMemory));
        }
        let mut queue = self.shared.queue();
        // The state may have changed since; the queue is authoritative.
        let pushed = queue.push(&mut tasks);
        let retry_after_s = self.shared.retry_after(&queue, tasks.len());
        drop(queue);
        match pushed {
            Ok(evicted) => drop(reject(evicted, JobError::Full { retry_after_s })),
            Err(PushError::Full) => return Err(reject(tasks, JobError::Full { retry_after_s })),
            Err(PushError::Closed) => return Err(reject(tasks, JobError::Stopping)),
        }
        self.shared.arrived.notify_one();
        Ok(ticket)
    }

    /// Counts so many images of a job once, however often it is submitted.
    pub fn uncounted(&self, images: usize) -> Arc<Uncounted> {
        Uncounted::new(images, Arc::clone(&self.shared.metrics))
    }

    /// Estimated time until there is room for one more image, in seconds.
    pub fn retry_after(&self) -> u64 {
        self.shared.retry_after(&self.shared.queue(), 1)
    }

    /// A view of the job of this ticket.
    pub fn monitor(&self, ticket: &Ticket) -> JobMonitor {
        JobMonitor::new(&self.shared, ticket)
    }

    /// Maximum number of rows per UNet call.
    pub fn max_batch_rows(&self) -> usize {
        self.shared.settings.max_batch_rows
    }

    /// The action on flagged images.
    pub fn safety(&self) -> Safety {
        self.shared.settings.safety
    }

    /// The metrics of this process.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Updates the gauges. Takes milliseconds on a host with GPUs.
    pub fn gauge(&self) {
        self.gauge_with(std::slice::from_ref(self));
    }

    /// Updates the gauges; `all` are the engines of the device, including this one.
    pub fn gauge_with(&self, all: &[Self]) {
        let metrics = self.metrics();
        let count = |of: fn(&Self) -> usize| all.iter().map(of).sum::<usize>() as i64;
        metrics.images_waiting.with([]).set(count(|engine| engine.shared.queue().len()));
        metrics.images_running.with([]).set(count(|engine| engine.shared.pace().running));
        metrics.images_capacity.with([]).set((self.max_batch_rows() / 2) as i64);
        let ready = matches!(self.state(), EngineState::Ready(_));
        metrics.ready.with([]).set(i64::from(ready));
        let budget = self.shared.device.budget_bytes().filter(|bytes| *bytes < u64::MAX);
        metrics.memory_budget.set_bytes([], budget);
        metrics.resident_memory.set_bytes([], memory::resident());
        metrics.available_memory.set_bytes([], memory::available());
        metrics.log_lines_dropped.set_count([], telemetry::dropped_lines());
        for (index, gpu) in gpu::read().into_iter().enumerate() {
            let index = [&*index.to_string()];
            metrics.gpu_memory_used.set_bytes(index, gpu.memory_used_bytes);
            metrics.gpu_memory_total.set_bytes(index, gpu.memory_bytes);
            for (gauge, value) in [
                (&metrics.gpu_utilization, gpu.busy),
                (&metrics.gpu_power, gpu.power_watts),
                (&metrics.gpu_temperature, gpu.temperature_celsius),
            ] {
                if let Some(value) = value {
                    gauge.with(index).set(value);
                }
            }
        }
    }

    /// Rejects new jobs and finishes accepted ones.
    pub fn drain(&self) {
        self.shared.drain();
    }

    /// Rejects new jobs, finishes accepted ones within `timeout`, and returns when the model's
    /// memory is free.
    pub async fn retire(&self, timeout: Duration) {
        self.drain();
        let Some(thread) = self.shared.thread().take() else { return };
        let ended = tokio::task::spawn_blocking(move || drop(thread.join()));
        let mut ended = std::pin::pin!(ended);
        if tokio::time::timeout(timeout, ended.as_mut()).await.is_err() {
            self.abort();
            let _ = ended.await;
        }
    }

    /// Returns when the engine drains or is stopped.
    pub async fn draining(&self) {
        let mut state = self.shared.state.subscribe();
        let ends =
            |state: &EngineState| matches!(state, EngineState::Draining | EngineState::Stopped);
        // The sender lives as long as `self`.
        let _ = state.wait_for(ends).await;
    }

    /// Returns when every accepted image has ended.
    pub async fn wait_idle(&self) {
        self.shared.busy.closed().await;
    }

    /// Whether every accepted image has ended.
    pub fn is_idle(&self) -> bool {
        self.shared.busy.receiver_count() == 0
    }

    /// Cancels what is not finished; every ticket fails at once.
    pub fn abort(&self) {
        self.shared.set_state(EngineState::Stopped);
        // The worker checks the state under this lock, so it cannot miss the change.
        drop(self.shared.queue().clear());
        self.shared.arrived.notify_one();
    }

    /// Returns when the model thread has terminated by itself.
    pub async fn terminated(&self) {
        let mut state = self.shared.state.subscribe();
        // The sender lives as long as `self`.
        let _ = state.wait_for(|state| matches!(state, EngineState::Dead(_))).await;
    }
}
