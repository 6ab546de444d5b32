//! The thread that owns the model. It loads the model, warms it up and repeats three actions:
//! *admit* waiting images into free rows, *step* the images of one size by one UNet call, *retire*
//! one finished image. Between two steps images join, leave and are cancelled (continuous
//! batching). LoRAs are read on other threads: an image that needs some keeps its rows meanwhile,
//! and the others continue. This thread reads no file, since file systems may be slow.

mod admit;
mod files;
mod images;
mod retire;
mod start;
mod step;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::job::JobError;
use super::model::{Model, Trajectory as _};
use super::shared::EngineShared;
use super::state::EngineState;
use files::PendingFiles;
use images::{PanicGuard, Slot, Worker};
use start::{budget, warm_up, warm_up_params};

/// Time without work after which the memory that steps have freed goes back to the system. The next
/// image takes it again, in less time than one of its steps.
const IDLE: Duration = Duration::from_secs(2);

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
    for warning in &info.warnings {
        warn!(model = info.name, "{warning}");
    }
    for (name, reason) in &info.embeddings.skipped {
        warn!(name, reason, "embedding skipped");
    }
    engine.metrics.model_load.with([]).set(started.elapsed().as_secs_f64());
    engine.set_state(EngineState::Ready(Arc::new(info)));
    Worker::new(model, engine).run();
}

impl<M: Model> Worker<M> {
    fn run(mut self) {
        while self.wait() {
            self.turn();
            if self.lost {
                return self.fail_all();
            }
        }
    }

    /// Waits until there is work; false if the engine is stopped, or drained and done.
    fn wait(&mut self) -> bool {
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
            let arrived = &self.engine.arrived;
            if !self.keeps_memory {
                queue = arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let waited = arrived.wait_timeout(queue, IDLE);
            let (waiting, time) = waited.unwrap_or_else(PoisonError::into_inner);
            queue = waiting;
            if time.timed_out() {
                drop(queue);
                sd_models::return_freed_memory();
                self.keeps_memory = false;
                queue = self.engine.queue();
            }
        }
    }

    /// One round of the loop.
    fn turn(&mut self) {
        let began = Instant::now();
        self.keeps_memory = true;
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

    /// Updates the throughput and the remaining work, for estimates.
    fn report(&self, elapsed: Duration, work: u64) {
        let left = |slot: &Slot<M::Trajectory>| slot.trajectory.work_left() as u64;
        let mut pace = self.engine.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.measure(elapsed, work);
        let stepping = self.slots.iter().filter(|slot| !slot.done()).map(left);
        let reading = self.reading.iter().map(|reading| reading.task.work());
        pace.work_left = stepping.chain(reading).sum();
        pace.running = self.slots.len() + self.reading.len();
        pace.sizes = self.loads().len();
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

#[cfg(test)]
mod tests;
