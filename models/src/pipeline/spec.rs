//! What to generate. One [`Spec`] is one image; a request for n images is n specs with consecutive
//! seeds. A spec is valid as far as that is known without a model; limits of the model are checked
//! by [`crate::Pipeline::check`].

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::picture::{Rgb, Size};
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
    /// Classifier-free guidance scale; at 1 or below the unconditional row is not computed.
    pub guidance_scale: f64,
    /// Seed of the torch CPU generator that draws the noise.
    pub seed: u64,
    /// The sampler.
    pub scheduler: Scheduler,
    /// Input image of image-to-image and inpainting; none for text-to-image.
    pub img2img: Option<Arc<Img2Img>>,
    /// Hires pass; most images have none.
    pub hires: Option<Hires>,
}

impl Spec {
    /// Batch rows of one UNet call: two with guidance (unconditional, conditional), else one.
    pub fn rows(&self) -> usize {
        if self.guidance_scale > 1.0 { 2 } else { 1 }
    }

    /// The prompt without its `<lora:...>` tags, and the LoRAs of these.
    pub fn text(&self) -> Result<(Cow<'_, str>, Loras)> {
        match self.prompt_syntax {
            PromptSyntax::Plain => Ok((Cow::Borrowed(&self.prompt), Vec::new())),
            PromptSyntax::A1111 => without_loras(&self.prompt)
                .map_err(|reason| Error::Spec { field: "prompt", reason }),
        }
    }

    /// Whether the spec has any LoRA.
    pub(crate) fn has_loras(&self) -> bool {
        let named = self.prompt_syntax == PromptSyntax::A1111 && self.prompt.contains("<lora:");
        named || !self.loras.is_empty()
    }

    /// Steps skipped because the latents begin as an input image.
    pub fn skipped_steps(&self) -> usize {
        skipped(self.steps, self.img2img.as_ref().map_or(1.0, |init| init.strength))
    }

    /// The size and the steps of each pass.
    pub fn passes(&self) -> impl Iterator<Item = (Size, usize)> {
        let first = (self.size, self.steps.saturating_sub(self.skipped_steps()));
        let second = self.hires.map(|hires| (hires.size, hires.steps - hires.skipped_steps()));
        std::iter::once(first).chain(second)
    }

    /// Denoising strength of image-to-image or of the hires pass, if there is one.
    pub fn strength(&self) -> Option<f64> {
        let strength = self.img2img.as_ref().map(|init| init.strength);
        strength.or(self.hires.map(|hires| hires.strength))
    }

    /// The size of the final image.
    pub fn final_size(&self) -> Size {
        self.hires.map_or(self.size, |hires| hires.size)
    }
}

/// Skipped steps at a denoising strength.
fn skipped(steps: usize, strength: f64) -> usize {
    steps.saturating_sub((steps as f64 * strength) as usize)
}

/// A pass over the upscaled latents of the base pass (AUTOMATIC1111's "hires fix"), for images
/// larger than those that the model was trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hires {
    /// Width and height of the final image; upscaled latents beyond it are cropped evenly.
    pub size: Size,
    /// Sampler steps as if from noise alone, 1 to [`MAX_STEPS`].
    pub steps: usize,
    /// Denoising strength, 0 to 1: the share of the steps that are taken.
    pub strength: f64,
    /// How latents are upscaled.
    pub upscaler: Upscaler,
}

impl Hires {
    /// Steps skipped because the latents begin as the base pass's.
    pub fn skipped_steps(&self) -> usize {
        skipped(self.steps, self.strength)
    }
}

/// How latents are upscaled: the modes of torch's `interpolate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Upscaler {
    /// `bilinear`
    #[default]
    Bilinear,
    /// `bilinear`, antialiased
    BilinearAntialiased,
    /// `bicubic`
    Bicubic,
    /// `bicubic`, antialiased
    BicubicAntialiased,
    /// `nearest`
    Nearest,
    /// `nearest-exact`
    NearestExact,
}

/// One row per upscaler: AUTOMATIC1111's name.
const UPSCALERS: [(Upscaler, &str); 6] = [
    (Upscaler::Bilinear, "Latent"),
    (Upscaler::BilinearAntialiased, "Latent (antialiased)"),
    (Upscaler::Bicubic, "Latent (bicubic)"),
    (Upscaler::BicubicAntialiased, "Latent (bicubic antialiased)"),
    (Upscaler::Nearest, "Latent (nearest)"),
    (Upscaler::NearestExact, "Latent (nearest-exact)"),
];

impl Upscaler {
    /// Every upscaler.
    pub fn all() -> impl Iterator<Item = Self> {
        UPSCALERS.iter().map(|row| row.0)
    }

    /// AUTOMATIC1111's name.
    pub fn title(self) -> &'static str {
        let row = UPSCALERS.iter().find(|row| row.0 == self);
        row.expect("every variant has a row; a test walks them").1
    }
}

impl FromStr for Upscaler {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let row = UPSCALERS.iter().find(|row| row.1.eq_ignore_ascii_case(name));
        row.map(|row| row.0).ok_or_else(|| {
            let known = UPSCALERS.map(|row| row.1).join(", ");
            format!("unknown upscaler {name:?}; known are {known}")
        })
    }
}

/// The syntax of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PromptSyntax {
    /// As in diffusers: every character is text, truncated to one chunk of tokens.
    #[default]
    Plain,
    /// As in AUTOMATIC1111 ([`crate::text::chunks`]): brackets are emphasis, long prompts fill
    /// several chunks, and `<lora:name:0.8>` adds a LoRA.
    A1111,
}

impl FromStr for PromptSyntax {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name.to_ascii_lowercase().as_str() {
            "plain" => Ok(Self::Plain),
            "a1111" => Ok(Self::A1111),
            _ => Err(format!("unknown syntax {name:?}; known are plain, a1111")),
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
    /// One byte per pixel, row by row: 128 and more is inpainted, less is preserved. Without a
    /// mask, the whole image is changed.
    pub mask: Option<Vec<u8>>,
}

/// The samplers, under the names that requests use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheduler {
    /// Pseudo numerical methods (PLMS), the default of Stable Diffusion v1.4.
    Pndm,
    /// Denoising diffusion implicit models.
    Ddim,
    /// Denoising diffusion probabilistic models.
    Ddpm,
    /// Euler's method.
    Euler,
    /// Euler's method with ancestral noise.
    EulerAncestral,
    /// Heun's method, two evaluations a step.
    Heun,
    /// DPM-Solver++ of second order, multistep.
    Dpmpp2m,
    /// The same on Karras' sigmas.
    Dpmpp2mKarras,
    /// Unified predictor-corrector.
    UniPc,
    /// Latent consistency models.
    Lcm,
}

/// One row a sampler: the name in requests, AUTOMATIC1111's name, diffusers' class.
const NAMES: [(Scheduler, &str, &str, &str); 10] = [
    (Scheduler::Pndm, "pndm", "PLMS", "PNDMScheduler"),
    (Scheduler::Ddim, "ddim", "DDIM", "DDIMScheduler"),
    (Scheduler::Ddpm, "ddpm", "DDPM", "DDPMScheduler"),
    (Scheduler::Euler, "euler", "Euler", "EulerDiscreteScheduler"),
    (Scheduler::EulerAncestral, "euler_a", "Euler a", "EulerAncestralDiscreteScheduler"),
    (Scheduler::Heun, "heun", "Heun", "HeunDiscreteScheduler"),
    (Scheduler::Dpmpp2m, "dpmpp_2m", "DPM++ 2M", "DPMSolverMultistepScheduler"),
    (Scheduler::Dpmpp2mKarras, "dpmpp_2m_karras", "DPM++ 2M Karras", ""),
    (Scheduler::UniPc, "unipc", "UniPC", "UniPCMultistepScheduler"),
    (Scheduler::Lcm, "lcm", "LCM", "LCMScheduler"),
];

impl Scheduler {
    /// Every sampler, in the order of the documentation.
    pub fn all() -> impl Iterator<Item = Self> {
        NAMES.iter().map(|row| row.0)
    }

    fn row(self) -> &'static (Self, &'static str, &'static str, &'static str) {
        NAMES.iter().find(|row| row.0 == self).expect("every variant has a row; a test walks them")
    }

    /// The name in requests: `euler_a`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The name that AUTOMATIC1111's infotext uses: `Euler a`.
    pub fn title(self) -> &'static str {
        self.row().2
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Scheduler {
    type Err = String;

    /// Any of a sampler's three names, in any case.
    fn from_str(name: &str) -> std::result::Result<Self, String> {
        NAMES
            .iter()
            .find(|(_, short, title, class)| {
                [short, title, class].iter().any(|n| !n.is_empty() && n.eq_ignore_ascii_case(name))
            })
            .map(|row| row.0)
            .ok_or_else(|| {
                let known: Vec<_> = NAMES.iter().map(|row| row.1).collect();
                format!("unknown scheduler {name:?}; known are {}", known.join(", "))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_sampler_finds_it() {
        for (scheduler, short, title, class) in NAMES {
            assert_eq!(short.parse(), Ok(scheduler));
            assert_eq!(title.to_uppercase().parse(), Ok(scheduler));
            if !class.is_empty() {
                assert_eq!(class.parse(), Ok(scheduler));
            }
            assert_eq!(scheduler.name(), short);
        }
        for upscaler in Upscaler::all() {
            assert_eq!(upscaler.title().to_lowercase().parse(), Ok(upscaler));
        }
        assert!("dpm_fast".parse::<Scheduler>().unwrap_err().contains("euler_a"));
        assert!("".parse::<Scheduler>().is_err());
    }
}
