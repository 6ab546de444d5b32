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
mod rows;
mod spec;
mod text_encoders;
mod trajectory;
mod upscaler;
mod upscaler_cache;
mod vae;
mod variation;
mod xl;

use std::sync::{Arc, OnceLock};

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
use self::enlarge::LoadedUpscaler;
pub use self::enlarge::{Enlarge, Enlargement};
use self::hires::HiresPass;
pub use self::index::{PipelineParts, check_pipeline};
pub use self::info::{MAX_NOISE_SCALE, MemoryEstimate, ModelInfo, SingleFiles};
use self::init::InitialLatents;
use self::ip_adapter::ActiveImages;
pub use self::ip_adapter::IpAdapters;
pub use self::ip_adapter_spec::{BlockScale, IpAdapter, IpScale, MAX_IP_SCALE};
use self::load::LoadedModel;
pub use self::load::parameters;
pub use self::options::{AddOns, LoadOptions, SafetyMode};
pub use self::pass::Pass;
pub use self::pass_loras::PassLoras;
use self::preview::Preview;
use self::prompts::{Encoding, PromptCache};
use self::rows::Rows;
pub use self::spec::{Hires, Img2Img, MAX_STEPS, MaskedStart, PromptSyntax, Spec};
pub use self::text_encoders::encode_chunks;
use self::trajectory::StepResult;
pub use self::trajectory::Trajectory;
pub use self::upscaler::{LatentUpscaler, PictureUpscaler, REAL_ESRGAN, TILE_WORK, Upscaler};
pub use self::variation::Variation;
pub use self::xl::XlOptions;
use crate::error::{Error, Result};
use crate::layers::LoraStack;
use crate::networks::Conditioning;
use crate::ops::{
    KernelStats, begin_step, cat_rows, device_kernels, device_name, device_pool_bytes,
    device_stats, end_step, free_device_bytes, linear_combination, tiling,
};
use crate::picture::Rgb;
use crate::sampling::{Noise, Run, SamplerName, SamplerState};

/// A loaded model.
pub struct Pipeline {
    model: LoadedModel,
    prompts: PromptCache,
    /// Fitted at the first preview.
    preview: OnceLock<Preview>,
}

impl Pipeline {
    /// Reads a model from its files. Takes seconds.
    pub fn load(options: &LoadOptions) -> Result<Self> {
        let model = LoadedModel::load(options)?;
        Ok(Self { model, prompts: PromptCache::default(), preview: OnceLock::new() })
    }

    /// Properties of the model.
    pub fn info(&self) -> &ModelInfo {
        &self.model.info
    }

    /// Number of tokens of a text, without those that mark its ends; of one that has none that are
    /// known, 0.
    pub fn text_tokens(&self, text: &str) -> usize {
        let words = self.model.texts.first.tokenizer.words(text).unwrap_or_default();
        words.iter().map(Vec::len).sum()
    }

    /// Free bytes on the GPU, with those that its pool keeps; `None` on the CPU, whose memory is the
    /// host's.
    pub fn free_device_bytes(&self) -> Option<u64> {
        free_device_bytes(&self.model.device)
    }

    /// Bytes that the GPU's pool keeps of what earlier steps have freed; `None` on the CPU.
    pub fn pool_bytes(&self) -> Option<u64> {
        device_pool_bytes(&self.model.device)
    }

    /// The GPU's name; `None` on the CPU.
    pub fn device_name(&self) -> Option<String> {
        device_name(&self.model.device)
    }

    /// The modules that our kernels were loaded from, such as "cubin 8.6" or "PTX 8.0"; `None` on
    /// the CPU.
    pub fn device_kernels(&self) -> Option<String> {
        device_kernels(&self.model.device)
    }

    /// Waits until the device has finished its queued work.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.model.device.synchronize()?)
    }

    /// Statistics of our GPU kernels since the process started, by kind.
    pub fn work() -> Vec<(&'static str, KernelStats)> {
        device_stats()
    }

    /// Checks a spec against the model's limits.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        self.model.info.check(spec)
    }

    /// Reads what a spec names, for another thread to run; `None` if it names nothing. It is what
    /// [`Self::begin_with`] and [`Self::begin_enlarging`] take.
    pub fn read_files(
        &self,
        spec: &Spec,
    ) -> Option<impl FnOnce() -> Result<NamedFiles> + Send + use<>> {
        let loras = PassLoras::reader(&self.model.loras, spec);
        let nets: Vec<_> = spec.controls.iter().map(|control| control.model.clone()).collect();
        let controlnets = Arc::clone(&self.model.controlnets);
        let adapters: Vec<_> = spec.ip_adapters.iter().map(|own| own.model.clone()).collect();
        let ip_adapters = Arc::clone(&self.model.ip_adapters);
        let named: Vec<_> = spec.upscalers().map(|(field, name)| (field, name.clone())).collect();
        let cache = Arc::clone(&self.model.upscalers);
        let has_nets = !nets.is_empty() || !adapters.is_empty();
        let some = loras.is_some() || has_nets || !named.is_empty();
        some.then_some(move || {
            let loras = loras.map_or_else(|| Ok(PassLoras::default()), |read| read())?;
            let upscalers = named.iter().map(|(field, name)| cache.get(field, name));
            let upscalers = upscalers.collect::<Result<_>>()?;
            let (controlnets, ip_adapters) = (controlnets.get(&nets)?, ip_adapters.get(&adapters)?);
            Ok(NamedFiles { loras, controlnets, ip_adapters, upscalers })
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
        Enlargement::new(enlarge, files.upscalers, &self.model.device)
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
        let NamedFiles { loras, controlnets: nets, ip_adapters, upscalers } = files;
        let lora_files = loras.files();
        let PassLoras { base: loras, hires: of_hires } = loras;
        let mut warnings: Vec<_> = spec.warnings.iter().cloned().chain(loras.warnings()).collect();
        warnings.extend(nets.warnings().chain(ip_adapters.warnings()));
        if !self.model.info.is_xl {
            warnings.extend(spec.xl.without_effect([&spec.prompt, &spec.negative_prompt]));
        }
        let base = Pass::base(spec);
        warnings.extend(base.idle_options());
        let mut sampler = self.sampler(base)?;
        let rows = self.rows(base, &loras, &mut warnings)?;
        let mut noise = Noise::new(spec.seed);
        let (before, begun) = before::begin(&self.model, spec, &sampler, &mut noise)?;
        let InitialLatents { latents, blend, mask_condition, step_noise } = begun;
        let mut noise = step_noise.unwrap_or(noise);
        let time_embeddings = self.time_embeddings(&sampler, base, &loras)?;
        let controls = controls(base, &nets, &sampler, &mut warnings)?;
        let images = self.images(base, &ip_adapters, &sampler, &mut warnings)?;
        let files = (of_hires, &nets, &ip_adapters, &upscalers[..]);
        let hires = self.hires_pass(spec, files, &mut warnings)?;
        let of_hires = hires.iter().flat_map(|hires| &hires.controls);
        let mut nets: Vec<_> = controls.iter().chain(of_hires).map(ActiveControl::name).collect();
        nets.dedup();
        // Where the input image is encoded in tiles, its own noise comes first.
        if before.is_none() {
            sampler.draw_ahead(latents.shape(), &mut noise, &self.model.device)?;
        }
        Ok(Trajectory {
            nets,
            size: spec.size,
            latents,
            rows,
            loras,
            lora_files,
            controls,
            images,
            blend,
            mask_condition,
            sampler,
            time_embeddings,
            noise,
            last_call: None,
            hires,
            tiling: spec.tiling,
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

    /// The batch rows of a pass; adds to the warnings.
    fn rows<'a>(
        &'a self,
        pass: Pass<'a>,
        loras: &'a LoraStack,
        warnings: &mut Vec<String>,
    ) -> Result<Rows> {
        let spec = pass.spec;
        let is_xl = self.model.info.is_xl;
        let encoding = |skip, second: Option<&'a str>| Encoding {
            cache: &self.prompts,
            model: &self.model,
            syntax: spec.prompt_syntax,
            second: second.filter(|_| is_xl),
            skip,
            sizes: spec.xl.sizes(pass.size()),
            loras,
            warnings: Vec::new(),
            has_truncated: false,
            second_warnings: Vec::new(),
        };
        // AUTOMATIC1111 always takes the last layer but one of Stable Diffusion XL's encoders.
        let skips = !(is_xl && spec.prompt_syntax == PromptSyntax::A1111);
        if spec.clip_skip > 0 && !skips {
            let why = "has no effect on Stable Diffusion XL, as in AUTOMATIC1111";
            warnings.push(format!("clip_skip {why}"));
        }
        let skip = |layers| if skips { layers } else { 0 };
        let mut warn = |field: &'static str, encoding: Encoding<'_>| {
            let own = encoding.warnings.into_iter();
            warnings.extend(own.map(|warning| format!("{} {warning}", pass.field(field))));
            // Of several texts the first.
            let second = encoding.second_warnings.into_iter().next();
            warnings.extend(second.map(|warning| format!("{field}_2 {warning}")));
        };
        let mut prompt = encoding(skip(spec.clip_skip), pass.second_prompt());
        let directions = pass.directions()?;
        if let [(_, weight)] = &directions[..]
            && *weight != 1.0
        {
            // "a photo, 16:9"
            prompt.warnings.push(format!(
                "is weighed by {weight}: its guidance is multiplied by that, as in AUTOMATIC1111"
            ));
        }
        let conditional = prompt.rows(&directions)?;
        warn("prompt", prompt);
        let zeros = self.model.zeros_for_absent && pass.negative_is_absent();
        let unconditional = match pass.is_guided() {
            true => {
                let second = pass.second_negative_prompt();
                let mut negative = encoding(skip(spec.negative_clip_skip()), second);
                let row = match zeros {
                    true => negative.zeros()?,
                    false => negative.row(&pass.negative_directions()?)?,
                };
                warn("negative_prompt", negative);
                if zeros && second.is_some() {
                    let why = "without a negative_prompt the model takes zeros for both";
                    warnings.push(format!("negative_prompt_2 has no effect: {why}"));
                }
                Some(row)
            }
            false => {
                warnings.extend(without_guidance(pass, is_xl));
                None
            }
        };
        let (guidance_scale, guidance_rescale) = (pass.scale_of_rows(), spec.guidance_rescale);
        Ok(Rows { unconditional, conditional, guidance_scale, guidance_rescale })
    }

    /// The hires pass of an image, if it has one; adds to the warnings.
    fn hires_pass(
        &self,
        spec: &Spec,
        (loras, nets, adapters, upscalers): (
            LoraStack,
            &ControlNets,
            &IpAdapters,
            &[LoadedUpscaler],
        ),
        warnings: &mut Vec<String>,
    ) -> Result<Option<HiresPass>> {
        let (Some(pass), Some(hires)) = (Pass::hires(spec), &spec.hires) else { return Ok(None) };
        let unet = self.model.unet.config();
        if unet.in_channels > unet.out_channels {
            let reason = "is not supported by an inpainting UNet".into();
            return Err(Error::Spec { field: "hires_width", reason });
        }
        let sampler = self.sampler(pass)?;
        let mut found: Vec<_> = loras.warnings().collect();
        found.extend(pass.idle_options());
        let rows = self.rows(pass, &loras, &mut found)?;
        found.retain(|warning| !warnings.contains(warning));
        warnings.extend(found);
        Ok(Some(HiresPass {
            size: hires.size,
            time_embeddings: self.time_embeddings(&sampler, pass, &loras)?,
            controls: controls(pass, nets, &sampler, warnings)?,
            images: self.images(pass, adapters, &sampler, warnings)?,
            sampler,
            rows,
            loras,
            upscaler: between::upscaler(spec, hires, upscalers, &self.model.vae)?,
            seed: spec.seed,
            seed_delta: pass.seed_delta(),
            variation: spec.variation,
        }))
    }

    /// The pictures that the rows of a pass see, which begins with the sampler; adds to the warnings.
    fn images(
        &self,
        pass: Pass<'_>,
        adapters: &IpAdapters,
        sampler: &SamplerState,
        warnings: &mut Vec<String>,
    ) -> Result<ActiveImages> {
        ActiveImages::begin((adapters, &*self.model.ip_adapters), pass, sampler, warnings)
    }

    /// The sampler of a pass.
    fn sampler(&self, pass: Pass<'_>) -> Result<SamplerState> {
        let SamplerName { sampler, schedule } = pass.sampler();
        let (steps, skipped) = (pass.steps(), pass.skipped_steps());
        let (options, share) = (pass.sampler_options(), pass.share_of_levels());
        let is_xl = self.model.info.is_xl;
        let run = Run { sampler, schedule, options, steps, skipped, share, is_xl };
        SamplerState::new(&self.model.scheduler, run)
    }

    /// The time embeddings of a sampler's timesteps (evaluations, time_width).
    fn time_embeddings(
        &self,
        sampler: &SamplerState,
        pass: Pass<'_>,
        loras: &LoraStack,
    ) -> Result<Tensor> {
        let timesteps: Vec<_> = sampler.timesteps().collect();
        let loras = vec![loras.clone(); timesteps.len()];
        self.model.unet.guided_time_embeddings(&timesteps, pass.guidance_scale(), &loras)
    }

    /// One step of all trajectories that are not done; all must have one size. It is one UNet call,
    /// and for each whose picture is encoded in tiles or between two passes a step of that. After an error every
    /// trajectory is unchanged, so that the step can be repeated.
    ///
    /// On a GPU a step is queued, and the one before it is done.
    pub fn step(&self, batch: &mut [&mut Trajectory]) -> Result<()> {
        begin_step(&self.model.device)?;
        let aside = |t: &&mut Trajectory| match (&t.before, &t.hires, &t.between) {
            (Some(before), ..) => {
                before.step(&self.model.vae, &t.sampler, &t.noise).map(Aside::Before).map(Some)
            }
            (None, Some(hires), Some(between)) => {
                let latents = || self.unscaled(t);
                let step =
                    between::step(&self.model, (t.size, t.vae_mode), (hires, between), latents);
                let step = step.map_err(|error| decode::named(error, &t.nets));
                step.map(Aside::Between).map(Some)
            }
            _ => Ok(None),
        };
        let aside = batch.iter().map(aside).collect::<Result<Vec<_>>>()?;
        let sampled = [self.sample(batch, false)?, self.sample(batch, true)?];
        end_step(&self.model.device)?;
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

    /// One UNet call for the trajectories that have one next, of those whose opposite edges meet or
    /// of the others: their places, and what it changes in each.
    fn sample(
        &self,
        batch: &mut [&mut Trajectory],
        is_tiling: bool,
    ) -> Result<Vec<(usize, StepResult)>> {
        let (mut latents, mut times) = (Vec::new(), Vec::new());
        let (mut conditioning, mut seen, mut loras) = (Vec::new(), Vec::new(), Vec::new());
        let mut active: Vec<(usize, &mut Trajectory)> = Vec::new();
        let mut controlled = Vec::new();
        let members = batch.iter_mut().enumerate();
        let members = members.filter(|(_, t)| t.tiling == is_tiling && t.before.is_none());
        for (place, trajectory) in members {
            let Some(evaluation) = trajectory.sampler.next() else { continue };
            let input = linear_combination(&[(evaluation.input_scale, &trajectory.latents)])?;
            let evaluation = trajectory.sampler.completed();
            controlled.push(ControlledRows {
                evaluation,
                latents: input.clone(),
                conditioning: trajectory.rows.at(evaluation).cloned().collect(),
                is_guided: trajectory.rows.unconditional.is_some(),
            });
            let input = match &trajectory.mask_condition {
                Some(condition) => Tensor::cat(&[&input, condition], 1)?,
                None => input,
            };
            let time = trajectory.time_embeddings.narrow(0, trajectory.sampler.completed(), 1)?;
            let is_guided = trajectory.rows.unconditional.is_some();
            for (k, row) in trajectory.rows.at(evaluation).enumerate() {
                latents.push(input.clone());
                seen.push(trajectory.images.at(evaluation, is_guided && k == 0));
                conditioning.push(Arc::clone(row));
                times.push(time.clone());
                loras.push(trajectory.loras.clone());
            }
            active.push((place, trajectory));
        }
        if active.is_empty() {
            return Ok(Vec::new());
        }
        let (latents, times) = (cat_rows(&latents)?, cat_rows(&times)?);
        let rows: Vec<_> = conditioning.iter().map(Arc::as_ref).collect();
        let conditioning = Conditioning::stack_seeing(&rows, &seen)?;
        let mut nets: Vec<_> = active.iter_mut().map(|(_, image)| &mut image.controls).collect();
        // As in AUTOMATIC1111, a ControlNet's own convolutions do not wrap.
        let residuals = residuals(&mut nets, &controlled)?;
        let unet = &self.model.unet;
        let predict =
            || unet.forward_controlled(&latents, &times, &conditioning, &loras, &residuals);
        let output = tiling(is_tiling, predict)?;
        let scale = self.model.vae.config().scale();
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
        let preview = match self.preview.get() {
            Some(preview) => preview,
            None => {
                let LoadedModel { vae, device, .. } = &self.model;
                let decode = |latents: &Tensor| vae.decode(&latents.to_device(device)?);
                let fitted = Preview::fit(vae.config(), decode)?;
                self.preview.get_or_init(|| fitted)
            }
        };
        preview.render(&trajectory.predicted_x0()?)
    }

    /// The image of a trajectory. If the trajectory is not done, the predicted x0 of the last UNet
    /// call is decoded, as AUTOMATIC1111 does when it is interrupted.
    pub fn decode(&self, trajectory: &Trajectory) -> Result<Rgb> {
        let picture =
            decode::picture(&self.model, &self.unscaled(trajectory)?, trajectory.vae_mode);
        picture.map_err(|error| decode::named(error, &trajectory.nets))
    }

    /// [`Self::decode`] in parts: a call decodes one tile, and returns the image with the last. One
    /// that is not in tiles has one part.
    pub fn decode_part(&self, trajectory: &mut Trajectory) -> Result<Option<Rgb>> {
        let model = &self.model;
        let tiled = match trajectory.decoding.take() {
            None => decode::tiles(model, &self.unscaled(trajectory)?, trajectory.vae_mode)?,
            begun => begun,
        };
        let Some(mut tiled) = tiled else { return self.decode(trajectory).map(Some) };
        let tile = decode::tile(model, &tiled);
        tiled.lay(tile.map_err(|error| decode::named(error, &trajectory.nets))?);
        if tiled.left() == 0 {
            return decode::rgb(&tiled.joined()?).map(Some);
        }
        trajectory.decoding = Some(tiled);
        Ok(None)
    }

    /// The latents (1, C, h, w) of what there is of an image, as the decoder takes them.
    fn unscaled(&self, trajectory: &Trajectory) -> Result<Tensor> {
        self.model.vae.config().unscaled(&trajectory.predicted_x0()?)
    }

    /// Whether the safety checker flags an image as NSFW; `None` without a safety checker.
    pub fn check_safety(&self, image: &Rgb) -> Result<Option<bool>> {
        let checker = self.model.safety_checker.as_ref();
        checker.map(|checker| Ok(checker.check(image)?.nsfw())).transpose()
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
}

impl NamedFiles {
    /// An estimate of what a step of its upscalers takes beside the model, in bytes.
    pub fn upscaling_bytes(&self) -> u64 {
        self.upscalers.iter().map(LoadedUpscaler::tile_bytes).max().unwrap_or_default()
    }
}

/// The ControlNets of a pass, which begins with the sampler.
fn controls(
    pass: Pass<'_>,
    nets: &ControlNets,
    sampler: &SamplerState,
    warnings: &mut Vec<String>,
) -> Result<Vec<ActiveControl>> {
    let stages = pass.sampler().sampler.evaluations_of_a_step();
    ActiveControl::begin(nets, &pass.spec.controls, pass.is_hires(), (sampler, stages), warnings)
}

/// Warnings for what has no effect in a pass without an unconditional row.
fn without_guidance(pass: Pass<'_>, is_xl: bool) -> impl Iterator<Item = String> {
    let idle = [
        (pass.field("negative_prompt"), !pass.negative_prompt().trim().is_empty()),
        ("negative_prompt_2", is_xl && pass.second_negative_prompt().is_some()),
        ("guidance_rescale", pass.spec.guidance_rescale > 0.0),
    ];
    let why = match pass.spec.embeds_guidance {
        true => "the model takes the guidance scale as an input",
        false => "there is no guidance at a guidance scale of 1 or less",
    };
    idle.into_iter()
        .filter(|(_, is_set)| *is_set)
        .map(move |(field, _)| format!("{field} has no effect: {why}"))
}

#[cfg(test)]
pub(crate) mod tests;
