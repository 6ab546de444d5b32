//! Admission: waiting images take free rows, and have their files read.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use sd_models::{NamedFiles, Spec};
use tracing::error;

use super::files::{PendingFiles, Reader};
use super::images::{KindLoad, Slot, Worker, stepping};
use crate::engine::batch::StepKind;
use crate::engine::client::Client;
use crate::engine::job::{ImageTask, JobError};
use crate::engine::model::{Model, Trajectory as _};

/// Maximum number of threads that read files. On a file system that does not answer they end late,
/// whether or not their images are still wanted; further images with files wait in the queue.
pub(super) const MAX_READERS: usize = 4;

/// Maximum number of kinds of steps that run at the same time, each with full batches. One client has at
/// most the rows of all but one, so that there is room for the next.
pub(super) const MAX_BUCKETS: usize = 4;

impl<M: Model> Worker<M> {
    /// Starts waiting images while there are rows for them. This encodes their text, so a round
    /// ends once it took longer than a step, to keep the running images going.
    pub(super) fn admit(&mut self) {
        let round = Instant::now();
        let busy = !self.slots.is_empty();
        while !self.lost {
            let Some((mut task, files)) = self.next_ready() else { return };
            let begun = Instant::now();
            let queued = begun.saturating_duration_since(task.submitted);
            self.engine.metrics.queue_duration.time([], queued);
            // The budget may have become smaller since the image was accepted.
            let (info, budget) = (self.model.info(), self.engine.budget());
            info.choose_tiles(&mut task.spec, self.engine.settings.vae_tiling, budget);
            // The VAE of a refiner may be the larger one.
            if let Some(refiner) = files.refiner().filter(|_| info.memory.tile.is_some()) {
                refiner.choose_tiles(&mut task.spec, false, budget);
            }
            let models = files.refiner().into_iter().chain([info]);
            let peak = models.map(|model| model.peak_bytes(&task.spec)).max().unwrap_or_default();
            if peak.max(files.upscaling_bytes()) > budget {
                task.complete(Err(JobError::OutOfMemory));
                continue;
            }
            let trajectory = self.model.begin_with(&task.spec, files);
            self.engine.metrics.stage_duration.time(["text_encode"], begun.elapsed());
            match trajectory {
                Ok(trajectory) => {
                    task.advance(0, trajectory.progress().1);
                    let (decoded, interrupted) = (None, false);
                    // A wish to skip what ran before is no wish to skip this one.
                    if !self.slots.iter().any(|slot| slot.task.job == task.job) {
                        task.take_skip();
                    }
                    self.slots.push(Slot { task, trajectory, begun, decoded, interrupted });
                }
                Err(error) => task.complete(Err(self.failure(&error, "begin"))),
            }
            if busy && round.elapsed() > self.last_step {
                return;
            }
        }
    }

    /// The first image whose files have been read, or that has none.
    fn next_ready(&mut self) -> Option<(ImageTask, NamedFiles)> {
        while let Some(place) = self.reading.iter().position(PendingFiles::done) {
            let PendingFiles { task, reader } = self.reading.remove(place);
            match reader.take() {
                Some(Ok(files)) => return Some((task, files)),
                Some(Err(error)) => task.complete(Err(self.failure(&error, "files"))),
                None => {
                    error!("the thread that read files panicked");
                    task.complete(Err(JobError::Model));
                }
            }
        }
        self.readers.retain(|reader| !reader.ended());
        loop {
            let task = self.next_task()?;
            let Some(read) = self.model.read_files(&task.spec) else {
                return Some((task, NamedFiles::default()));
            };
            match Reader::start(&self.engine.0, read) {
                Ok(reader) => {
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

    /// The first image for whose kind there are rows. An image that waits for rows blocks later
    /// ones of its kind, so that a guided image is not overtaken by unguided ones forever.
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
        let reading = reading().map(|spec| (first_kind(spec), spec));
        let loads = KindLoad::all(info, stepping(&self.slots).chain(reading));
        let mut held_back: Vec<StepKind> = Vec::new();
        let mut queue = engine.queue();
        self.last_arrival = queue.arrivals();
        queue.next(|task| {
            let (kind, rows) = (first_kind(&task.spec), task.spec.rows());
            let load = loads.iter().find(|load| load.kind == kind);
            let joins = |load: &KindLoad| {
                let bytes = load.bytes + info.step_bytes(&task.spec, kind.size);
                load.rows + rows <= self.max_rows(kind) && bytes <= engine.budget()
            };
            // An image alone may have more rows than a batch.
            let fits = (rows <= free || taken == 0) && load.is_none_or(joins);
            if held_back.contains(&kind) || at_most.contains(&task.client) {
                return false;
            }
            if self.readers.len() >= MAX_READERS && task.spec.has_files() {
                return false;
            }
            if of_clients.get(&task.client).is_some_and(|taken| taken + rows > most) {
                at_most.push(task.client.clone());
                return false;
            }
            if !fits {
                held_back.push(kind);
                free = if rows > free { 0 } else { free };
            }
            fits
        })
    }
}

/// The kind of the first step of an image.
fn first_kind(spec: &Spec) -> StepKind {
    StepKind { size: spec.size, enlarging: spec.enlarge.is_some() }
}
