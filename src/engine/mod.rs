//! The engine: a bounded queue in front of one thread that owns the model.
//!
//! A handler hands over specs with [`Engine::submit`] and gets a [`Ticket`]; waiting on the ticket
//! yields the pictures, dropping it withdraws them. Pictures of different requests share UNet
//! evaluations and come and go between steps (`worker`). Nothing here knows HTTP, and nothing
//! outside `worker` touches a model.

mod batch;
mod device;
mod job;
mod pace;
mod queue;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, thread};

use sd_models::{ModelInfo, Rgb, Size, Spec};
use tokio::sync::watch;

use crate::telemetry::{GPUS, Id, Metrics};
use crate::{gpu, memory};
pub use device::Device;
pub use job::{Client, Drawn, Failure, Job, Preview, Progress, Ticket};
use pace::Pace;
use queue::{Queue, Refused};

/// What the worker drives: `sd_models::Pipeline`, or a fake in tests.
pub trait Model: 'static {
    /// A picture in the making.
    type Trajectory: Trajectory;
    /// Name, device, defaults and limits.
    fn info(&self) -> &ModelInfo;
    /// What has to be read from files before `begin` finds all in memory: work for another thread.
    fn files(&self, _spec: &Spec) -> Option<Box<dyn FnOnce() + Send>> {
        None
    }
    /// Encodes the text and draws the noise.
    fn begin(&self, spec: &Spec) -> sd_models::Result<Self::Trajectory>;
    /// One evaluation for each member; all have the same size.
    fn step(&self, batch: &mut [&mut Self::Trajectory]) -> sd_models::Result<()>;
    /// The picture of a trajectory; of one that is not finished, what can be told of it.
    fn decode(&self, trajectory: &Self::Trajectory) -> sd_models::Result<Rgb>;
    /// Whether a picture should not be shown; `None` from a model that has nothing to tell by.
    fn judge(&self, _picture: &Rgb) -> sd_models::Result<Option<bool>> {
        Ok(None)
    }
    /// A small look at a picture in the making, from a model that can give one at little cost
    /// once it is warm.
    fn preview(&self, _trajectory: &Self::Trajectory) -> sd_models::Result<Option<Rgb>> {
        Ok(None)
    }
    /// Memory that the device has left, where that is known.
    fn free_bytes(&self) -> Option<u64> {
        None
    }
}

/// What the worker must know of a picture in the making.
pub trait Trajectory {
    /// Whether nothing is left but to decode it.
    fn done(&self) -> bool;
    /// Evaluations made and to make.
    fn progress(&self) -> (usize, usize);
    /// Rows that one evaluation takes in a batch.
    fn rows(&self) -> usize;
    /// The size in this pass: pictures of one size can share an evaluation.
    fn size(&self) -> Size;
    /// Pixels times evaluations to make, in all passes.
    fn work_left(&self) -> usize {
        let (made, all) = self.progress();
        self.size().pixels() * all.saturating_sub(made)
    }
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
    /// Memory that one evaluation or decoding may take; a share of what is free when absent.
    pub memory_budget_bytes: Option<u64>,
    /// What becomes of pictures that should not be shown.
    pub safety: Safety,
}

/// What becomes of a picture that the model's safety checker objects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Safety {
    /// It goes out, and the client is told.
    Flag,
    /// It goes out unrecognisable, and the client is told. So do looks at all that is in the making.
    Blur,
    /// It does not go out. Looks at what is in the making are blurred.
    Block,
}

impl Safety {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Blur => "blur",
            Self::Block => "block",
        }
    }
}

/// Where the engine stands. It moves downwards only.
#[derive(Debug, Clone)]
pub enum Phase {
    /// There is no model; others may be chosen by name.
    Absent,
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
    /// The model thread ended.
    Dead(Death),
}

/// Why a model thread ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Death {
    reason: String,
    /// Whether another model in the way was the reason.
    pub out_of_memory: bool,
}

impl From<anyhow::Error> for Death {
    fn from(error: anyhow::Error) -> Self {
        let full = |cause: &sd_models::Error| matches!(cause, sd_models::Error::OutOfMemory(_));
        let out_of_memory = error.chain().filter_map(|cause| cause.downcast_ref()).any(full);
        Self { reason: format!("{error:#}"), out_of_memory }
    }
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
    /// Signalled when an order arrives, when its files have been read, and when the queue closes.
    arrived: Condvar,
    phase: watch::Sender<Phase>,
    pace: Mutex<Pace>,
    device: Device,
    jobs: AtomicU64,
    /// Every order holds a receiver: without one, nothing is left to do.
    busy: watch::Sender<()>,
    metrics: Arc<Metrics>,
    /// The model thread, until somebody waits for its end.
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

/// Where a job stands, for those who wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outlook {
    /// Pictures ahead of it in the queue; `None` when it has begun.
    pub position: Option<usize>,
    /// Until it is done, as far as can be told.
    pub left: Option<Duration>,
}

/// A view of a job that does not hold it: it may be kept when the ticket is gone.
#[derive(Debug, Clone)]
pub struct Watch {
    job: u64,
    shared: Arc<Shared>,
    progress: watch::Receiver<Progress>,
    interrupted: Arc<AtomicBool>,
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
        let (ticket, mut orders) = job::open(id, job, &self.shared);
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
        let shared = Arc::clone(&self.shared);
        let (progress, interrupted) = (ticket.progress(), Arc::clone(&ticket.interrupted));
        Watch { job: ticket.job, shared, progress, interrupted }
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

impl Shared {
    /// The lock is held for a few moves of pointers and never across a model call.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thread(&self) -> MutexGuard<'_, Option<thread::JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pace(&self) -> Pace {
        *self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that one evaluation or decoding may take.
    fn budget(&self) -> u64 {
        self.device.budget_bytes().unwrap_or(u64::MAX)
    }

    /// Seconds until there should be room for so many more pictures.
    fn retry_after(&self, queue: &Queue, pictures: usize) -> u64 {
        let missing = (queue.len() + pictures).saturating_sub(self.settings.max_queue).max(1);
        self.pace().retry_after(missing, queue.len(), queue.work())
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

impl Watch {
    /// Evaluations made and to make; changes with each.
    pub fn progress(&mut self) -> &mut watch::Receiver<Progress> {
        &mut self.progress
    }

    /// Evaluations made and to make.
    pub fn made(&self) -> Progress {
        *self.progress.borrow()
    }

    /// Ends the drawing after the step that is being made: the job comes to what there is of it.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
    }

    /// Where the job stands. An estimate: it does not know who is still to come or to leave.
    pub fn outlook(&self) -> Outlook {
        let place = self.shared.queue().place(self.job);
        let pace = self.shared.pace();
        if let Some((position, work)) = place {
            return Outlook { position: Some(position), left: pace.time(pace.drawing + work) };
        }
        let Progress { made, total, begun } = *self.progress.borrow();
        Outlook { position: None, left: pace.time_of((total - made).div_ceil(begun.max(1))) }
    }
}

impl Phase {
    fn rank(&self) -> u8 {
        match self {
            Self::Absent | Self::Loading => 0,
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

    fn files(&self, spec: &Spec) -> Option<Box<dyn FnOnce() + Send>> {
        self.prefetch(spec)
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

    fn judge(&self, picture: &Rgb) -> sd_models::Result<Option<bool>> {
        self.check_safety(picture)
    }

    fn preview(&self, trajectory: &Self::Trajectory) -> sd_models::Result<Option<Rgb>> {
        self.preview(trajectory).map(Some)
    }

    fn free_bytes(&self) -> Option<u64> {
        match self.info().device.as_str() {
            "cpu" => memory::available(),
            _ => self.free_device_bytes(),
        }
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

    fn work_left(&self) -> usize {
        self.work_left()
    }

    fn warnings(&self) -> &[String] {
        self.warnings()
    }
}
