//! The thread that owns the model. It loads the model, warms it up and repeats three actions:
//! *admit* waiting images into free rows, *step* the images of one size by one UNet call, *retire*
//! one finished image. Between two steps images join, leave and are cancelled (continuous
//! batching). LoRAs are read on other threads: an image that needs some keeps its rows meanwhile,
//! and the others continue. This thread reads no file, since file systems may be slow.

use std::collections::HashMap;
use std::iter::successors;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sd_models::{Defaults, Error, LoraStack, ModelInfo, PromptSyntax, Rgb, Size, Spec};
use tracing::{debug, error, info, warn};

use super::batch::{BucketLoad, DeficitRoundRobin};
use super::job::{Client, GeneratedImage, ImageTask, JobError};
use super::model::{Model, Trajectory};
use super::shared::EngineShared;
use super::state::{EngineState, Safety};
use crate::image;

/// Maximum number of threads that read LoRAs. On a file system that does not answer they end late,
/// whether or not their images are still wanted; further images with LoRAs wait in the queue.
const MAX_READERS: usize = 4;

/// Maximum number of image sizes that run at the same time, each with full batches. One client has at
/// most the rows of all but one, so that there is room for the next.
const MAX_BUCKETS: usize = 4;

/// Share of the memory free after loading that is the budget; the rest is a reserve.
const BUDGET_PERCENT: u64 = 80;

/// Side of the warm-up image in pixels; small, since only first use matters.
const WARM_UP_SIDE: usize = 128;

/// The warning for a flagged image.
const NSFW_WARNING: &str = "the safety checker flags this image as NSFW";

/// The main function of the model thread.
pub(super) fn main<M: Model>(shared: Arc<EngineShared>, load: impl FnOnce() -> anyhow::Result<M>) {
    let engine = PanicGuard(shared);
    let started = Instant::now();
    let model = match load() {
        Ok(model) => model,
        Err(error) => return engine.set_state(EngineState::Dead(error.into())),
    };
    let mut time_used = Duration::ZERO;
    let turn = engine.device.acquire(&mut time_used);
    let defaults = model.info().defaults;
    if let Err(error) = warm_up(&model) {
        return engine.set_state(EngineState::Dead(error.into()));
    }
    let info = model.info().clone();
    let budget = budget(&model, &engine);
    engine.device.set_budget_bytes(budget);
    drop(turn);
    let (size, max_rows) = (defaults.size, engine.settings.max_batch_rows as u64);
    let spec = warm_up_params(&defaults, size);
    let row_bytes = info.step_bytes(&spec, size).div_ceil(spec.rows() as u64).max(1);
    let (cpu_isa, warning) = sd_models::cpu_isa();
    info!(
        model = info.name,
        device = info.device,
        cpu_isa,
        dtype = info.precision,
        load_ms = started.elapsed().as_millis() as u64,
        memory_budget_bytes = budget,
        max_batch_rows = max_rows.min(budget / row_bytes),
        %size,
        "ready"
    );
    if let Some(warning) = warning {
        warn!("{warning}");
    }
    for (name, reason) in &info.embeddings.skipped {
        warn!(name, reason, "embedding skipped");
    }
    engine.metrics.model_load.with([]).set(started.elapsed().as_secs_f64());
    engine.set_state(EngineState::Ready(Arc::new(info)));
    Worker::new(model, engine).run();
}

/// The memory budget in bytes: the configured one, else a share of the memory that is free when a
/// model was loaded or unloaded. If that is unknown, there is no limit but the device's own.
fn budget<M: Model>(model: &M, engine: &EngineShared) -> u64 {
    // Memory retained by the allocator is free, too.
    sd_models::return_freed_memory();
    let share = |free: u64| free / 100 * BUDGET_PERCENT;
    engine.settings.memory_budget_bytes.or(model.free_bytes().map(share)).unwrap_or(u64::MAX)
}

/// Held by the thread. When the thread ends, by return or panic, this sets the state and empties
/// the queue.
struct PanicGuard(Arc<EngineShared>);

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

/// Generates a small image and drops it: the first image pays for lazy initialization of the
/// device.
fn warm_up<M: Model>(model: &M) -> anyhow::Result<()> {
    let defaults = &model.info().defaults;
    let small = Size::new(
        WARM_UP_SIDE.min(defaults.size.width()),
        WARM_UP_SIDE.min(defaults.size.height()),
    );
    let spec = warm_up_params(defaults, small.unwrap_or(defaults.size));
    let generate = || {
        let mut trajectory = model.begin(&spec)?;
        while !trajectory.done() {
            model.step(&mut [&mut trajectory])?;
        }
        model.preview(&trajectory)?;
        model.check_safety(&model.decode(&trajectory)?)
    };
    generate().context("warm-up failed").map(drop)
}

/// The spec of the warm-up image: no prompt, one step.
fn warm_up_params(defaults: &Defaults, size: Size) -> Spec {
    Spec {
        prompt: String::new(),
        prompt_syntax: PromptSyntax::Plain,
        negative_prompt: String::new(),
        loras: Vec::new(),
        size,
        steps: 1,
        guidance_scale: defaults.guidance_scale,
        seed: 0,
        sampler: defaults.sampler,
        schedule: defaults.schedule,
        img2img: None,
        hires: None,
    }
}

/// A running image and its task.
struct Slot<T> {
    task: ImageTask,
    trajectory: T,
    begun: Instant,
    /// The decoded image, if only the safety check is left.
    decoded: Option<Rgb>,
    /// Whether its job is interrupted: it is decoded without further steps.
    interrupted: bool,
}

impl<T: Trajectory> Slot<T> {
    /// Whether only decoding and the safety check are left.
    fn done(&self) -> bool {
        self.interrupted || self.trajectory.done()
    }
}

/// A thread that reads LoRAs.
#[derive(Default)]
struct Reader {
    ended: AtomicBool,
    /// What it has read; nothing if it has panicked.
    loras: Mutex<Option<sd_models::Result<LoraStack>>>,
}

impl Reader {
    fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn loras(&self) -> MutexGuard<'_, Option<sd_models::Result<LoraStack>>> {
        self.loras.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An image that has its rows reserved and waits for its LoRAs.
struct PendingFiles {
    task: ImageTask,
    reader: Arc<Reader>,
}

impl PendingFiles {
    fn done(&self) -> bool {
        self.reader.ended()
    }
}

/// Notifies the worker when a thread that reads LoRAs ends, also by panic.
struct NotifyOnDrop {
    engine: Arc<EngineShared>,
    reader: Arc<Reader>,
}

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        self.reader.ended.store(true, Ordering::Release);
        // The worker checks under this lock, so it cannot miss the change.
        drop(self.engine.queue());
        self.engine.arrived.notify_one();
    }
}

/// Rows and memory of the images of one size in a UNet call.
struct SizeLoad {
    size: Size,
    rows: usize,
    bytes: u64,
}

impl SizeLoad {
    /// Sums rows and memory by size.
    fn all<'a>(info: &ModelInfo, images: impl Iterator<Item = (Size, &'a Spec)>) -> Vec<Self> {
        let mut loads: Vec<Self> = Vec::new();
        for (size, spec) in images {
            let (rows, bytes) = (spec.rows(), info.step_bytes(spec, size));
            match loads.iter_mut().find(|load| load.size == size) {
                Some(load) => (load.rows, load.bytes) = (load.rows + rows, load.bytes + bytes),
                None => loads.push(Self { size, rows, bytes }),
            }
        }
        loads
    }
}

struct Worker<M: Model> {
    /// Dropped first: the state changes before the running images are cancelled.
    engine: PanicGuard,
    model: M,
    slots: Vec<Slot<M::Trajectory>>,
    reading: Vec<PendingFiles>,
    /// The threads that had not ended when the queue was last searched, of images that are no
    /// longer wanted, too.
    readers: Vec<Arc<Reader>>,
    /// Number of jobs that had arrived when the queue was last searched.
    last_arrival: u64,
    rotation: DeficitRoundRobin,
    /// Maximum rows per size after the device was out of memory for more; until no image of that
    /// size is left.
    caps: HashMap<Size, usize>,
    /// The time that this model has used the device.
    time_used: Duration,
    /// Duration of the last step, which limits the duration of one admission round.
    last_step: Duration,
    /// Whether the device is lost.
    lost: bool,
}

impl<M: Model> Worker<M> {
    fn new(model: M, engine: PanicGuard) -> Self {
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
            lost: false,
        }
    }

    fn run(mut self) {
        while self.wait() {
            self.turn();
            if self.lost {
                return self.fail_all();
            }
        }
    }

    /// Waits until there is work; false if the engine is stopped, or drained and done.
    fn wait(&self) -> bool {
        let mut queue = self.engine.queue();
        loop {
            if matches!(*self.engine.state.borrow(), EngineState::Stopped) {
                return false;
            }
            if !self.slots.is_empty() || self.reading.iter().any(PendingFiles::done) {
                return true;
            }
            if self.reading.is_empty() && queue.is_over() {
                return false;
            }
            // Skipped images wait for those whose files are being read, and for readers.
            let searched = queue.arrivals() == self.last_arrival
                && !self.readers.is_empty()
                && !self.readers.iter().any(|reader| reader.ended());
            if !queue.is_empty() && !searched {
                return true;
            }
            queue = self.engine.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// One round of the loop.
    fn turn(&mut self) {
        let began = Instant::now();
        let (device, mut time_used) = (self.engine.device.clone(), self.time_used);
        let turn = device.acquire(&mut time_used);
        if device.budget_bytes().is_none() {
            device.set_budget_bytes(budget(&self.model, &self.engine));
        }
        self.slots.retain(|slot| slot.task.is_wanted());
        self.reading.retain(|reading| reading.task.is_wanted());
        self.stop_interrupted();
        self.admit();
        let loads = self.loads();
        self.caps.retain(|size, _| loads.iter().any(|load| load.size == *size));
        let work = self.step();
        self.retire();
        drop(turn);
        self.time_used = time_used;
        self.report(began.elapsed(), work);
    }

    /// Stops interrupted images, and ends those without a finished step.
    fn stop_interrupted(&mut self) {
        for slot in &mut self.slots {
            slot.interrupted |= slot.task.interrupted();
        }
        let empty =
            |slot: &mut Slot<M::Trajectory>| slot.interrupted && slot.trajectory.progress().0 == 0;
        let empty = self.slots.extract_if(.., empty).map(|slot| slot.task);
        let unread = self.reading.extract_if(.., |reading| reading.task.interrupted());
        empty.chain(unread.map(|reading| reading.task)).for_each(ImageTask::skip);
    }

    /// Updates the throughput and the remaining work, for estimates.
    fn report(&self, elapsed: Duration, work: u64) {
        let left = |slot: &Slot<M::Trajectory>| {
            (slot.trajectory.work_left() * slot.trajectory.rows()) as u64
        };
        let mut pace = self.engine.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.measure(elapsed, work);
        let stepping = self.slots.iter().filter(|slot| !slot.done()).map(left);
        let reading = self.reading.iter().map(|reading| reading.task.work());
        pace.work_left = stepping.chain(reading).sum();
        pace.running = self.slots.len() + self.reading.len();
        pace.sizes = self.loads().len();
    }

    /// Starts waiting images while there are rows for them. This encodes their text, so a round
    /// ends once it took longer than a step, to keep the running images going.
    fn admit(&mut self) {
        let round = Instant::now();
        let busy = !self.slots.is_empty();
        while !self.lost {
            let Some((task, loras)) = self.next_ready() else { return };
            let begun = Instant::now();
            let queued = begun.saturating_duration_since(task.submitted);
            self.engine.metrics.queue_duration.time([], queued);
            // The budget may have become smaller since the image was accepted.
            if self.model.info().peak_bytes(&task.spec) > self.engine.budget() {
                task.complete(Err(JobError::OutOfMemory));
                continue;
            }
            let trajectory = self.model.begin_with(&task.spec, loras);
            self.engine.metrics.stage_duration.time(["text_encode"], begun.elapsed());
            match trajectory {
                Ok(trajectory) => {
                    task.advance(0, trajectory.progress().1);
                    let (decoded, interrupted) = (None, false);
                    self.slots.push(Slot { task, trajectory, begun, decoded, interrupted });
                }
                Err(error) => task.complete(Err(self.failure(&error, "begin"))),
            }
            if busy && round.elapsed() > self.last_step {
                return;
            }
        }
    }

    /// The first image whose LoRAs have been read, or that has none.
    fn next_ready(&mut self) -> Option<(ImageTask, LoraStack)> {
        while let Some(place) = self.reading.iter().position(PendingFiles::done) {
            let PendingFiles { task, reader } = self.reading.remove(place);
            let read = reader.loras().take();
            match read {
                Some(Ok(loras)) => return Some((task, loras)),
                Some(Err(error)) => task.complete(Err(self.failure(&error, "lora"))),
                None => {
                    error!("the thread that read LoRAs panicked");
                    task.complete(Err(JobError::Model));
                }
            }
        }
        self.readers.retain(|reader| !reader.ended());
        loop {
            let task = self.next_task()?;
            let Some(read) = self.model.read_loras(&task.spec) else {
                return Some((task, LoraStack::default()));
            };
            let reader = Arc::<Reader>::default();
            let notify =
                NotifyOnDrop { engine: Arc::clone(&self.engine.0), reader: Arc::clone(&reader) };
            let work = move || {
                let read = read();
                *notify.reader.loras() = Some(read);
            };
            match thread::Builder::new().name("files".into()).spawn(work) {
                Ok(_) => {
                    self.readers.push(Arc::clone(&reader));
                    self.reading.push(PendingFiles { task, reader });
                }
                Err(error) => {
                    error!("cannot start a thread: {error}");
                    task.complete(Err(JobError::Model));
                }
            }
        }
    }

    /// The first image for whose size there are rows. An image that waits for rows blocks later
    /// ones of its size, so that a guided image is not overtaken by unguided ones forever.
    fn next_task(&mut self) -> Option<ImageTask> {
        let (engine, info) = (&self.engine, self.model.info());
        let reading = || self.reading.iter().map(|reading| &reading.task.spec);
        let running = self.slots.iter().map(|slot| (&slot.task, slot.trajectory.rows()));
        let pending = self.reading.iter().map(|reading| (&reading.task, reading.task.spec.rows()));
        let (mut taken, mut of_clients) = (0, HashMap::<&Client, usize>::new());
        for (task, rows) in running.chain(pending) {
            taken += rows;
            *of_clients.entry(&task.client).or_default() += rows;
        }
        let batch = engine.settings.max_batch_rows;
        let mut free = (MAX_BUCKETS * batch).saturating_sub(taken);
        let most = (MAX_BUCKETS - 1) * batch;
        let mut at_most: Vec<Client> = Vec::new();
        let reading = reading().map(|spec| (spec.size, spec));
        let loads = SizeLoad::all(info, stepping(&self.slots).chain(reading));
        let mut held_back: Vec<Size> = Vec::new();
        let mut queue = engine.queue();
        self.last_arrival = queue.arrivals();
        queue.next(|task| {
            let (size, rows) = (task.spec.size, task.spec.rows());
            let load = loads.iter().find(|load| load.size == size);
            let joins = |load: &SizeLoad| {
                let bytes = load.bytes + info.step_bytes(&task.spec, size);
                load.rows + rows <= self.max_rows(size) && bytes <= engine.budget()
            };
            let fits = rows <= free && load.is_none_or(joins);
            if held_back.contains(&size) || at_most.contains(&task.client) {
                return false;
            }
            if self.readers.len() >= MAX_READERS && task.spec.has_loras() {
                return false;
            }
            if of_clients.get(&task.client).is_some_and(|taken| taken + rows > most) {
                at_most.push(task.client.clone());
                return false;
            }
            if !fits {
                held_back.push(size);
                free = if rows > free { 0 } else { free };
            }
            fits
        })
    }

    /// Maximum number of rows per UNet call of this size.
    fn max_rows(&self, size: Size) -> usize {
        let rows = self.engine.settings.max_batch_rows;
        self.caps.get(&size).map_or(rows, |cap| rows.min(*cap))
    }

    /// Rows and memory of the running images, by size.
    fn loads(&self) -> Vec<SizeLoad> {
        SizeLoad::all(self.model.info(), stepping(&self.slots))
    }

    /// One UNet call for the size whose turn it is, with its oldest images if not all fit. Returns
    /// the work done.
    fn step(&mut self) -> u64 {
        let loads = self.loads().into_iter().map(|SizeLoad { size, rows, .. }| {
            let members = self.slots.iter().filter(|slot| !slot.done());
            let members = members.filter(|slot| slot.trajectory.size() == size);
            let clients = members.map(|slot| slot.task.client.clone()).collect();
            BucketLoad { size, rows, clients }
        });
        let loads: Vec<_> = loads.collect();
        let Some(size) = self.rotation.next(&loads) else { return 0 };
        let (max_rows, budget, info) =
            (self.max_rows(size), self.engine.budget(), self.model.info());
        let (mut taken, mut bytes) = (0, 0);
        let mut members: Vec<_> = self
            .slots
            .iter_mut()
            .filter(|slot| slot.trajectory.size() == size && !slot.done())
            .take_while(|slot| {
                let first = taken == 0;
                taken += slot.trajectory.rows();
                bytes += info.step_bytes(&slot.task.spec, size);
                first || taken <= max_rows && bytes <= budget
            })
            .collect();
        let began = Instant::now();
        let mut batch: Vec<_> = members.iter_mut().map(|slot| &mut slot.trajectory).collect();
        let (stepped, len) = step_with_oom_fallback(&self.model, &mut batch);
        self.last_step = began.elapsed();
        let shrunk = len < members.len();
        members.truncate(len);
        let rows: usize = members.iter().map(|slot| slot.trajectory.rows()).sum();
        self.engine.metrics.stage_duration.time(["step"], self.last_step);
        self.engine.metrics.batch_size.with([]).observe(rows as f64);
        match stepped {
            Ok(()) => {
                for slot in members {
                    preview(&self.model, slot, self.engine.settings.safety);
                    slot.task.advance(1, 0);
                }
            }
            Err(error) => {
                let members: Vec<_> = members.iter().map(|slot| slot.task.key()).collect();
                let failure = self.failure(&error, "step");
                let failed = |slot: &mut Slot<_>| members.contains(&slot.task.key());
                for slot in self.slots.extract_if(.., failed) {
                    slot.task.complete(Err(failure.clone()));
                }
            }
        }
        if shrunk {
            warn!(%size, rows, "out of memory, batch size reduced");
            self.engine.metrics.batch_oom_retries.with([]).inc();
            self.caps.insert(size, rows);
        }
        (size.pixels() * rows) as u64
    }

    /// Decodes one finished image, or runs the safety check on one decoded image. Others wait for
    /// the next round, so each step waits for at most one of them.
    fn retire(&mut self) {
        let Some(place) = self.slots.iter().position(Slot::done) else { return };
        let mut slot = self.slots.remove(place);
        let began = Instant::now();
        let (stage, done) = match slot.decoded.take() {
            None => ("decode", self.model.decode(&slot.trajectory).map(|rgb| (rgb, None))),
            Some(rgb) => {
                ("safety_check", self.model.check_safety(&rgb).map(|nsfw| (rgb, Some(nsfw))))
            }
        };
        self.engine.metrics.stage_duration.time([stage], began.elapsed());
        match done {
            Ok((rgb, None)) if self.model.info().checked => {
                slot.decoded = Some(rgb);
                self.slots.insert(place, slot);
            }
            Ok((rgb, nsfw)) => self.finish(slot, rgb, nsfw.flatten()),
            Err(error) => slot.task.complete(Err(self.failure(&error, stage))),
        }
    }

    /// Completes an image that is decoded and, with a checker, checked.
    fn finish(&self, slot: Slot<M::Trajectory>, mut rgb: Rgb, nsfw: Option<bool>) {
        let Slot { task, trajectory, begun, .. } = slot;
        let (mut warnings, loras) = (trajectory.warnings().to_vec(), trajectory.lora_files());
        if !trajectory.done() {
            let (made, all) = trajectory.progress();
            warnings.push(format!("interrupted after {made} of {all} UNet calls"));
        }
        let safety = self.engine.settings.safety;
        if let Some(nsfw) = nsfw {
            let result = if nsfw { safety.name() } else { "pass" };
            self.engine.metrics.safety_checks.with([result]).inc();
        }
        if nsfw == Some(true) {
            match safety {
                Safety::Flag => warnings.push(NSFW_WARNING.to_owned()),
                Safety::Blur => {
                    rgb = image::blurred(&rgb);
                    warnings.push(format!("{NSFW_WARNING}; it is blurred"));
                }
                Safety::Block => return task.complete(Err(JobError::Withheld)),
            }
        }
        let generated = begun.elapsed();
        self.engine.metrics.image_duration.time([], generated);
        debug!(
            size = %task.spec.final_size(),
            steps = task.spec.steps,
            queue_ms = begun.saturating_duration_since(task.submitted).as_millis() as u64,
            generate_ms = generated.as_millis() as u64,
            "image generated"
        );
        let index = task.key().1;
        task.complete(Ok(GeneratedImage { index, rgb, warnings, nsfw, loras }));
    }

    /// Logs an error, only here, and returns what a client may know of it.
    fn failure(&mut self, error: &Error, stage: &'static str) -> JobError {
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

    /// Fails all images, because the device is lost.
    fn fail_all(self) {
        let waiting = self.engine.queue().clear();
        let reading = self.reading.into_iter().map(|reading| reading.task);
        let running = self.slots.into_iter().map(|slot| slot.task);
        for task in running.chain(reading).chain(waiting) {
            task.complete(Err(JobError::DeviceLost));
        }
    }
}

/// Steps the batch; if the device is out of memory, half of it, and so on down to one image. A
/// failed step changes nothing. Returns the number of images stepped.
fn step_with_oom_fallback<M: Model>(
    model: &M,
    batch: &mut [&mut M::Trajectory],
) -> (sd_models::Result<()>, usize) {
    let mut len = batch.len();
    loop {
        match model.step(&mut batch[..len]) {
            Err(Error::OutOfMemory(_)) if len > 1 => len /= 2,
            stepped => return (stepped, len),
        }
    }
}

/// Sends a preview, if requested. Previews are not checked, so they are blurred unless flagged
/// images are returned unchanged. A failed preview is only logged.
fn preview<M: Model>(model: &M, slot: &mut Slot<M::Trajectory>, safety: Safety) {
    if !slot.task.wants_preview() {
        return;
    }
    match model.preview(&slot.trajectory) {
        Ok(Some(rgb)) if model.info().checked && safety != Safety::Flag => {
            slot.task.show(image::blurred(&rgb));
        }
        Ok(Some(rgb)) => slot.task.show(rgb),
        Ok(None) => {}
        Err(error) => debug!("no preview: {}", chain(&error)),
    }
}

/// The images that still step, and their sizes.
fn stepping<T: Trajectory>(slots: &[Slot<T>]) -> impl Iterator<Item = (Size, &Spec)> {
    let stepping = slots.iter().filter(|slot| !slot.done());
    stepping.map(|slot| (slot.trajectory.size(), &slot.task.spec))
}

/// An error and its causes, in one line.
fn chain(error: &Error) -> String {
    let causes = successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests;
