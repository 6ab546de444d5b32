//! The thread that owns the model. It loads the model, warms it up and repeats three actions:
//! *admit* waiting images into free rows, *step* the images of one size by one UNet call, *retire*
//! one finished image. Between two steps images join, leave and are cancelled (continuous
//! batching). LoRAs and upscalers are read on other threads: an image that needs some keeps its rows meanwhile,
//! and the others continue. This thread reads no file, since file systems may be slow.

mod admit;
mod files;
mod images;
mod rest;
mod retire;
mod start;
mod step;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tracing::info;

use super::job::JobError;
use super::model::{Model, Trajectory as _};
use super::shared::EngineShared;
use super::state::EngineState;
use files::PendingFiles;
use images::{PanicGuard, Slot, Worker};
use start::{budget, open, share_of};

/// Time without work after which the memory that steps have freed goes back to the system. The next
/// image takes it again, in less time than one of its steps.
const IDLE: Duration = Duration::from_secs(2);

/// The main function of the model thread. `load` is called again after the model was unloaded.
pub(super) fn main<M: Model>(
    shared: Arc<EngineShared>,
    mut load: impl FnMut() -> anyhow::Result<M>,
) {
    let engine = PanicGuard(shared);
    let model = match open(&engine, &mut load) {
        Ok(model) => model,
        Err(error) => return engine.set_state(EngineState::Dead(error.into())),
    };
    engine.set_state(EngineState::Ready(Arc::new(model.info().clone())));
    let mut worker = Worker::new(model, engine);
    while worker.run() == Next::Rest {
        let engine = worker.unload();
        info!("unloaded until it is needed");
        let Some(model) = rest::wake(&engine, &mut load) else { return };
        worker = Worker::new(model, engine);
    }
}

/// What the model thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// A round of the loop.
    Turn,
    /// Without the model, until it is needed.
    Rest,
    /// Nothing: the engine is stopped, or drained and done.
    End,
}

impl<M: Model> Worker<M> {
    /// Works until the model is to be unloaded or the engine ends.
    fn run(&mut self) -> Next {
        loop {
            match self.wait() {
                Next::Turn => self.turn(),
                next => return next,
            }
            if self.lost {
                self.fail_all();
                return Next::End;
            }
        }
    }

    /// Waits until there is work, or the model has been idle for as long as it may be.
    fn wait(&mut self) -> Next {
        let began = Instant::now();
        let mut queue = self.engine.queue();
        loop {
            if matches!(*self.engine.state.borrow(), EngineState::Stopped) {
                return Next::End;
            }
            if !self.slots.is_empty() || self.reading.iter().any(PendingFiles::done) {
                return Next::Turn;
            }
            if self.reading.is_empty() && queue.is_over() {
                return Next::End;
            }
            // Skipped images wait for those whose files are being read, and for readers.
            let searched = queue.arrivals() == self.last_arrival
                && !self.readers.is_empty()
                && !self.readers.iter().any(|reader| reader.ended());
            if !queue.is_empty() && !searched {
                return Next::Turn;
            }
            let idle = self.engine.reloads && self.reading.is_empty() && queue.is_empty();
            let after = self.engine.settings.unload_after.filter(|_| idle);
            let waited = began.elapsed();
            if idle && (self.engine.rest.borrow().unload || after.is_some_and(|t| waited >= t)) {
                return Next::Rest;
            }
            if self.keeps_memory && waited >= IDLE {
                drop(queue);
                sd_models::return_freed_memory();
                self.keeps_memory = false;
                queue = self.engine.queue();
                continue;
            }
            let next = after.into_iter().chain(self.keeps_memory.then_some(IDLE)).min();
            let arrived = &self.engine.arrived;
            queue = match next {
                None => arrived.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(next) => {
                    let waited = arrived.wait_timeout(queue, next.saturating_sub(waited));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// One round of the loop.
    fn turn(&mut self) {
        let began = Instant::now();
        self.keeps_memory = true;
        let (device, mut time_used) = (self.engine.device.clone(), self.time_used);
        let turn = device.acquire(&mut time_used);
        let refiner_bytes = self.model.refiner_bytes();
        if device.budget_bytes().is_none() {
            device.set_budget_bytes(budget(&self.model, &self.engine));
        } else if self.engine.settings.memory_budget_bytes.is_none() {
            let [taken, given_back] = [refiner_bytes, self.refiner_bytes].map(share_of);
            device.change_budget(taken, given_back);
        }
        self.refiner_bytes = refiner_bytes;
        self.slots.retain(|slot| slot.task.is_wanted());
        self.reading.retain(|reading| reading.task.is_wanted());
        self.stop_interrupted();
        self.admit();
        let loads = self.loads();
        self.caps.retain(|kind, _| loads.iter().any(|load| load.kind == *kind));
        let work = self.step();
        self.retire();
        if device.is_waited_for() {
            // What is queued is this model's time and memory. An error comes back at the next step.
            let _ = self.model.settle();
        }
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
        let reading = self.reading.iter().map(|reading| reading.task.work);
        pace.work_left = stepping.chain(reading).sum();
        pace.running = self.slots.len() + self.reading.len();
        pace.sizes = self.loads().len();
    }

    /// Fails all images, because the device is lost.
    fn fail_all(&mut self) {
        let waiting = self.engine.queue().clear();
        let reading = self.reading.drain(..).map(|reading| reading.task);
        let running = self.slots.drain(..).map(|slot| slot.task);
        for task in running.chain(reading).chain(waiting) {
            task.complete(Err(JobError::DeviceLost));
        }
    }
}

#[cfg(test)]
mod tests;
