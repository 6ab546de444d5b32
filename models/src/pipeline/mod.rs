//! A loaded model, and the images in progress.
//!
//! The sampler's loop is the caller's: [`Pipeline::step`] takes one evaluation of any number of
//! trajectories, each at its own step of its own schedule, in a single UNet call. Batch rows: a
//! trajectory with guidance takes two (unconditional, conditional) and more if its prompt joins
//! several, one without takes one.

mod before;
mod between;
mod control;
mod control_spec;
mod decode;
mod defaults;
mod device;
mod drawing_model;
mod enlarge;
mod few_steps;
mod hires;
mod index;
mod info;
mod init;
mod ip_adapter;
mod ip_adapter_spec;
mod load;
mod options;
mod pass;
mod pass_loras;
mod preview;
mod prompts;
mod read_files;
mod refiner;
mod refiner_spec;
mod rows;
mod run;
mod spec;
mod text_encoders;
mod trajectory;
mod upscaler;
mod upscaler_cache;
mod vae;
mod variation;
mod xl;

use std::sync::Arc;

use candle_core::Tensor;

use self::before::BeforeStep;
use self::between::BetweenStep;
pub use self::control::ControlNets;
use self::control::{ActiveControl, ControlledRows, residuals};
pub use self::control_spec::{
    Control, ControlMode, ControlPasses, ControlRule, Extension, MAX_CONTROL_SCALE,
};
use self::decode::VaeMode;
pub use self::defaults::{Chosen, Defaults};
pub use self::device::{DeviceName, Precision};
use self::drawing_model::DrawingModel;
use self::enlarge::LoadedUpscaler;
pub use self::enlarge::{Enlarge, Enlargement};
use self::hires::HiresPass;
pub use self::index::{PipelineParts, check_pipeline};
pub use self::info::{MAX_NOISE_SCALE, MemoryEstimate, ModelInfo, SingleFiles};
use self::init::InitialLatents;
pub use self::ip_adapter::IpAdapters;
pub use self::ip_adapter_spec::{BlockScale, IpAdapter, IpScale, MAX_IP_SCALE};
pub use self::load::parameters;
pub use self::options::{AddOns, FreeBytes, LoadOptions, SafetyMode};
pub use self::pass::Pass;
pub use self::pass_loras::PassLoras;
use self::preview::Preview;
use self::refiner::{LoadedRefiner, RefinerCache};
pub use self::refiner_spec::Refiner;
use self::run::Named;
pub use self::spec::{Hires, Img2Img, MAX_STEPS, MaskedStart, PromptSyntax, Spec};
pub use self::text_encoders::encode_chunks;
use self::trajectory::StepResult;
pub use self::trajectory::Trajectory;
pub use self::upscaler::{LatentUpscaler, PictureUpscaler, REAL_ESRGAN, TILE_WORK, Upscaler};
pub use self::variation::Variation;
use self::xl::Taken;
pub use self::xl::XlOptions;
use crate::error::{Error, Result};
use crate::layers::LoraStack;
use crate::networks::Conditioning;
use crate::ops::{
    KernelStats, begin_step, cat_rows, device_kernels, device_name, device_pool_bytes,
    device_stats, end_step, free_device_bytes, linear_combination, tiling,
};
use crate::picture::Rgb;
use crate::sampling::Noise;

/// A loaded model.
pub struct Pipeline {
    own: DrawingModel,
    refiners: Arc<RefinerCache>,
}

impl Pipeline {
    /// Reads a model from its files. Takes seconds.
    pub fn load(options: &LoadOptions) -> Result<Self> {
        let (device, warning) = options.device.choose()?;
        let mut own = DrawingModel::load(options, device)?;
        own.model.info.warnings.splice(0..0, warning);
        let refiners = Arc::new(RefinerCache::new(options, &own.model)?);
        Ok(Self { own, refiners })
    }

    /// Properties of the model.
    pub fn info(&self) -> &ModelInfo {
        &self.own.model.info
    }

    /// Number of tokens of a text, without those that mark its ends; of one that has none that are
    /// known, 0.
    pub fn text_tokens(&self, text: &str) -> usize {
        let words = self.own.model.texts.first.tokenizer.words(text).unwrap_or_default();
        words.iter().map(Vec::len).sum()
    }

    /// Free bytes on the GPU, with those that its pool keeps; `None` on the CPU, whose memory is the
    /// host's.
    pub fn free_device_bytes(&self) -> Option<u64> {
        free_device_bytes(&self.own.model.device)
    }

    /// Bytes of the weights of the refiners that were read for its images.
    pub fn refiner_bytes(&self) -> u64 {
        self.refiners.bytes()
    }

    /// Bytes that the GPU's pool keeps of what earlier steps have freed; `None` on the CPU.
    pub fn pool_bytes(&self) -> Option<u64> {
        device_pool_bytes(&self.own.model.device)
    }

    /// The GPU's name; `None` on the CPU.
    pub fn device_name(&self) -> Option<String> {
        device_name(&self.own.model.device)
    }

    /// The modules that our kernels were loaded from, such as "cubin 8.6" or "PTX 8.0"; `None` on
    /// the CPU.
    pub fn device_kernels(&self) -> Option<String> {
        device_kernels(&self.own.model.device)
    }

    /// Waits until the device has finished its queued work.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.own.model.device.synchronize()?)
    }

    /// Statistics of our GPU kernels since the process started, by kind.
    pub fn work() -> Vec<(&'static str, KernelStats)> {
        device_stats()
    }

    /// Checks a spec against the model's limits.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        self.own.model.info.check(spec)
    }

    /// Reads what a spec names, for another thread to run; `None` if it names nothing. It is what
    /// [`Self::begin_with`] and [`Self::begin_enlarging`] take.
    pub fn read_files(
        &self,
        spec: &Spec,
    ) -> Option<impl FnOnce() -> Result<NamedFiles> + Send + use<>> {
        let loras = PassLoras::reader(&self.own.model.loras, spec);
        let nets: Vec<_> = spec.controls.iter().map(|control| control.model.clone()).collect();
        let controlnets = Arc::clone(&self.own.model.controlnets);
        let adapters: Vec<_> = spec.ip_adapters.iter().map(|own| own.model.clone()).collect();
        let ip_adapters = Arc::clone(&self.own.model.ip_adapters);
        let named: Vec<_> = spec.upscalers().map(|(field, name)| (field, name.clone())).collect();
        let cache = Arc::clone(&self.own.model.upscalers);
        let refiners = Arc::clone(&self.refiners);
        let refined = spec.refiner.clone().map(|refiner| (refiner, spec.clone()));
        let has_models = !nets.is_empty() || !adapters.is_empty() || refined.is_some();
        let some = loras.is_some() || has_models || !named.is_empty();
        some.then_some(move || {
            // First: of all it is most likely to find no room.
            let refiner = refined.map(|(refiner, spec)| refiners.get(&refiner, &spec));
            let refiner = refiner.transpose()?;
            let loras = loras.map_or_else(|| Ok(PassLoras::default()), |read| read())?;
            let upscalers = named.iter().map(|(field, name)| cache.get(field, name));
            let upscalers = upscalers.collect::<Result<_>>()?;
            let (controlnets, ip_adapters) = (controlnets.get(&nets)?, ip_adapters.get(&adapters)?);
            Ok(NamedFiles { loras, controlnets, ip_adapters, upscalers, refiner })
        })
    }

    /// [`Self::begin_with`] what the spec names, whose files are read if necessary.
    pub fn begin(&self, spec: &Spec) -> Result<Trajectory> {
        let files = self.read_files(spec).map_or_else(|| Ok(NamedFiles::default()), |read| read());
        self.begin_with(spec, files?)
    }

    /// Begins with the picture that a spec enlarges. Reads no file.
    pub fn begin_enlarging(&self, spec: &Spec, files: NamedFiles) -> Result<Enlargement> {
        self.check(spec)?;
        let Some(enlarge) = &spec.enlarge else {
            let reason = "is required of what is enlarged".into();
            return Err(Error::Spec { field: "image", reason });
        };
        Enlargement::new(enlarge, files.upscalers, &self.own.model.device)
    }

    /// One step of a picture that is enlarged, which is unchanged after an error.
    pub fn enlarge(&self, enlargement: &mut Enlargement) -> Result<()> {
        let step = enlargement.step()?;
        enlargement.advance(step);
        Ok(())
    }

    /// Encodes the prompts and the input image, and draws the noise. Reads no file.
    pub fn begin_with(&self, spec: &Spec, files: NamedFiles) -> Result<Trajectory> {
        self.check(spec)?;
        let NamedFiles { loras, controlnets: nets, ip_adapters, upscalers, refiner } = files;
        if spec.refiner.is_some() != refiner.is_some() {
            return Err(Error::Spec { field: "refiner", reason: "was not read".into() });
        }
        let named = Named { nets: &nets, adapters: &ip_adapters, refiner: refiner.as_ref() };
        let lora_files = loras.files();
        let PassLoras { base: loras, hires: of_hires } = loras;
        let mut warnings: Vec<_> = spec.warnings.iter().cloned().chain(loras.warnings()).collect();
        warnings.extend(nets.warnings().chain(ip_adapters.warnings()));
        warnings.extend(refiner.iter().flat_map(LoadedRefiner::warnings));
        let taken = refiner.iter().map(|refiner| refiner.model.model.taken());
        let taken = taken.fold(self.own.model.taken(), Taken::or);
        let prompts = [&spec.prompt, &spec.negative_prompt].map(String::as_str);
        warnings.extend(spec.xl.without_effect(prompts, taken));
        let base = Pass::base(spec);
        warnings.extend(base.idle_options());
        let mut run = self.own.run(base, (&loras, named), &mut warnings)?;
        let mut noise = Noise::new(spec.seed);
        let (before, begun) = before::begin(&self.own.model, spec, &run.sampler, &mut noise)?;
        let InitialLatents { latents, blend, mask_condition, step_noise } = begun;
        let mut noise = step_noise.unwrap_or(noise);
        let hires = self.hires_pass(spec, (of_hires, named, &upscalers), &mut warnings)?;
        let of_hires = hires.iter().flat_map(|hires| &hires.run.controls);
        let mut nets: Vec<_> =
            run.controls.iter().chain(of_hires).map(ActiveControl::name).collect();
        nets.dedup();
        // Where the input image is encoded in tiles, its own noise comes first.
        if before.is_none() {
            run.sampler.draw_ahead(latents.shape(), &mut noise, &self.own.model.device)?;
        }
        Ok(Trajectory {
            nets,
            size: spec.size,
            latents,
            run,
            lora_files,
            blend,
            mask_condition,
            noise,
            shown: None,
            hires,
            vae_mode: VaeMode { tiling: spec.tiling, tiles: spec.has_vae_tiles() },
            before,
            steps_before: 0,
            between: None,
            steps_between: 0,
            base_evaluations: 0,
            decoding: None,
            warnings,
        })
    }

    /// The hires pass of an image, if it has one; adds to the warnings.
    fn hires_pass(
        &self,
        spec: &Spec,
        (loras, named, upscalers): (LoraStack, Named<'_>, &[LoadedUpscaler]),
        warnings: &mut Vec<String>,
    ) -> Result<Option<HiresPass>> {
        let (Some(pass), Some(hires)) = (Pass::hires(spec), &spec.hires) else { return Ok(None) };
        let unet = self.own.model.unet.config();
        if unet.in_channels > unet.out_channels {
            let reason = "is not supported by an inpainting UNet".into();
            return Err(Error::Spec { field: "hires_width", reason });
        }
        let found = loras.warnings().chain(pass.idle_options());
        let found: Vec<_> = found.filter(|warning| !warnings.contains(warning)).collect();
        warnings.extend(found);
        Ok(Some(HiresPass {
            size: hires.size,
            run: self.own.run(pass, (&loras, named), warnings)?,
            upscaler: between::upscaler(spec, hires, upscalers, &self.own.model.vae)?,
            seed: spec.seed,
            seed_delta: pass.seed_delta(),
            variation: spec.variation,
        }))
    }

    /// One step of all trajectories that are not done; all must have one size. It is one UNet call,
    /// and for each whose picture is encoded in tiles or between two passes a step of that. After an
    /// error every trajectory is unchanged, so that the step can be repeated.
    ///
    /// On a GPU a step is queued, and the one before it is done.
    pub fn step(&self, batch: &mut [&mut Trajectory]) -> Result<()> {
        begin_step(&self.own.model.device)?;
        let aside = |t: &&mut Trajectory| match (&t.before, &t.hires, &t.between) {
            (Some(before), ..) => before
                .step(&self.own.model.vae, &t.run.sampler, &t.noise)
                .map(Aside::Before)
                .map(Some),
            (None, Some(hires), Some(between)) => {
                let (model, latents) = (&self.own.model, || self.unscaled(t));
                let step = between::step(model, (t.size, t.vae_mode), (hires, between), latents);
                let step = step.map_err(|error| decode::named(error, &t.nets));
                step.map(Aside::Between).map(Some)
            }
            _ => Ok(None),
        };
        let aside = batch.iter().map(aside).collect::<Result<Vec<_>>>()?;
        let mut kinds: Vec<CallKind> = Vec::new();
        for kind in batch.iter().map(|trajectory| CallKind::of(trajectory)) {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        let sampled = kinds.iter().map(|kind| self.sample(batch, kind));
        let sampled = sampled.collect::<Result<Vec<_>>>()?;
        end_step(&self.own.model.device)?;
        // Only now, when nothing can fail any more.
        for (trajectory, step) in batch.iter_mut().zip(aside) {
            match step {
                Some(Aside::Before(step)) => trajectory.advance_before(step),
                Some(Aside::Between(step)) => trajectory.advance_between(step),
                None => {}
            }
        }
        for (place, result) in sampled.into_iter().flatten() {
            batch[place].advance(result);
        }
        Ok(())
    }

    /// One UNet call for the trajectories that have one of this kind next: their places, and what it
    /// changes in each.
    fn sample(
        &self,
        batch: &mut [&mut Trajectory],
        kind: &CallKind,
    ) -> Result<Vec<(usize, StepResult)>> {
        let model = &kind.refiner.as_deref().unwrap_or(&self.own).model;
        let (mut latents, mut times) = (Vec::new(), Vec::new());
        let (mut conditioning, mut seen, mut loras) = (Vec::new(), Vec::new(), Vec::new());
        let mut active: Vec<(usize, &mut Trajectory)> = Vec::new();
        let mut controlled = Vec::new();
        let members = batch.iter_mut().enumerate();
        let members = members.filter(|(_, t)| CallKind::of(t) == *kind && t.before.is_none());
        for (place, trajectory) in members {
            let Some(evaluation) = trajectory.run.sampler.next() else { continue };
            let input = linear_combination(&[(evaluation.input_scale, &trajectory.latents)])?;
            let run = &trajectory.run;
            let evaluation = run.sampler.completed();
            controlled.push(ControlledRows {
                evaluation,
                latents: input.clone(),
                conditioning: run.rows.at(evaluation).cloned().collect(),
                is_guided: run.rows.unconditional.is_some(),
            });
            let input = match &trajectory.mask_condition {
                Some(condition) => Tensor::cat(&[&input, condition], 1)?,
                None => input,
            };
            let time = run.time_embeddings.narrow(0, evaluation, 1)?;
            let is_guided = run.rows.unconditional.is_some();
            for (k, row) in run.rows.at(evaluation).enumerate() {
                latents.push(input.clone());
                seen.push(run.images.at(evaluation, is_guided && k == 0));
                conditioning.push(Arc::clone(row));
                times.push(time.clone());
                loras.push(run.loras.clone());
            }
            active.push((place, trajectory));
        }
        if active.is_empty() {
            return Ok(Vec::new());
        }
        let (latents, times) = (cat_rows(&latents)?, cat_rows(&times)?);
        let rows: Vec<_> = conditioning.iter().map(Arc::as_ref).collect();
        let conditioning = Conditioning::stack_seeing(&rows, &seen)?;
        let mut nets: Vec<_> =
            active.iter_mut().map(|(_, image)| &mut image.run.controls).collect();
        // As in AUTOMATIC1111, a ControlNet's own convolutions do not wrap.
        let residuals = residuals(&mut nets, &controlled)?;
        let predict =
            || model.unet.forward_controlled(&latents, &times, &conditioning, &loras, &residuals);
        let output = tiling(kind.is_tiling, predict)?;
        let scale = model.vae.config().scale();
        let mut row = 0;
        let mut results = Vec::new();
        for (place, trajectory) in active {
            let rows = trajectory.rows();
            results.push((place, trajectory.step(&output.narrow(0, row, rows)?, scale)?));
            row += rows;
        }
        Ok(results)
    }

    /// A live preview of a trajectory, one pixel per latent pixel: the predicted x0 of the last
    /// UNet call, or the latents if they are finished. The first call fits the latent-to-RGB
    /// approximation, which decodes 32 x 32 latent pixels and takes as long; later calls take
    /// negligible time.
    pub fn preview(&self, trajectory: &Trajectory) -> Result<Rgb> {
        let DrawingModel { model, preview: cell, .. } = self.drawing(trajectory);
        let preview = match cell.get() {
            Some(preview) => preview,
            None => {
                let decode =
                    |latents: &Tensor| model.vae.decode(&latents.to_device(&model.device)?);
                let fitted = Preview::fit(model.vae.config(), decode)?;
                cell.get_or_init(|| fitted)
            }
        };
        preview.render(&trajectory.predicted_x0()?)
    }

    /// The image of a trajectory. If the trajectory is not done, the predicted x0 of the last UNet
    /// call is decoded, as AUTOMATIC1111 does when it is interrupted.
    pub fn decode(&self, trajectory: &Trajectory) -> Result<Rgb> {
        let model = &self.drawing(trajectory).model;
        let picture = decode::picture(model, &self.unscaled(trajectory)?, trajectory.vae_mode);
        picture.map_err(|error| decode::named(error, &trajectory.nets))
    }

    /// [`Self::decode`] in parts: a call decodes one tile, and returns the image with the last. One
    /// that is not in tiles has one part.
    pub fn decode_part(&self, trajectory: &mut Trajectory) -> Result<Option<Rgb>> {
        let tiled = match trajectory.decoding.take() {
            None => {
                let model = &self.drawing(trajectory).model;
                decode::tiles(model, &self.unscaled(trajectory)?, trajectory.vae_mode)?
            }
            begun => begun,
        };
        let Some(mut tiled) = tiled else { return self.decode(trajectory).map(Some) };
        match decode::tile(&self.drawing(trajectory).model, &tiled) {
            Ok(tile) => tiled.lay(tile),
            Err(error) => {
                // Those that are done stay.
                trajectory.decoding = Some(tiled);
                return Err(decode::named(error, &trajectory.nets));
            }
        }
        if tiled.left() == 0 {
            return decode::rgb(&tiled.joined()?).map(Some);
        }
        trajectory.decoding = Some(tiled);
        Ok(None)
    }

    /// The latents (1, C, h, w) of what there is of an image, as the decoder takes them.
    fn unscaled(&self, trajectory: &Trajectory) -> Result<Tensor> {
        let vae = &self.drawing(trajectory).model.vae;
        vae.config().unscaled(&trajectory.predicted_x0()?)
    }

    /// The model of a trajectory's next step.
    fn drawing<'a>(&'a self, trajectory: &'a Trajectory) -> &'a DrawingModel {
        trajectory.run.model.as_deref().unwrap_or(&self.own)
    }

    /// Whether the safety checker flags an image as NSFW; `None` without a safety checker.
    pub fn check_safety(&self, image: &Rgb) -> Result<Option<bool>> {
        let checker = self.own.model.safety_checker.as_ref();
        checker.map(|checker| Ok(checker.check(image)?.nsfw())).transpose()
    }
}

/// What the UNet calls of images must have in common to be one.
struct CallKind {
    /// Whether opposite edges meet.
    is_tiling: bool,
    /// The refiner whose UNet it is, if it is not the model's own.
    refiner: Option<Arc<DrawingModel>>,
}

impl CallKind {
    fn of(trajectory: &Trajectory) -> Self {
        Self { is_tiling: trajectory.vae_mode.tiling, refiner: trajectory.run.model.clone() }
    }
}

impl PartialEq for CallKind {
    fn eq(&self, other: &Self) -> bool {
        let is_same = match (&self.refiner, &other.refiner) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        self.is_tiling == other.is_tiling && is_same
    }
}

/// What a step computes that is no UNet call.
enum Aside {
    Before(BeforeStep),
    Between(BetweenStep),
}

/// The files that an image names, as they were read.
#[derive(Clone, Default)]
pub struct NamedFiles {
    /// The LoRAs of its passes.
    pub loras: PassLoras,
    /// Its ControlNets.
    pub controlnets: ControlNets,
    /// Its IP-Adapters.
    pub ip_adapters: IpAdapters,
    /// Those of [`Spec::upscalers`].
    pub(crate) upscalers: Vec<LoadedUpscaler>,
    /// Its refiner, with the LoRAs that it has there.
    pub(crate) refiner: Option<LoadedRefiner>,
}

impl NamedFiles {
    /// Its refiner.
    pub fn refiner(&self) -> Option<&ModelInfo> {
        self.refiner.as_ref().map(|refiner| &refiner.model.model.info)
    }

    /// An estimate of what a step of its upscalers takes beside the model, in bytes.
    pub fn upscaling_bytes(&self) -> u64 {
        self.upscalers.iter().map(LoadedUpscaler::tile_bytes).max().unwrap_or_default()
    }
}

#[cfg(test)]
pub(crate) mod tests;
