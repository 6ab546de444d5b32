//! The end of an image: interrupted, or decoded and checked.

use std::time::Instant;

use sd_models::Rgb;
use tracing::debug;

use super::images::{Slot, Worker};
use crate::engine::job::{GeneratedImage, ImageTask, JobError};
use crate::engine::model::{Model, Trajectory as _};
use crate::engine::state::Safety;
use crate::image;

/// The warning for a flagged image.
const NSFW_WARNING: &str = "the safety checker flags this image as NSFW";

impl<M: Model> Worker<M> {
    /// Stops interrupted images, and ends those of which there is nothing to show.
    pub(super) fn stop_interrupted(&mut self) {
        let skipped = self.slots.iter().filter(|slot| slot.task.take_skip());
        let skipped: Vec<_> = skipped.map(|slot| slot.task.key().0).collect();
        for slot in &mut self.slots {
            slot.interrupted |= slot.task.interrupted() || skipped.contains(&slot.task.key().0);
        }
        let empty =
            |slot: &mut Slot<M::Trajectory>| slot.interrupted && !slot.trajectory.has_image();
        let empty = self.slots.extract_if(.., empty).map(|slot| slot.task);
        let unread = self.reading.extract_if(.., |reading| reading.task.interrupted());
        empty.chain(unread.map(|reading| reading.task)).for_each(ImageTask::skip);
    }

    /// Decodes one finished image or a tile of one, or runs the safety check on one decoded image.
    /// Others wait for the next round, so each step waits for at most one of them.
    pub(super) fn retire(&mut self) {
        let Some(place) = self.slots.iter().position(Slot::done) else { return };
        let mut slot = self.slots.remove(place);
        let began = Instant::now();
        let (stage, done) = match slot.decoded.take() {
            None => {
                let decoded = self.model.decode(&mut slot.trajectory);
                ("decode", decoded.map(|rgb| Some((rgb?, None))))
            }
            Some(rgb) => {
                let checked = self.model.check_safety(&rgb);
                ("safety_check", checked.map(|nsfw| Some((rgb, Some(nsfw)))))
            }
        };
        self.engine.metrics.stage_duration.time([stage], began.elapsed());
        match done {
            Ok(None) => self.slots.insert(place, slot),
            Ok(Some((rgb, None))) if self.model.info().checked => {
                slot.decoded = Some(rgb);
                self.slots.insert(place, slot);
            }
            Ok(Some((rgb, nsfw))) => self.finish(slot, rgb, nsfw.flatten()),
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
        let text_tokens = [&task.spec.prompt, &task.spec.negative_prompt]
            .into_iter()
            .map(|text| self.model.text_tokens(text))
            .sum();
        task.complete(Ok(GeneratedImage { index, rgb, warnings, nsfw, loras, text_tokens }));
    }
}
