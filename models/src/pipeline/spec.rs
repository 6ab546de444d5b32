//! What to generate. One [`Spec`] is one image; a request for n images is n specs with consecutive
//! seeds. A spec is valid as far as that is known without a model; limits of the model are checked
//! by [`crate::Pipeline::check`].

use std::borrow::Cow;
use std::str::FromStr;
use std::sync::Arc;

use super::control_spec::Control;
use super::enlarge::Enlarge;
use super::ip_adapter_spec::IpAdapter;
use super::refiner_spec::Refiner;
use super::upscaler::{PictureUpscaler, TILE_WORK, Upscaler};
use super::variation::Variation;
use super::xl::XlOptions;
use crate::error::{Error, Result};
use crate::picture::{Rgb, Size};
use crate::sampling::{Sampler, SamplerName, SamplerOptions, SigmaSchedule, Span, share_of};
use crate::text::{Loras, without_loras};

/// Maximum number of sampler steps: those of the training schedule.
pub const MAX_STEPS: usize = 1000;

/// One image to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// Prompt.
    pub prompt: String,
    /// Syntax of both prompts.
    pub prompt_syntax: PromptSyntax,
    /// Negative prompt; only used if the guidance scale is above 1.
    pub negative_prompt: String,
    /// LoRAs in addition to those that the prompt names.
    pub loras: Loras,
    /// Width and height of the image in pixels, in the base pass.
    pub size: Size,
    /// Sampler steps, 1 to [`MAX_STEPS`].
    pub steps: usize,
    /// Classifier-free guidance scale; at 1 or below the unconditional row is not computed, but
    /// for samplers of CFG++ and prompts that are joined.
    pub guidance_scale: f64,
    /// Whether the guidance scale is an input of the model's UNet, which needs no second row for it.
    pub embeds_guidance: bool,
    /// Seed of the torch CPU generator that draws the noise.
    pub seed: u64,
    /// What is added to the seed for the noise that the sampler draws, behind the first noise:
    /// AUTOMATIC1111's `eta_noise_seed_delta`. At 0 the sampler goes on with the stream of the seed.
    pub eta_noise_seed_delta: i64,
    /// The sampler.
    pub sampler: Sampler,
    /// Sigma schedule of the sampler.
    pub schedule: SigmaSchedule,
    /// The random part of the sampler.
    pub sampler_options: SamplerOptions,
    /// Layers of the text encoder that are skipped at its end, before the final layer norm. In
    /// plain syntax those of the prompt alone, as in diffusers; in AUTOMATIC1111's those of both
    /// prompts.
    pub clip_skip: usize,
    /// How far the guided output is scaled back to the standard deviation of the conditional one,
    /// 0 to 1. No effect without guidance.
    pub guidance_rescale: f64,
    /// Noise of a second seed that is mixed into the first noise; most images have none.
    pub variation: Option<Variation>,
    /// Whether the opposite edges of the image meet, so that it can be laid beside itself: the
    /// convolutions of UNet and VAE are padded with the other side.
    pub tiling: bool,
    /// Whether the VAE encodes and decodes what is larger than one of its tiles in tiles, as by
    /// diffusers' `enable_tiling`. `None`: where [`crate::ModelInfo::choose_tiles`] says so, and
    /// without that as a whole.
    pub vae_tiling: Option<bool>,
    /// What only Stable Diffusion XL takes.
    pub xl: XlOptions,
    /// The part of the training's timesteps in which the image is drawn; most images take the whole.
    /// With a start the input image is taken as if it were under noise, whatever the strength.
    pub span: Span,
    /// A model that takes the image over on its way, in the last pass.
    pub refiner: Option<Arc<Refiner>>,
    /// What the reply warns of before the image is begun.
    pub warnings: Vec<String>,
    /// Input image of image-to-image and inpainting; none for text-to-image.
    pub img2img: Option<Arc<Img2Img>>,
    /// Hires pass; most images have none.
    pub hires: Option<Hires>,
    /// ControlNets, in the order in which what they add is summed.
    pub controls: Vec<Control>,
    /// IP-Adapters, in the order in which what they add is summed.
    pub ip_adapters: Vec<IpAdapter>,
    /// A picture to enlarge. Then nothing is drawn, `size` is what it becomes before it is laid on
    /// a canvas, and nothing else of the spec has a meaning but its warnings.
    pub enlarge: Option<Arc<Enlarge>>,
}

impl Spec {
    /// Makes it image `k` of a request whose image 0 is `first`: the next seed, or as in
    /// AUTOMATIC1111 the next variation of the same seed.
    pub fn set_number(&mut self, first: &Self, k: u64) {
        (self.seed, self.variation) = (first.seed, first.variation);
        let seed = self.variation.as_mut().map_or(&mut self.seed, |variation| &mut variation.seed);
        *seed = seed.wrapping_add(k);
    }

    /// Layers of the text encoder that are skipped for the negative prompt.
    pub fn negative_clip_skip(&self) -> usize {
        match self.prompt_syntax {
            PromptSyntax::Plain => 0,
            PromptSyntax::A1111 => self.clip_skip,
        }
    }

    /// Whether the VAE works in tiles.
    pub(super) fn has_vae_tiles(&self) -> bool {
        self.vae_tiling == Some(true)
    }

    /// Sampler and schedule under one name.
    pub fn sampler_name(&self) -> SamplerName {
        SamplerName { sampler: self.sampler, schedule: self.schedule }
    }

    /// Whether files of requests may have to be read for it.
    pub fn has_files(&self) -> bool {
        let has_upscaler = || self.upscalers().any(|(_, upscaler)| upscaler.file().is_some());
        let has_nets = !self.controls.is_empty() || !self.ip_adapters.is_empty();
        let has_models = has_nets || self.refiner.is_some();
        has_models || self.has_loras() || has_upscaler()
    }

    /// Steps skipped because the latents begin as an input image.
    pub fn skipped_steps(&self) -> usize {
        if let Some(start) = self.span.start {
            // About: which steps are before it is known with their timesteps.
            return share_of(self.steps, start).min(self.steps.saturating_sub(1));
        }
        let init = self.img2img.as_ref().filter(|init| !init.takes_all_steps);
        skipped(self.steps, init.map_or(1.0, |init| init.strength))
    }

    /// The share of the noise levels among which the steps are.
    pub fn share_of_levels(&self) -> f64 {
        let has_start = self.span.start.is_some();
        let init = self.img2img.as_ref().filter(|init| init.takes_all_steps && !has_start);
        init.map_or(1.0, |init| init.strength)
    }

    /// The upscalers of pictures that the spec names: of its hires pass, or of what it enlarges.
    pub fn upscalers(&self) -> impl Iterator<Item = (&'static str, &PictureUpscaler)> {
        let hires = self.hires.as_ref().and_then(|hires| match &hires.upscaler {
            Upscaler::Picture(upscaler) => Some(("hires_upscaler", upscaler)),
            Upscaler::Latent(_) => None,
        });
        let names = ["upscaler", "second_upscaler"];
        let enlarge = self.enlarge.iter().flat_map(move |e| names.into_iter().zip(e.upscalers()));
        hires.into_iter().chain(enlarge)
    }

    /// An estimate of the work of the upscalers, in pixels times rows times UNet calls.
    pub fn upscaling_work(&self) -> usize {
        let hires = self.hires.iter().map(|_| self.size.pixels());
        let enlarge = self.enlarge.iter().map(|e| e.picture.width * e.picture.height);
        let networks = self.upscalers().filter(|(_, upscaler)| upscaler.file().is_some()).count();
        networks * TILE_WORK * hires.chain(enlarge).sum::<usize>()
    }

    /// Denoising strength of image-to-image or of the hires pass, if there is one.
    pub fn strength(&self) -> Option<f64> {
        let init = self.img2img.as_ref().filter(|_| self.span.start.is_none());
        let strength = init.map(|init| init.strength);
        strength.or(self.hires.as_ref().map(|hires| hires.strength))
    }

    /// The size of the final image.
    pub fn final_size(&self) -> Size {
        self.hires.as_ref().map_or(self.size, |hires| hires.size)
    }
}

/// Skipped steps at a denoising strength.
fn skipped(steps: usize, strength: f64) -> usize {
    steps.saturating_sub(share_of(steps, strength))
}

/// A pass over the upscaled latents of the base pass (AUTOMATIC1111's "hires fix"), for images
/// larger than those that the model was trained on.
#[derive(Debug, Clone, PartialEq)]
pub struct Hires {
    /// Width and height of the final image; upscaled latents beyond it are cropped evenly.
    pub size: Size,
    /// Sampler steps as if from noise alone, 1 to [`MAX_STEPS`].
    pub steps: usize,
    /// Denoising strength, 0 to 1: the share of the steps that are taken.
    pub strength: f64,
    /// How the image is upscaled.
    pub upscaler: Upscaler,
    /// Prompt of the pass, if it is another.
    pub prompt: Option<String>,
    /// Negative prompt of the pass, if it is another.
    pub negative_prompt: Option<String>,
    /// Guidance scale of the pass, if it is another.
    pub guidance_scale: Option<f64>,
    /// Sampler and schedule of the pass, if they are others, and the random part.
    pub sampler: Option<(SamplerName, SamplerOptions)>,
}

impl Hires {
    /// Steps skipped because the latents begin as the base pass's.
    pub fn skipped_steps(&self) -> usize {
        skipped(self.steps, self.strength)
    }
}

/// The syntax of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PromptSyntax {
    /// As in diffusers: every character is text, truncated to one chunk of tokens.
    #[default]
    Plain,
    /// As in AUTOMATIC1111: brackets are emphasis and long prompts fill several chunks
    /// ([`crate::text::chunks`]), `[a:b:0.5]` and `[a|b]` change the prompt on the way
    /// ([`crate::text::Schedule`]), `AND` joins prompts ([`crate::text::parts`]), and
    /// `<lora:name:0.8>` adds a LoRA.
    A1111,
}

impl PromptSyntax {
    /// Whether a guidance scale guides: in diffusers one above 1, in AUTOMATIC1111 any but 1, so that
    /// one below weakens the prompt.
    pub fn guides_at(self, scale: f64) -> bool {
        scale > 1.0 || self == Self::A1111 && scale < 1.0
    }

    /// A prompt without its `<lora:...>` tags, and the LoRAs of these.
    pub fn text(self, prompt: &str) -> Result<(Cow<'_, str>, Loras)> {
        match self {
            Self::Plain => Ok((Cow::Borrowed(prompt), Vec::new())),
            Self::A1111 => {
                without_loras(prompt).map_err(|reason| Error::Spec { field: "prompt", reason })
            }
        }
    }
}

impl FromStr for PromptSyntax {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name.to_ascii_lowercase().as_str() {
            "plain" => Ok(Self::Plain),
            "a1111" => Ok(Self::A1111),
            _ => Err(format!("{name:?} is unknown; known are plain, a1111")),
        }
    }
}

/// An input image, and the area of it to inpaint.
#[derive(Debug, Clone, PartialEq)]
pub struct Img2Img {
    /// The image, in the size of the spec.
    pub picture: Rgb,
    /// Denoising strength, 0 to 1: the share of the steps that are taken.
    pub strength: f64,
    /// Whether all steps are taken instead, among that share of the noise levels: see
    /// [`crate::ModelInfo::takes_all_steps`].
    pub takes_all_steps: bool,
    /// One byte per pixel, row by row: 128 and more is inpainted, less is preserved. Without a
    /// mask, the whole image is changed.
    pub mask: Option<Vec<u8>>,
    /// What the masked area begins as.
    pub masked_start: MaskedStart,
}

/// What the masked area begins as, at a strength below 1: AUTOMATIC1111's masked content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MaskedStart {
    /// The latents of the input image.
    #[default]
    Picture,
    /// The image's own noise, as if it were a picture.
    Noise,
    /// Latents of zero.
    Zero,
}
