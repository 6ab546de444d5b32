//! What is known of a loaded model without touching it: what a request gets that leaves things
//! out, what it may ask for, and an estimate of the memory that this takes.

use candle_core::{DType, Device};

use super::options::AddOns;
use super::spec::{Hires, MAX_STEPS, PromptSyntax, Scheduler, Spec};
use crate::error::{Error, Result};
use crate::layers::activation_dtype;
use crate::networks::{UNetConfig, VaeConfig};
use crate::picture::{Rgb, Size};
use crate::text::{Embeddings, max_chunks};

/// What a request that leaves things out gets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// The size that the UNet was trained on.
    pub size: Size,
    /// Sampler steps, as diffusers.
    pub steps: usize,
    /// Classifier-free guidance, as diffusers.
    pub guidance_scale: f64,
    /// The sampler of the model's scheduler configuration.
    pub scheduler: Scheduler,
}

/// What is known of a loaded model without touching it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// `demo`, or the name of the directory.
    pub name: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32`, `bf16` or `f16`.
    pub precision: String,
    /// What a request that leaves things out gets.
    pub defaults: Defaults,
    /// Sides must be multiples of this many pixels.
    pub multiple: usize,
    /// Whether a safety checker looks at its pictures.
    pub checked: bool,
    /// What a picture takes while it is drawn.
    pub memory: MemoryEstimate,
    /// What requests can add to it.
    pub add_ons: AddOns,
    /// The words that prompts can hold beside those of the tokenizer.
    pub embeddings: Embeddings,
}

/// An estimate of the memory that activations take, from the networks' shapes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Bytes of one row of a UNet evaluation for each latent pixel.
    pub row_bytes: u64,
    /// Bytes for each latent pixel of a row that has LoRAs, beside those.
    pub lora_bytes: u64,
    /// Bytes of a prompt's keys and values, of one window.
    pub chunk_bytes: u64,
    /// Bytes of what the UNet makes of a timestep.
    pub time_bytes: u64,
    /// Bytes of one row for each pair of latent pixels: attention scores, where they are stored.
    pub score_bytes: u64,
    /// Bytes of decoding for each pixel of the picture.
    pub decode_bytes: u64,
    /// Pixels of a latent's side.
    pub scale: u64,
}

impl MemoryEstimate {
    /// The skips of all levels, and at the first the widest moment of a transformer block: the
    /// feed forward's 8 C and 4 C beside input, residual and norm. The decoder is widest where
    /// its last level begins: the input of two levels' width, normed, beside two outputs. What a
    /// LoRA adds to the feed forward is as wide as its outputs.
    pub(crate) fn of(
        unet: &UNetConfig,
        max_length: usize,
        vae: &VaeConfig,
        device: &Device,
        dtype: DType,
    ) -> Self {
        let bytes = activation_dtype(device, dtype).size_in_bytes();
        let layers = unet.layers_per_block + 1;
        let levels = unet.block_out_channels.iter().enumerate();
        let skips: usize = levels.map(|(level, c)| (layers * c) >> (2 * level)).sum();
        let first = unet.block_out_channels[0];
        let wide = vae.block_out_channels.get(1).unwrap_or(&vae.block_out_channels[0]);
        let decode = 2 * wide + 3 * vae.block_out_channels[0];
        // Our kernels never store scores; candle's composition does, twice: on GPUs in f32.
        let stored = !device.is_cpu() && dtype == DType::F32;
        let scores = if stored { unet.heads[0] * 8 } else { 0 };
        Self {
            row_bytes: ((skips + 16 * first) * bytes) as u64,
            lora_bytes: (8 * first * bytes) as u64,
            chunk_bytes: (unet.kv_width() * max_length * bytes) as u64,
            time_bytes: (unet.time_width() * bytes) as u64,
            score_bytes: scores as u64,
            decode_bytes: (decode * bytes) as u64,
            scale: vae.scale() as u64,
        }
    }
}

impl ModelInfo {
    /// An estimate of what a picture takes in an evaluation in this size, in bytes: that of an
    /// evaluation is the sum.
    pub fn step_bytes(&self, spec: &Spec, size: Size) -> u64 {
        let memory = self.memory;
        let latent = size.pixels() as u64 / memory.scale.max(1).pow(2);
        let lora = if spec.has_loras() { memory.lora_bytes } else { 0 };
        let row = latent * (memory.row_bytes + lora + latent * memory.score_bytes);
        let chunks = |prompt| match spec.prompt_syntax {
            PromptSyntax::Plain => 1,
            PromptSyntax::A1111 => max_chunks(prompt) as u64,
        };
        let negative = (spec.rows() == 2).then_some(&spec.negative_prompt);
        let chunks: u64 = [&spec.prompt].into_iter().chain(negative).map(|p| chunks(p)).sum();
        // Keys and values are kept for each picture, and side by side for the evaluation.
        let kept = 2 * chunks * memory.chunk_bytes;
        // Two evaluations a step at the most.
        let evaluations = 2 * spec.passes().map(|(_, steps)| steps as u64).sum::<u64>();
        spec.rows() as u64 * row + kept + evaluations * memory.time_bytes
    }

    /// An estimate of the most that a picture takes while it is stepped or decoded, in bytes.
    pub fn peak_bytes(&self, spec: &Spec) -> u64 {
        let decode = |size: Size| size.pixels() as u64 * self.memory.decode_bytes;
        let peak = |(size, _)| self.step_bytes(spec, size).max(decode(size));
        spec.passes().map(peak).max().unwrap_or_default()
    }

    /// Whether the model can draw this.
    pub fn check(&self, spec: &Spec) -> Result<()> {
        let refuse = |field, reason: String| Err(Error::Spec { field, reason });
        let size = spec.size;
        let fits = |side: usize| side.is_multiple_of(self.multiple);
        if !fits(size.width()) || !fits(size.height()) {
            let reason = format!("{size} must have sides that are multiples of {}", self.multiple);
            return refuse("width", reason);
        }
        if spec.steps == 0 || spec.steps > MAX_STEPS {
            return refuse("num_inference_steps", format!("must be 1 to {MAX_STEPS}"));
        }
        if !spec.guidance_scale.is_finite() {
            return refuse("guidance_scale", "must be a finite number".into());
        }
        let (_, named) = spec.text()?;
        for (field, loras) in [("loras", &spec.loras), ("prompt", &named)] {
            for (name, scale) in loras {
                if let Err(reason) = self.add_ons.loras.find(name) {
                    return refuse(field, format!("names a LoRA: {reason}"));
                }
                if !scale.is_finite() {
                    return refuse(field, format!("of {name:?} must have a finite scale"));
                }
            }
        }
        if let Some(hires) = &spec.hires {
            self.check_hires(hires, spec.img2img.is_some())?;
        }
        let Some(init) = &spec.img2img else { return Ok(()) };
        let Rgb { width, height, ref data } = init.picture;
        if (width, height) != (size.width(), size.height()) || data.len() != 3 * size.pixels() {
            return refuse("image", format!("is {width}x{height}, but the picture is {size}"));
        }
        if init.mask.as_ref().is_some_and(|mask| mask.len() != size.pixels()) {
            return refuse("mask", format!("must have a byte for each pixel of {size}"));
        }
        if !(0.0..=1.0).contains(&init.strength) {
            return refuse("strength", format!("must be from 0 to 1, not {}", init.strength));
        }
        if spec.skipped_steps() >= spec.steps {
            let (strength, steps) = (init.strength, spec.steps);
            return refuse("strength", format!("{strength} of {steps} steps is less than one"));
        }
        Ok(())
    }

    /// Whether the model can draw this second pass.
    fn check_hires(&self, hires: &Hires, from_picture: bool) -> Result<()> {
        let refuse = |field, reason: String| Err(Error::Spec { field, reason });
        let Hires { size, steps, strength, .. } = *hires;
        if from_picture {
            return refuse("hires_width", "is for pictures that begin as noise".into());
        }
        let fits = |side: usize| side.is_multiple_of(self.multiple);
        if !fits(size.width()) || !fits(size.height()) {
            let reason = format!("{size} must have sides that are multiples of {}", self.multiple);
            return refuse("hires_width", reason);
        }
        if steps == 0 || steps > MAX_STEPS {
            return refuse("hires_steps", format!("must be 1 to {MAX_STEPS}"));
        }
        if !(0.0..=1.0).contains(&strength) {
            return refuse("hires_strength", format!("must be from 0 to 1, not {strength}"));
        }
        if hires.skipped_steps() >= steps {
            let reason = format!("{strength} of {steps} steps is less than one");
            return refuse("hires_strength", reason);
        }
        Ok(())
    }
}
