//! Properties of a loaded model: defaults, limits that requests are checked against, and an
//! estimate of the memory that a request takes.

use candle_core::{DType, Device};

use super::control;
use super::control_spec::Control;
use super::defaults::Defaults;
use super::enlarge::Enlarge;
use super::ip_adapter;
use super::ip_adapter_spec::IpAdapter;
use super::options::AddOns;
use super::pass::Pass;
use super::spec::{Hires, Img2Img, MAX_STEPS, Spec};
use super::upscaler::{PictureUpscaler, Upscaler};
use super::vae::Vae;
use crate::error::{Error, Result};
use crate::files::AssetFile;
use crate::layers::activation_dtype;
use crate::networks::{OVERLAP, UNet2DConditionModel};
use crate::picture::{Rgb, Size};
use crate::sampling::{Sampler, SamplerName, SamplerOptions, Span, share_of};
use crate::text::{Embeddings, LoraUse};

/// Maximum scale of the noise that a sampler draws. More only leaves noise.
pub const MAX_NOISE_SCALE: f64 = 2.0;

/// Maximum magnitude of the scale of a LoRA: far beyond what leaves an image.
const MAX_LORA_SCALE: f64 = 1000.0;

/// Properties of a loaded model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// `demo`, the ID on the hub, or the name of the directory or file.
    pub name: String,
    /// A digest of samples of its weights and of its scheduler configuration: another model of the
    /// same name has another.
    pub fingerprint: String,
    /// The files it was read from, where these are single ones.
    pub files: SingleFiles,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32`, `bf16` or `f16`.
    pub precision: String,
    /// Defaults of a request.
    pub defaults: Defaults,
    /// Image sides must be multiples of this many pixels.
    pub multiple: usize,
    /// Samplers that cannot run with the model's scheduler configuration, and why.
    pub unsuited: Vec<(Sampler, String)>,
    /// Whether the guidance scale is an input of the UNet.
    pub embeds_guidance: bool,
    /// Whether its pipeline gives the strength of image-to-image to the scheduler.
    pub gives_strength_to_scheduler: bool,
    /// The most layers of the text encoder that can be skipped.
    pub text_layers: usize,
    /// Width of the prompts that the UNet attends to: 1024 of OpenCLIP, with which Stable Diffusion 2
    /// is trained.
    pub text_width: usize,
    /// Whether it is of Stable Diffusion XL: it has a second text encoder, and takes sizes.
    pub is_xl: bool,
    /// The most sampler steps: of the training, and with the samplers of distilled models.
    pub most_steps: (usize, usize),
    /// Whether the safety checker is loaded.
    pub checked: bool,
    /// Memory of an image in progress.
    pub memory: MemoryEstimate,
    /// What requests can add to the model.
    pub add_ons: AddOns,
    /// Textual inversion embeddings and their placeholder tokens.
    pub embeddings: Embeddings,
    /// What is odd about the files and did not keep the model from being loaded, a sentence each.
    pub warnings: Vec<String>,
}

/// Single files that a model was read from, by which it is known elsewhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SingleFiles {
    /// The checkpoint.
    pub checkpoint: Option<AssetFile>,
    /// The VAE that replaces the checkpoint's.
    pub vae: Option<AssetFile>,
}

/// An estimate of the memory of activations, from the shapes of the networks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Bytes per latent pixel of one batch row of a UNet call.
    pub row_bytes: u64,
    /// Additional bytes per latent pixel of a batch row with LoRAs.
    pub lora_bytes: u64,
    /// Bytes of the keys and values of one prompt chunk.
    pub chunk_bytes: u64,
    /// Bytes of the time embeddings of one timestep.
    pub time_bytes: u64,
    /// Additional bytes per latent pixel of a batch row for each ControlNet.
    pub control_bytes: u64,
    /// Bytes per pair of latent pixels of one batch row: attention scores, where they are stored.
    pub score_bytes: u64,
    /// Bytes per image pixel of the VAE's decoder.
    pub decode_bytes: u64,
    /// Bytes per pair of latent pixels of its attention scores, where they are stored.
    pub decode_score_bytes: u64,
    /// Side of the VAE's tiles in pixels, if it can work in tiles.
    pub tile: Option<usize>,
    /// Pixels per latent pixel, along one side.
    pub scale: u64,
}

impl MemoryEstimate {
    /// The skip connections of all levels, and the widest point of a transformer block of the
    /// first: the feed forward's 8 C and 4 C beside input, residual and norm. The decoder is widest
    /// where its last level begins: an input as wide as the level before, its norm, and two
    /// outputs. The delta of a LoRA on the feed forward is as wide as its output.
    pub(super) fn of(
        unet: &UNet2DConditionModel,
        max_length: usize,
        vae: &Vae,
        device: &Device,
        dtype: DType,
    ) -> Self {
        let dtype_of_decoder = vae.widest_dtype();
        let bytes_of_decoder = dtype_of_decoder.size_in_bytes();
        let vae = vae.config();
        let bytes = activation_dtype(device, dtype).size_in_bytes();
        let config = unet.config();
        let layers = config.layers_per_block + 1;
        let levels = config.block_out_channels.iter().enumerate();
        let skips: usize = levels.map(|(level, c)| (layers * c) >> (2 * level)).sum();
        let first = config.block_out_channels[0];
        let wide = vae.block_out_channels.get(1).unwrap_or(&vae.block_out_channels[0]);
        let decode = 2 * wide + 3 * vae.block_out_channels[0];
        // Our kernels never store scores. candle's composition, used on GPUs in f32, stores them
        // twice.
        let is_stored = |dtype| !device.is_cpu() && dtype == DType::F32;
        let stored = is_stored(dtype);
        let attends = vae.mid_block_add_attention && is_stored(dtype_of_decoder);
        // Per pair of latent pixels: a level has a quarter of the pixels of the one before.
        let attention = (0..).zip(config.heads.iter().zip(&config.down_cross_attention));
        let scores = attention.filter(|(_, (_, attends))| stored && **attends);
        let scores = scores.map(|(level, (heads, _))| (heads * 8) >> (4 * level)).max();
        Self {
            row_bytes: ((skips + 16 * first) * bytes) as u64,
            lora_bytes: (8 * first * bytes) as u64,
            // What a net adds to each skip, and once more where it is summed; and the hint.
            control_bytes: ((2 * skips + first) * bytes) as u64,
            chunk_bytes: (unet.kv_width() * max_length * bytes) as u64,
            time_bytes: (unet.time_width() * bytes) as u64,
            score_bytes: scores.unwrap_or(0) as u64,
            decode_bytes: (decode * bytes_of_decoder) as u64,
            decode_score_bytes: if attends { 8 } else { 0 },
            tile: vae.tile().map(|tile| tile * vae.scale()),
            scale: vae.scale() as u64,
        }
    }
}

impl MemoryEstimate {
    /// Bytes of the decoder for an image in this size, in tiles with this side or as a whole. The
    /// encoder takes less.
    fn of_vae(&self, size: Size, tile: Option<usize>) -> u64 {
        let side = |side: usize| tile.map_or(side, |tile| side.min(tile)) as u64;
        let pixels = side(size.width()) * side(size.height());
        let latent = pixels / self.scale.max(1).pow(2);
        let joined = if tile.is_some() { 12 * size.pixels() as u64 } else { 0 };
        joined + (pixels * self.decode_bytes).max(latent * latent * self.decode_score_bytes)
    }
}

impl ModelInfo {
    /// An estimate of an image's share of a UNet call in this size, in bytes. A call takes the sum
    /// over its images.
    pub fn step_bytes(&self, spec: &Spec, size: Size) -> u64 {
        let memory = self.memory;
        if let Some(enlarge) = &spec.enlarge {
            // The picture, and those that it becomes.
            return 3 * (enlarge.picture.data.len() as u64 + 3 * size.pixels() as u64);
        }
        let latent = size.pixels() as u64 / memory.scale.max(1).pow(2);
        let lora = if spec.has_loras() { memory.lora_bytes } else { 0 };
        let nets = spec.controls.len() as u64;
        let controls = nets * memory.control_bytes;
        let row = latent * (memory.row_bytes + lora + controls + latent * memory.score_bytes);
        // Keys and values are kept per image, and those of an evaluation stacked for it.
        let chunks: Vec<_> = spec.passes().map(Pass::chunks).collect();
        let kept: u64 = chunks.iter().map(|chunks| chunks.kept as u64).sum();
        let stacked = chunks.iter().map(|chunks| chunks.stacked as u64).max().unwrap_or_default();
        let evaluations = spec.passes().map(|pass| pass.calls() as u64 + 1).sum::<u64>();
        // A picture is at most as many tokens as a chunk, but for full adapters.
        let pictures = spec.ip_adapters.iter().map(|adapter| adapter.pictures.len() as u64);
        let pictures = pictures.sum::<u64>() * (2 + spec.rows() as u64);
        spec.rows() as u64 * row
            // A net's keys and values are those of half a UNet.
            + ((1 + nets) * (kept + stacked) + pictures) * memory.chunk_bytes
            + evaluations * memory.time_bytes
    }

    /// An estimate of the peak memory of an image while it is stepped or decoded, in bytes.
    pub fn peak_bytes(&self, spec: &Spec) -> u64 {
        let tile = self.memory.tile.filter(|_| spec.has_vae_tiles());
        let peak = |size| self.step_bytes(spec, size).max(self.memory.of_vae(size, tile));
        let peaks = spec.passes().map(Pass::size).map(peak);
        peaks.max().unwrap_or_else(|| self.step_bytes(spec, spec.size))
    }

    /// Decides whether the VAE works in tiles where a request leaves it open: if that is the default
    /// of all, or if the whole would not fit a budget of so many bytes and a tile takes less, which
    /// is a warning. Not where the opposite edges of an image meet.
    pub fn choose_tiles(&self, spec: &mut Spec, is_default: bool, budget: u64) {
        let Some(tile) = self.memory.tile else { return };
        if spec.vae_tiling.is_some() || spec.tiling || spec.enlarge.is_some() {
            return;
        }
        let most = |tile| {
            let bytes = spec.passes().map(|pass| self.memory.of_vae(pass.size(), tile));
            bytes.max().unwrap_or_default()
        };
        let (whole, tiled) = (most(None), most(Some(tile)));
        let is_needed = whole > budget && tiled < whole;
        if is_needed && !is_default {
            let mebibytes = |bytes: u64| bytes >> 20;
            spec.warnings.push(format!(
                "vae_tiling: the VAE works in tiles of {tile} pixels, since the whole of {} would \
                 take {} MiB, more than the memory budget of {} MiB",
                spec.final_size(),
                mebibytes(whole),
                mebibytes(budget)
            ));
        }
        spec.vae_tiling = (is_needed || is_default).then_some(true);
    }

    /// Whether an image is larger than a tile of the VAE.
    pub fn has_tiles(&self, spec: &Spec) -> bool {
        let is_longer = |side: usize| self.memory.tile.is_some_and(|tile| side > tile);
        spec.passes().map(Pass::size).any(|s| is_longer(s.width()) || is_longer(s.height()))
    }

    /// Whether image-to-image takes all steps, among the share of the noise levels that the strength
    /// tells: diffusers' `LatentConsistencyModelImg2ImgPipeline` does. It has no mask, so that
    /// inpainting takes a share of the steps as with any other model.
    pub fn takes_all_steps(&self, sampler: Sampler, has_mask: bool) -> bool {
        self.gives_strength_to_scheduler && sampler.is_distilled() && !has_mask
    }

    /// Why a sampler cannot run with the model's scheduler configuration, if it cannot.
    pub fn unsuited_to(&self, sampler: Sampler) -> Option<&str> {
        let row = self.unsuited.iter().find(|row| row.0 == sampler);
        row.map(|row| row.1.as_str())
    }

    /// Checks a spec against the model's limits. The error names the field.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        let refuse = |field, reason: String| Err(Error::Spec { field, reason });
        if let Some(enlarge) = &spec.enlarge {
            return check_enlarge(enlarge, spec.size);
        }
        let size = spec.size;
        let fits = |side: usize| side.is_multiple_of(self.multiple);
        if !fits(size.width()) || !fits(size.height()) {
            let reason = format!("{size} must have sides that are multiples of {}", self.multiple);
            return refuse("width", reason);
        }
        self.check_steps("num_inference_steps", spec.steps, spec.sampler)?;
        check_span(spec)?;
        if !spec.guidance_scale.is_finite() {
            return refuse("guidance_scale", "must be a finite number".into());
        }
        if spec.clip_skip > self.text_layers {
            let most = self.text_layers;
            return refuse("clip_skip", format!("must be 0 to {most}, not {}", spec.clip_skip));
        }
        if !(0.0..=1.0).contains(&spec.guidance_rescale) {
            return refuse("guidance_rescale", "must be from 0 to 1".into());
        }
        if spec.variation.is_some_and(|v| !(0.0..=1.0).contains(&v.strength)) {
            return refuse("variation_strength", "must be from 0 to 1".into());
        }
        if let Some(reason) = self.unsuited_to(spec.sampler) {
            return refuse("scheduler", format!("{}: {reason}", spec.sampler));
        }
        spec.sampler.check(spec.schedule)?;
        let SamplerOptions { eta, s_noise, churn } = spec.sampler_options;
        if eta.is_some_and(|eta| !(0.0..=1.0).contains(&eta)) {
            return refuse("eta", "must be from 0 to 1".into());
        }
        if s_noise.is_some_and(|scale| !(0.0..=MAX_NOISE_SCALE).contains(&scale)) {
            return refuse("s_noise", format!("must be from 0 to {MAX_NOISE_SCALE}"));
        }
        if !(churn.amount.is_finite() && churn.amount >= 0.0) {
            return refuse("s_churn", "must be a finite number of at least 0".into());
        }
        self.check_tiles(spec)?;
        for pass in spec.passes() {
            let prompt = pass.text()?.1;
            for (field, loras) in [("loras", &spec.loras), (pass.field("prompt"), &prompt)] {
                let is_scale = |scale: f64| scale.abs() <= MAX_LORA_SCALE;
                for LoraUse { name, scale, text_encoder_scale } in loras {
                    if !is_scale(*scale) || !is_scale(*text_encoder_scale) {
                        let most = MAX_LORA_SCALE;
                        let reason = format!("of {name:?} must have a scale of at most {most}");
                        return refuse(field, reason);
                    }
                }
            }
            pass.directions()?;
            pass.negative_directions()?;
        }
        if let Some(hires) = &spec.hires {
            self.check_hires(hires, spec)?;
        }
        control::check(&spec.controls, size, spec.hires.as_ref().map(|hires| hires.size))?;
        ip_adapter::check(&spec.ip_adapters)?;
        spec.img2img.as_ref().map_or(Ok(()), |init| self.check_start(init, spec))
    }

    /// Checks that the VAE can work in tiles, if it is to.
    fn check_tiles(&self, spec: &Spec) -> Result<()> {
        let reason = match self.memory.tile {
            _ if !spec.has_vae_tiles() => return Ok(()),
            Some(_) if !spec.tiling => return Ok(()),
            Some(_) => "does not go with tiling: the opposite edges of tiles would not meet".into(),
            None => format!(
                "is not possible: the sample_size of vae/config.json, the side of its tiles, must be a \
                 multiple of {} pixels",
                OVERLAP as u64 * self.memory.scale
            ),
        };
        Err(Error::Spec { field: "vae_tiling", reason })
    }

    /// Checks an input image against the model's limits.
    fn check_start(&self, init: &Img2Img, spec: &Spec) -> Result<()> {
        let (refuse, size) = (|field, reason| Err(Error::Spec { field, reason }), spec.size);
        let Rgb { width, height, ref data } = init.picture;
        if (width, height) != (size.width(), size.height()) || data.len() != 3 * size.pixels() {
            return refuse("image", format!("is {width}x{height}, but the output image is {size}"));
        }
        if init.mask.as_ref().is_some_and(|mask| mask.len() != size.pixels()) {
            return refuse("mask", format!("must have a byte for each pixel of {size}"));
        }
        if !(0.0..=1.0).contains(&init.strength) {
            return refuse("strength", format!("must be from 0 to 1, not {}", init.strength));
        }
        let (strength, steps) = (init.strength, spec.steps);
        if spec.span.start.is_some() {
            return Ok(());
        }
        if spec.skipped_steps() >= steps {
            return refuse("strength", less_than_a_step(strength, steps));
        }
        let levels = share_of(self.most_steps(spec.sampler), spec.share_of_levels());
        if steps > levels {
            let reason = format!("of {strength} has room for {levels} steps, not for {steps}");
            return refuse("strength", reason);
        }
        Ok(())
    }

    /// Checks that the files which a spec names exist. Blocks: reads a directory.
    pub fn check_files(&self, spec: &Spec) -> Result<()> {
        for pass in spec.passes() {
            for (field, loras) in [("loras", &spec.loras), (pass.field("prompt"), &pass.text()?.1)]
            {
                for LoraUse { name, .. } in loras {
                    self.add_ons.loras.check(name).map_err(|reason| Error::Spec {
                        field,
                        reason: format!("names the LoRA {reason}"),
                    })?;
                }
            }
        }
        for Control { model, .. } in &spec.controls {
            self.add_ons.controlnets.check(model).map_err(|reason| Error::Spec {
                field: "controlnets",
                reason: format!("names the ControlNet {reason}"),
            })?;
        }
        for IpAdapter { model, .. } in &spec.ip_adapters {
            self.add_ons.ip_adapters.check(model).map_err(|reason| Error::Spec {
                field: "ip_adapter",
                reason: format!("names the IP-Adapter {reason}"),
            })?;
        }
        for (field, upscaler) in spec.upscalers() {
            let Some(name) = upscaler.file() else { continue };
            self.add_ons.upscalers.check(name).map_err(|reason| {
                let built_in: Vec<_> = match field {
                    "hires_upscaler" => Upscaler::built_in().collect(),
                    _ => PictureUpscaler::BUILT_IN.iter().map(PictureUpscaler::title).collect(),
                };
                let reason = format!(
                    "names the upscaler {reason} in --upscalers-dir, beside {}",
                    built_in.join(", ")
                );
                Error::Spec { field, reason }
            })?;
        }
        Ok(())
    }

    /// The most steps of a sampler.
    pub fn most_steps(&self, sampler: Sampler) -> usize {
        let (trained, distilled) = self.most_steps;
        if sampler.is_distilled() { distilled } else { trained }.min(MAX_STEPS)
    }

    fn check_steps(&self, field: &'static str, steps: usize, sampler: Sampler) -> Result<()> {
        let most = self.most_steps(sampler);
        if (1..=most).contains(&steps) {
            return Ok(());
        }
        let reason = format!("must be 1 to {most} with {}, not {steps}", sampler.name());
        Err(Error::Spec { field, reason })
    }

    /// Checks a hires pass against the model's limits.
    fn check_hires(&self, hires: &Hires, spec: &Spec) -> Result<()> {
        let refuse = |field, reason: String| Err(Error::Spec { field, reason });
        let Hires { size, steps, strength, .. } = *hires;
        if let Some((SamplerName { sampler, schedule }, _)) = hires.sampler {
            if let Some(reason) = self.unsuited_to(sampler) {
                return refuse("hires_scheduler", format!("{sampler}: {reason}"));
            }
            sampler.check(schedule).map_err(|error| match error {
                Error::Spec { reason, .. } => Error::Spec { field: "hires_schedule", reason },
                other => other,
            })?;
        }
        if hires.guidance_scale.is_some_and(|scale| !scale.is_finite()) {
            return refuse("hires_guidance_scale", "must be a finite number".into());
        }
        if spec.img2img.is_some() {
            return refuse("hires_width", "is for text-to-image only".into());
        }
        let fits = |side: usize| side.is_multiple_of(self.multiple);
        if !fits(size.width()) || !fits(size.height()) {
            let reason = format!("{size} must have sides that are multiples of {}", self.multiple);
            return refuse("hires_width", reason);
        }
        let sampler = hires.sampler.map_or(spec.sampler, |(own, _)| own.sampler);
        self.check_steps("hires_steps", steps, sampler)?;
        if !(0.0..=1.0).contains(&strength) {
            return refuse("hires_strength", format!("must be from 0 to 1, not {strength}"));
        }
        if hires.skipped_steps() >= steps {
            return refuse("hires_strength", less_than_a_step(strength, steps));
        }
        Ok(())
    }
}

/// Checks where the steps of an image begin, where a refiner takes over and where they end.
fn check_span(spec: &Spec) -> Result<()> {
    let refuse = |field, reason: String| Err(Error::Spec { field, reason });
    let Span { start, end } = spec.span;
    if start.is_some_and(|start| !(start > 0.0 && start < 1.0)) {
        return refuse("denoising_start", "must be at least 0 and below 1".into());
    }
    if end.is_some_and(|end| !(end > 0.0 && end <= 1.0)) {
        return refuse("denoising_end", "must be above 0, and at most 1".into());
    }
    if let (Some(start), Some(end)) = (start, end)
        && start >= end
    {
        return refuse(
            "denoising_start",
            format!("must be below denoising_end {end}, not {start}"),
        );
    }
    if start.is_some() && spec.img2img.is_none() {
        return refuse("denoising_start", "requires an input image".into());
    }
    if spec.hires.is_some() && end.is_some() {
        return refuse("denoising_end", "cannot be used with a hires pass".into());
    }
    let switch_at = spec.refiner.as_ref().map_or(0.0, |refiner| refiner.switch_at);
    if !(0.0..=1.0).contains(&switch_at) {
        return refuse("refiner_switch_at", format!("must be from 0 to 1, not {switch_at}"));
    }
    Ok(())
}

/// Checks a picture to enlarge.
fn check_enlarge(enlarge: &Enlarge, size: Size) -> Result<()> {
    let refuse = |field, reason: String| Err(Error::Spec { field, reason });
    if !(enlarge.scale.is_finite() && enlarge.scale > 0.0) {
        return refuse("scale", format!("must be above 0, not {}", enlarge.scale));
    }
    let (width, height) = enlarge.size();
    if (width, height) != (size.width(), size.height()) {
        return refuse("scale", format!("gives a picture of {width}x{height}, not {size}"));
    }
    let share = enlarge.second.as_ref().map_or(0.0, |(_, share)| *share);
    if !(0.0..=1.0).contains(&share) {
        return refuse("second_upscaler", format!("must have a share from 0 to 1, not {share}"));
    }
    Ok(())
}

/// Why a denoising strength is rejected.
fn less_than_a_step(strength: f64, steps: usize) -> String {
    format!("of {strength} takes less than one of {steps} steps; raise it or the number of steps")
}
