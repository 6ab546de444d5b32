//! One image in progress, between two UNet calls.

use candle_core::Tensor;

use super::control::ActiveControl;
use super::hires::{HiresPass, UpscaledLatents};
use super::init::InpaintBlend;
use super::rows::{Combined, Rows};
use crate::error::Result;
use crate::files::AssetFile;
use crate::layers::LoraStack;
use crate::picture::Size;
use crate::sampling::{Noise, Outputs, SamplerState};

/// One image in progress.
pub struct Trajectory {
    pub(super) size: Size,
    /// (1, C, h, w) f32
    pub(super) latents: Tensor,
    pub(super) rows: Rows,
    pub(super) loras: LoraStack,
    /// The files of the LoRAs of all passes.
    pub(super) lora_files: Vec<AssetFile>,
    pub(super) controls: Vec<ActiveControl>,
    pub(super) blend: Option<InpaintBlend>,
    /// Mask and masked image (1, 1 + C, h, w), concatenated to the latents of an inpainting UNet.
    pub(super) mask_condition: Option<Tensor>,
    pub(super) sampler: SamplerState,
    /// Time embeddings of the sampler's timesteps (evaluations, time_width).
    pub(super) time_embeddings: Tensor,
    pub(super) noise: Noise,
    /// The latents and the guided output of the last UNet call, both (1, C, h, w) f32.
    pub(super) last_call: Option<(Tensor, Tensor)>,
    /// The hires pass, while the base pass runs.
    pub(super) hires: Option<HiresPass>,
    /// Evaluations of the base pass, once the hires pass runs.
    pub(super) base_evaluations: usize,
    pub(super) warnings: Vec<String>,
}

/// What one step changes in a trajectory.
pub(super) struct StepResult {
    pub(super) latents: Tensor,
    pub(super) last_call: (Tensor, Tensor),
    pub(super) sampler: SamplerState,
    pub(super) noise: Noise,
    /// Whether the hires pass begins.
    pub(super) begins_hires: bool,
}

impl Trajectory {
    /// Whether nothing but decoding is left to do.
    pub fn done(&self) -> bool {
        self.sampler.next().is_none()
    }

    /// The files of its LoRAs, in the versions that it uses.
    pub fn lora_files(&self) -> Vec<AssetFile> {
        self.lora_files.clone()
    }

    /// Completed UNet evaluations, and their total. Heun takes two a step, PNDM one more than
    /// steps.
    pub fn progress(&self) -> (usize, usize) {
        let hires = self.hires.as_ref().map_or(0, |hires| hires.sampler.evaluations());
        let total = self.base_evaluations + self.sampler.evaluations() + hires;
        (self.base_evaluations + self.sampler.completed(), total)
    }

    /// Pixels times rows times evaluations that are left.
    pub fn work_left(&self) -> usize {
        let left = self.sampler.evaluations() - self.sampler.completed();
        let work = |hires: &HiresPass| {
            hires.size.pixels() * hires.rows.len() * hires.sampler.evaluations()
        };
        self.size.pixels() * self.rows() * left + self.hires.as_ref().map_or(0, work)
    }

    /// Batch rows of a UNet call in the current pass ([`super::Pass::rows`]).
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// The size of the image in the current pass.
    pub fn size(&self) -> Size {
        self.size
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
        match &self.last_call {
            Some((x, output)) if !self.done() => {
                let x0 = self.sampler.predicted_x0(x, output)?;
                self.blend.as_ref().map_or(Ok(x0.clone()), |blend| blend.without_noise(&x0))
            }
            _ => Ok(self.latents.clone()),
        }
    }

    /// The result of a step, from the UNet's output for the rows (rows, C, h, w) f32; `scale` is
    /// pixels per latent pixel. The trajectory stays as it is, so that a step can be repeated.
    pub(super) fn step(&self, output: &Tensor, scale: usize) -> Result<StepResult> {
        let Combined { guided: output, unguided } = self.rows.combine(output)?;
        let (mut sampler, mut noise) = (self.sampler.clone(), self.noise.clone());
        let outputs = Outputs { guided: &output, unguided: &unguided };
        let mut latents = sampler.advance(&self.latents, outputs, &mut noise)?;
        if let Some(blend) = &self.blend {
            latents = blend.apply(&latents, &sampler)?;
        }
        match self.hires.as_ref().filter(|_| sampler.next().is_none()) {
            None => {
                let last_call = (self.latents.clone(), output);
                Ok(StepResult { latents, last_call, sampler, noise, begins_hires: false })
            }
            Some(hires) => {
                let UpscaledLatents { clean, latents, noise } =
                    hires.begin(&latents, self.size, scale)?;
                // Until there is an output, a preview shows the upscaled latents.
                let last_call = (clean.clone(), clean);
                let sampler = hires.sampler.clone();
                Ok(StepResult { latents, last_call, sampler, noise, begins_hires: true })
            }
        }
    }

    pub(super) fn advance(&mut self, result: StepResult) {
        let StepResult { latents, last_call, sampler, noise, begins_hires } = result;
        if begins_hires && let Some(hires) = self.hires.take() {
            self.base_evaluations = self.sampler.evaluations();
            self.size = hires.size;
            self.time_embeddings = hires.time_embeddings;
            self.rows = hires.rows;
            self.loras = hires.loras;
            self.controls = hires.controls;
        }
        self.latents = latents;
        self.last_call = Some(last_call);
        self.sampler = sampler;
        self.noise = noise;
    }
}
