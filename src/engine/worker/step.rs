//! A step: one UNet call for the images of one size, and their previews, or one step of a picture
//! that is enlarged.

use std::time::Instant;

use sd_models::Error;
use tracing::{debug, warn};

use super::images::{KindLoad, Slot, Worker, chain};
use crate::engine::batch::BucketLoad;
use crate::engine::model::{Model, Trajectory as _};
use crate::engine::state::Safety;
use crate::image;

impl<M: Model> Worker<M> {
    /// One step of the kind whose turn it is, with its oldest images if not all fit; of pictures
    /// that are enlarged the oldest. Returns the work done.
    pub(super) fn step(&mut self) -> u64 {
        let loads = self.loads().into_iter().map(|KindLoad { kind, rows, .. }| {
            let members = self.slots.iter().filter(|slot| !slot.done());
            let members = members.filter(|slot| slot.kind() == kind);
            let clients = members.map(|slot| slot.task.client.clone()).collect();
            BucketLoad { kind, rows, clients }
        });
        let loads: Vec<_> = loads.collect();
        let Some(kind) = self.rotation.next(&loads) else { return 0 };
        let (max_rows, budget, info) =
            (self.max_rows(kind), self.engine.budget(), self.model.info());
        let (mut taken, mut bytes) = (0, 0);
        let mut members: Vec<_> = self
            .slots
            .iter_mut()
            .filter(|slot| slot.kind() == kind && !slot.done())
            .take_while(|slot| {
                let first = taken == 0;
                taken += slot.trajectory.rows();
                let model = slot.trajectory.model().unwrap_or(info);
                bytes += model.step_bytes(&slot.task.spec, kind.size);
                first || !kind.enlarging && taken <= max_rows && bytes <= budget
            })
            .collect();
        let left: Vec<_> = members.iter().map(|slot| slot.trajectory.work_left()).collect();
        let began = Instant::now();
        let mut batch: Vec<_> = members.iter_mut().map(|slot| &mut slot.trajectory).collect();
        let (stepped, len, is_short_of_memory) = step_with_fallback(&self.model, &mut batch);
        self.last_step = began.elapsed();
        let shrunk = len < members.len() && is_short_of_memory;
        members.truncate(len);
        let rows: usize = members.iter().map(|slot| slot.trajectory.rows()).sum();
        let stage = if kind.enlarging { "upscale" } else { "step" };
        self.engine.metrics.stage_duration.time([stage], self.last_step);
        if !kind.enlarging {
            self.engine.metrics.batch_size.with([]).observe(rows as f64);
        }
        let mut work = 0;
        match stepped {
            Ok(()) => {
                for (slot, left) in members.into_iter().zip(left) {
                    work += left.saturating_sub(slot.trajectory.work_left());
                    preview(&self.model, slot, self.engine.settings.safety);
                    slot.task.advance(1, 0);
                }
            }
            Err(error) => {
                let members: Vec<_> = members.iter().map(|slot| slot.task.key()).collect();
                let failure = self.failure(&error, stage);
                let failed = |slot: &mut Slot<_>| members.contains(&slot.task.key());
                for slot in self.slots.extract_if(.., failed) {
                    slot.task.complete(Err(failure.clone()));
                }
            }
        }
        if shrunk {
            warn!(size = %kind.size, rows, "out of memory, batch size reduced");
            self.engine.metrics.batch_oom_retries.with([]).inc();
            self.caps.insert(kind, rows);
        }
        work as u64
    }
}

/// Steps the batch; if the device is out of memory or an image names what cannot be computed, half of
/// it, and so on down to one image, so that no image fails for another. A failed step changes nothing.
/// Returns the number of images stepped, and whether memory was short.
fn step_with_fallback<M: Model>(
    model: &M,
    batch: &mut [&mut M::Trajectory],
) -> (sd_models::Result<()>, usize, bool) {
    let (mut len, mut is_short) = (batch.len(), false);
    loop {
        match model.step(&mut batch[..len]) {
            Err(error @ (Error::OutOfMemory(_) | Error::Spec { .. })) if len > 1 => {
                is_short |= matches!(error, Error::OutOfMemory(_));
                len /= 2;
            }
            stepped => return (stepped, len, is_short),
        }
    }
}

/// Sends the previews that are due. Previews are not checked, so they are blurred unless flagged
/// images are returned unchanged. A failed preview is only logged.
fn preview<M: Model>(model: &M, slot: &mut Slot<M::Trajectory>, safety: Safety) {
    let due = slot.task.previews_due(slot.trajectory.progress());
    if due == 0 {
        return;
    }
    match model.preview(&slot.trajectory) {
        Ok(Some(rgb)) if model.info().checked && safety != Safety::Flag => {
            slot.task.show(image::blurred(&rgb), due);
        }
        Ok(Some(rgb)) => slot.task.show(rgb, due),
        Ok(None) => {}
        Err(error) => debug!("no preview: {}", chain(&error)),
    }
}
