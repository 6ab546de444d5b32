//! One image in progress, between two UNet calls.

use candle_core::Tensor;

use super::before::{Before, BeforeStep};
use super::between::{Between, BetweenStep};
use super::decode::VaeMode;
use super::hires::{HiresPass, UpscaledLatents};
use super::info::ModelInfo;
use super::init::{InitialLatents, InpaintBlend};
use super::rows::Combined;
use super::run::PassRun;
use crate::error::Result;
use crate::files::AssetFile;
use crate::networks::Tiled;
use crate::picture::Size;
use crate::sampling::{Noise, Outputs, SamplerState};

/// One image in progress.
pub struct Trajectory {
    pub(super) size: Size,
    /// (1, C, h, w) f32
    pub(super) latents: Tensor,
    /// The current pass.
    pub(super) run: PassRun,
    /// The files of the LoRAs of all passes.
    pub(super) lora_files: Vec<AssetFile>,
    /// The names of the nets of its passes.
    pub(super) nets: Vec<String>,
    pub(super) blend: Option<InpaintBlend>,
    /// Mask and masked image (1, 1 + C, h, w), concatenated to the latents of an inpainting UNet.
    pub(super) mask_condition: Option<Tensor>,
    pub(super) noise: Noise,
    pub(super) shown: Option<Shown>,
    /// The hires pass, while the base pass runs.
    pub(super) hires: Option<HiresPass>,
    pub(super) vae_mode: VaeMode,
    /// The input image, while it is encoded in tiles; until then the latents are none.
    pub(super) before: Option<Before>,
    /// Steps of the input image that are done.
    pub(super) steps_before: usize,
    /// The picture between the base pass and the hires pass, if it is what is upscaled.
    pub(super) between: Option<Between>,
    /// Steps of the picture between the passes that are done, until the hires pass runs.
    pub(super) steps_between: usize,
    /// Evaluations and steps of the runs before the current one: of the base pass and after it, and
    /// of the model from which a refiner took over.
    pub(super) base_evaluations: usize,
    /// The image, while it is decoded in tiles.
    pub(super) decoding: Option<Tiled>,
    pub(super) warnings: Vec<String>,
}

/// What a preview shows.
pub(super) enum Shown {
    /// The predicted x0 of the last UNet call, from its latents and guided output, both (1, C, h, w)
    /// f32.
    Call(Tensor, Tensor),
    /// These latents without noise, (1, C, h, w) f32: until there is an output of the pass, or of the
    /// model, that goes on from them.
    Clean(Tensor),
}

/// What one step changes in a trajectory.
pub(super) struct StepResult {
    pub(super) latents: Tensor,
    pub(super) shown: Shown,
    pub(super) sampler: SamplerState,
    pub(super) noise: Noise,
    /// What begins with it.
    pub(super) begins: Option<Begins>,
}

/// What begins with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begins {
    HiresPass,
    /// The refiner's part of a pass.
    Refiner,
}

impl StepResult {
    /// The first of a hires pass.
    pub(super) fn of_hires(upscaled: UpscaledLatents) -> Self {
        let UpscaledLatents { clean, latents, sampler, noise } = upscaled;
        let (shown, begins) = (Shown::Clean(clean), Some(Begins::HiresPass));
        Self { latents, shown, sampler, noise, begins }
    }
}

impl Trajectory {
    /// Whether nothing but decoding is left to do.
    pub fn done(&self) -> bool {
        self.run.sampler.next().is_none() && self.between.is_none()
    }

    /// Whether its next step is one of its picture, before the first pass or between two, and no
    /// UNet call.
    pub fn enlarging(&self) -> bool {
        self.before.is_some() || self.between.is_some()
    }

    /// Whether there is something to show of it: a UNet call is done.
    pub fn has_image(&self) -> bool {
        self.before.is_none() && self.progress().0 > self.steps_before
    }

    /// The files of its LoRAs, in the versions that it uses.
    pub fn lora_files(&self) -> Vec<AssetFile> {
        self.lora_files.clone()
    }

    /// Completed UNet evaluations and steps of a picture before or between the passes, and their
    /// total. Heun takes two a step, PNDM one more than steps.
    pub fn progress(&self) -> (usize, usize) {
        let left = |hires: &HiresPass| hires.run.evaluations() + hires.upscaler.steps();
        let left = self.hires.as_ref().map_or(0, left);
        let before = self.before.as_ref().map_or(0, Before::left);
        let done = self.steps_before + self.base_evaluations;
        let total = done + before + self.run.evaluations() + left;
        (done + self.run.sampler.completed() + self.steps_between, total)
    }

    /// Pixels times rows times evaluations that are left, those of ControlNets and the steps of
    /// pictures in the same unit.
    pub fn work_left(&self) -> usize {
        let work = |hires: &HiresPass| {
            let between = hires.upscaler.steps().saturating_sub(self.steps_between);
            between * hires.upscaler.step_work() + hires.size.pixels() * hires.run.row_calls(0)
        };
        let before = self.before.as_ref().map_or(0, Before::work_left);
        before
            + self.size.pixels() * self.run.row_calls(self.run.sampler.completed())
            + self.hires.as_ref().map_or(0, work)
    }

    /// Batch rows of a UNet call in the current pass ([`super::Pass::rows`]).
    pub fn rows(&self) -> usize {
        self.run.rows.len()
    }

    /// The size of the image in the current pass.
    pub fn size(&self) -> Size {
        self.size
    }

    /// The refiner, if it takes the next step.
    pub fn refiner(&self) -> Option<&ModelInfo> {
        self.run.model.as_ref().map(|refiner| &refiner.model.info)
    }

    /// Warnings for the user; the image is generated all the same.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The latents as they are now, (1, C, h, w) f32.
    pub fn latents(&self) -> &Tensor {
        &self.latents
    }

    /// The predicted x0 of the last UNet call (diffusers' `pred_original_sample`), or the latents
    /// if they are finished: (1, C, h, w) f32.
    pub(super) fn predicted_x0(&self) -> Result<Tensor> {
        match &self.shown {
            Some(shown) if self.run.sampler.next().is_some() => {
                let x0 = match shown {
                    Shown::Call(x, output) => self.run.sampler.predicted_x0(x, output)?,
                    Shown::Clean(x0) => x0.clone(),
                };
                self.blend.as_ref().map_or(Ok(x0.clone()), |blend| blend.without_noise(&x0))
            }
            _ => Ok(self.latents.clone()),
        }
    }

    /// The result of a step, from the UNet's output for the rows (rows, C, h, w) f32; `scale` is
    /// pixels per latent pixel. The trajectory stays as it is, so that a step can be repeated.
    pub(super) fn step(&self, output: &Tensor, scale: usize) -> Result<StepResult> {
        let Combined { guided: output, unguided } = self.run.rows.combine(output)?;
        let (mut sampler, mut noise) = (self.run.sampler.clone(), self.noise.clone());
        let outputs = Outputs { guided: &output, unguided: &unguided };
        let mut latents = sampler.advance(&self.latents, outputs, &mut noise)?;
        let refiner = self.run.refiner.as_ref().filter(|_| sampler.next().is_none());
        let shown = match refiner {
            None => Shown::Call(self.latents.clone(), output),
            Some(_) => Shown::Clean(sampler.predicted_x0(&self.latents, &output)?),
        };
        if let Some(refiner) = refiner {
            sampler = match &refiner.run.sampler {
                own if refiner.goes_on => sampler.resumed(own),
                own => own.clone(),
            };
            latents = sampler.raised(latents, &mut noise)?;
            sampler.draw_ahead(latents.shape(), &mut noise, latents.device())?;
        }
        if let Some(blend) = &self.blend {
            latents = blend.apply(&latents, &sampler)?;
        }
        let hires = self.hires.as_ref().filter(|_| sampler.next().is_none());
        let upscaled = hires.map(|hires| hires.begin(&latents, self.size, scale)).transpose()?;
        if let Some(upscaled) = upscaled.flatten() {
            return Ok(StepResult::of_hires(upscaled));
        }
        let begins = refiner.map(|_| Begins::Refiner);
        Ok(StepResult { latents, shown, sampler, noise, begins })
    }

    pub(super) fn advance(&mut self, result: StepResult) {
        let StepResult { latents, shown, sampler, noise, begins } = result;
        match begins {
            Some(Begins::HiresPass) => {
                if let Some(hires) = self.hires.take() {
                    self.base_evaluations += self.run.evaluations() + self.steps_between;
                    self.steps_between = 0;
                    self.between = None;
                    self.size = hires.size;
                    self.run = hires.run;
                }
            }
            Some(Begins::Refiner) => {
                if let Some(refiner) = self.run.refiner.take() {
                    if !refiner.goes_on {
                        self.base_evaluations += self.run.evaluations();
                    }
                    self.run = refiner.run;
                }
            }
            None => {}
        }
        self.latents = latents;
        self.shown = Some(shown);
        self.run.sampler = sampler;
        self.noise = noise;
        if begins.is_none() && self.hires.is_some() && self.run.sampler.next().is_none() {
            self.between = Some(Between::Decode);
        }
    }

    /// Takes a step of the input image that was computed.
    pub(super) fn advance_before(&mut self, step: BeforeStep) {
        self.steps_before += 1;
        match step {
            BeforeStep::Tile(tile) => {
                if let Some(before) = &mut self.before {
                    before.lay(tile);
                }
            }
            BeforeStep::Begun(begun) => {
                let (begun, sampler, noise) = *begun;
                let InitialLatents { latents, blend, mask_condition, step_noise } = begun;
                self.run.sampler = sampler;
                self.before = None;
                (self.latents, self.blend, self.mask_condition) = (latents, blend, mask_condition);
                self.noise = step_noise.unwrap_or(noise);
            }
        }
    }

    /// Takes a step of the picture between the passes that was computed.
    pub(super) fn advance_between(&mut self, step: BetweenStep) {
        self.steps_between += 1;
        match step {
            BetweenStep::Next(next) => self.between = Some(next),
            BetweenStep::Tile(tile) => {
                if let Some(Between::DecodeTiles(tiled) | Between::EncodeTiles(tiled)) =
                    &mut self.between
                {
                    tiled.lay(tile);
                }
            }
            BetweenStep::Enlarged(step) => {
                if let Some(Between::Enlarge(enlargement)) = &mut self.between {
                    enlargement.advance(step);
                    if let Some(picture) = enlargement.picture() {
                        self.between = Some(Between::Encode(picture.clone()));
                    }
                }
            }
            BetweenStep::Encoded(upscaled) => self.advance(StepResult::of_hires(*upscaled)),
        }
    }
}
