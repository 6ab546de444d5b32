//! What to draw. One [`Spec`] is one picture; a request for n pictures is n specs whose seeds
//! count up. Valid by construction as far as that can be known without a model: what depends on
//! the model (is the size within its limits?) is checked by [`crate::Pipeline::check`].

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::picture::{Rgb, Size};
use crate::text::{Loras, without_loras};

/// Steps of a training schedule: no sampler can take more.
pub const MAX_STEPS: usize = 1000;

/// One picture to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// What the picture shows.
    pub prompt: String,
    /// How both prompts are read.
    pub prompt_syntax: PromptSyntax,
    /// What it should not show; only read when the guidance scale is above 1.
    pub negative_prompt: String,
    /// LoRAs beside those that the prompt itself names.
    pub loras: Loras,
    /// Width and height in pixels.
    pub size: Size,
    /// Sampler steps, 1 to [`MAX_STEPS`].
    pub steps: usize,
    /// Classifier-free guidance; at 1 or below the unconditional row is not computed.
    pub guidance_scale: f64,
    /// Seed of the torch CPU generator that draws the noise.
    pub seed: u64,
    /// The sampler.
    pub scheduler: Scheduler,
    /// The picture to begin with; noise alone when there is none.
    pub img2img: Option<Arc<Img2Img>>,
    /// A second pass in another size; none for most pictures.
    pub hires: Option<Hires>,
}

impl Spec {
    /// UNet rows that one evaluation of this picture takes: two with guidance, one without.
    pub fn rows(&self) -> usize {
        if self.guidance_scale > 1.0 { 2 } else { 1 }
    }

    /// The prompt without what is no text in its syntax, and the LoRAs that it names by this.
    pub fn text(&self) -> Result<(Cow<'_, str>, Loras)> {
        match self.prompt_syntax {
            PromptSyntax::Plain => Ok((Cow::Borrowed(&self.prompt), Vec::new())),
            PromptSyntax::A1111 => without_loras(&self.prompt)
                .map_err(|reason| Error::Spec { field: "prompt", reason }),
        }
    }

    /// Whether anything is to be added to the model's weights.
    pub(crate) fn has_loras(&self) -> bool {
        let named = self.prompt_syntax == PromptSyntax::A1111 && self.prompt.contains("<lora:");
        named || !self.loras.is_empty()
    }

    /// Steps that are left out because the picture does not begin as noise alone.
    pub fn skipped_steps(&self) -> usize {
        skipped(self.steps, self.img2img.as_ref().map_or(1.0, |init| init.strength))
    }

    /// The size and the steps of each pass.
    pub fn passes(&self) -> impl Iterator<Item = (Size, usize)> {
        let first = (self.size, self.steps.saturating_sub(self.skipped_steps()));
        let second = self.hires.map(|hires| (hires.size, hires.steps - hires.skipped_steps()));
        std::iter::once(first).chain(second)
    }

    /// How much of what there was turns into noise, in the pass that does not begin as noise alone.
    pub fn strength(&self) -> Option<f64> {
        let strength = self.img2img.as_ref().map(|init| init.strength);
        strength.or(self.hires.map(|hires| hires.strength))
    }

    /// The size of the finished picture.
    pub fn final_size(&self) -> Size {
        self.hires.map_or(self.size, |hires| hires.size)
    }
}

/// Of so many steps those that are left out where only a share of a picture turns into noise.
fn skipped(steps: usize, strength: f64) -> usize {
    steps.saturating_sub((steps as f64 * strength) as usize)
}

/// A second pass over the latents of the first in another size, which is what a model can do that
/// was trained on small pictures (AUTOMATIC1111's "hires fix").
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hires {
    /// Width and height of the finished picture; what is enlarged beyond it is cut off evenly.
    pub size: Size,
    /// Sampler steps as if from noise alone, 1 to [`MAX_STEPS`].
    pub steps: usize,
    /// How much of the enlarged latents turns into noise, 0 to 1: the share of the steps that are
    /// taken.
    pub strength: f64,
    /// How latents are enlarged.
    pub upscaler: Upscaler,
}

impl Hires {
    /// Steps that are left out because the latents do not begin as noise alone.
    pub fn skipped_steps(&self) -> usize {
        skipped(self.steps, self.strength)
    }
}

/// How latents are enlarged: as torch's `interpolate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Upscaler {
    /// Between the two nearest on each side.
    #[default]
    Bilinear,
    /// The same, and no detail is passed over where latents are made smaller.
    BilinearAntialiased,
    /// Between the four nearest on each side.
    Bicubic,
    /// The same with antialiasing, which is a softer curve.
    BicubicAntialiased,
    /// The one before.
    Nearest,
    /// The nearest.
    NearestExact,
}

/// One row an upscaler: the name that AUTOMATIC1111 has for it.
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

    /// Its name.
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

/// How a prompt is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PromptSyntax {
    /// As diffusers reads it: every character is text, and one window of it counts.
    #[default]
    Plain,
    /// As AUTOMATIC1111 reads it ([`crate::text::chunks`]): brackets are emphasis, long prompts fill
    /// several windows, and `<lora:name:0.8>` adds a LoRA.
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

/// A picture to begin with, and the part of it to paint anew.
#[derive(Debug, Clone, PartialEq)]
pub struct Img2Img {
    /// The picture, in the size of the spec.
    pub picture: Rgb,
    /// How much of it is turned into noise, 0 to 1: the share of the steps that are taken.
    pub strength: f64,
    /// A byte for each pixel, row by row; from 128 on the pixel is painted anew, below it is kept.
    /// All of the picture is painted anew when there is no mask.
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
