//! The first latents of an image: noise, an input image under noise (image-to-image), or an input
//! image whose masked area is inpainted. Not the sampler's steps, which do not depend on where the
//! latents came from, and not the encoder, which may take the pictures in tiles (`before`).
//!
//! Reference: diffusers 0.42 `pipelines/stable_diffusion/`, `pipeline_stable_diffusion_img2img.py`
//! and `..._inpaint.py`, whose order of random draws it follows.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::pass::Pass;
use super::spec::{Img2Img, MaskedStart, Spec};
use super::variation::Variation;
use crate::error::Result;
use crate::networks::VaeConfig;
use crate::picture::Size;
use crate::sampling::{Noise, SamplerState};

/// The first latents of an image, and what inpainting needs at each step.
pub(crate) struct InitialLatents {
    /// (1, C, h, w) f32
    pub(crate) latents: Tensor,
    /// The preserved area, for a UNet without mask input.
    pub(crate) blend: Option<InpaintBlend>,
    /// Mask and masked image (1, 1 + C, h, w) f32, for an inpainting UNet (9 input channels).
    pub(crate) mask_condition: Option<Tensor>,
    /// The stream of the sampler's noise, if it is another.
    pub(crate) step_noise: Option<Noise>,
}

/// The preserved area of an image.
pub(crate) struct InpaintBlend {
    /// The input image's latents (1, C, h, w) f32.
    picture: Tensor,
    noise: Tensor,
    /// (1, 1, h, w) f32; 1 is inpainted, 0 preserved.
    mask: Tensor,
}

impl InpaintBlend {
    /// Latents (1, C, h, w): the sampler's in the inpainted area, elsewhere the input image's at
    /// the sampler's noise level.
    pub(crate) fn apply(&self, latents: &Tensor, sampler: &SamplerState) -> Result<Tensor> {
        self.beside(&sampler.noised(&self.picture, &self.noise)?, latents)
    }

    /// The same for latents without noise.
    pub(crate) fn without_noise(&self, latents: &Tensor) -> Result<Tensor> {
        self.beside(&self.picture, latents)
    }

    fn beside(&self, known: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let keep = self.mask.affine(-1.0, 1.0)?;
        Ok((known.broadcast_mul(&keep)? + latents.broadcast_mul(&self.mask)?)?)
    }
}

/// Something for each picture that is encoded.
pub(crate) struct Inputs<T> {
    /// The input image.
    pub(crate) picture: Option<T>,
    /// What an inpainting UNet sees of it.
    pub(crate) rest: Option<T>,
}

impl<T> Inputs<T> {
    pub(crate) fn map<U>(self, of: impl Fn(T) -> Result<U>) -> Result<Inputs<U>> {
        let Self { picture, rest } = self;
        Ok(Inputs { picture: picture.map(&of).transpose()?, rest: rest.map(&of).transpose()? })
    }

    pub(crate) fn each(&self) -> Inputs<&T> {
        Inputs { picture: self.picture.as_ref(), rest: self.rest.as_ref() }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.picture.iter().chain(&self.rest)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.picture.iter_mut().chain(&mut self.rest)
    }
}

/// Mean and log variance of latents, each (1, C, h, w) f32, not yet scaled.
pub(crate) type Distribution = (Tensor, Tensor);

/// What the first latents of an image are made of.
pub(crate) struct Start {
    input: Option<Arc<Img2Img>>,
    size: Size,
    variation: Option<Variation>,
    /// What is added to the seed for the sampler's noise.
    seed_delta: i64,
    /// Whether the UNet takes mask and masked image as input channels.
    inpainting: bool,
    /// Whether the input image is the latents of a run that another began, as noisy as its first step
    /// takes them.
    is_under_noise: bool,
    vae: VaeConfig,
    device: Device,
}

impl Start {
    /// That of the base pass. Without mask or without input image, an inpainting UNet inpaints the
    /// whole image.
    pub(crate) fn of(spec: &Spec, inpainting: bool, (vae, device): (&VaeConfig, &Device)) -> Self {
        Self {
            input: spec.img2img.clone(),
            size: spec.size,
            variation: spec.variation,
            seed_delta: Pass::base(spec).seed_delta(),
            inpainting,
            is_under_noise: spec.span.start.is_some(),
            vae: vae.clone(),
            device: device.clone(),
        }
    }

    /// Whether the latents begin as noise alone.
    fn is_noise(&self) -> bool {
        let from_noise = |input: &Arc<Img2Img>| self.is_painting() && input.strength >= 1.0;
        !self.is_under_noise && self.input.as_ref().is_none_or(from_noise)
    }

    /// Whether an area is inpainted.
    fn is_painting(&self) -> bool {
        self.inpainting || self.mask().is_some()
    }

    fn mask(&self) -> Option<&[u8]> {
        self.input.as_ref()?.mask.as_deref()
    }

    fn is_masked(&self, pixel: usize) -> bool {
        self.mask().is_none_or(|mask| mask[pixel] >= 128)
    }

    /// The pictures (1, H, W, 3) in -1..1 that are encoded.
    pub(crate) fn pictures(&self) -> Result<Inputs<Tensor>> {
        let input = self.input.as_deref();
        let picture = input.filter(|_| !(self.is_noise() && self.inpainting));
        let rest = self.inpainting.then(|| match input {
            Some(input) => pixels(input, |pixel| !self.is_masked(pixel)),
            None => vec![0.0; 3 * self.size.pixels()],
        });
        let shape = (1, self.size.height(), self.size.width(), 3);
        let tensor = |pixels| Ok(Tensor::from_vec(pixels, shape, &self.device)?);
        Inputs { picture: picture.map(|input| pixels(input, |_| true)), rest }.map(tensor)
    }

    /// The first latents, from what the encoder says of the pictures.
    pub(crate) fn begin(
        &self,
        encoded: Inputs<Distribution>,
        sampler: &SamplerState,
        noise: &mut Noise,
    ) -> Result<InitialLatents> {
        let Inputs { picture, rest } = encoded;
        let picture = picture.map(|encoded| self.sample(encoded, noise)).transpose()?;
        let drawn = match &picture {
            // There is none to add, and none is drawn.
            Some(picture) if self.is_under_noise && !self.is_painting() => picture.zeros_like()?,
            _ => self.first_noise(noise)?,
        };
        let masked_start = self.input.as_ref().map(|input| input.masked_start);
        let picture = match (picture, masked_start) {
            (Some(picture), Some(start @ (MaskedStart::Noise | MaskedStart::Zero))) => {
                let is_noise = start == MaskedStart::Noise;
                let start = if is_noise { drawn.clone() } else { drawn.zeros_like()? };
                let blend =
                    InpaintBlend { picture, noise: drawn.clone(), mask: self.shrunk_mask()? };
                Some(blend.without_noise(&start)?)
            }
            (picture, _) => picture,
        };
        let mut step_noise = (self.seed_delta != 0).then(|| noise.moved(self.seed_delta));
        let begun = picture.as_ref().filter(|_| !self.is_noise());
        let of_steps = step_noise.as_mut().unwrap_or(&mut *noise);
        let latents = match begun {
            Some(begun) if self.is_under_noise => {
                sampler.clone().raised(begun.clone(), of_steps)?
            }
            begun => sampler.begin(begun, &drawn, of_steps)?,
        };
        let (mut blend, mut mask_condition) = (None, None);
        if let Some(rest) = rest {
            let rest = self.sample(rest, noise)?;
            mask_condition = Some(Tensor::cat(&[self.shrunk_mask()?, rest], 1)?);
        } else if self.mask().is_some() {
            // diffusers encodes the masked image here too, which draws noise from the stream.
            self.draw(noise)?;
            let mask = self.shrunk_mask()?;
            blend = picture.map(|picture| InpaintBlend { picture, noise: drawn, mask });
        }
        Ok(InitialLatents { latents, blend, mask_condition, step_noise })
    }

    /// A sample of latents (1, C, h, w), scaled.
    fn sample(&self, (mean, logvar): Distribution, noise: &mut Noise) -> Result<Tensor> {
        let drawn = self.draw(noise)?;
        // Those of tiles were joined on the CPU.
        let [mean, logvar] = [mean.to_device(&self.device)?, logvar.to_device(&self.device)?];
        let sample = (mean + ((logvar * 0.5)?.exp()? * drawn)?)?;
        self.vae.scaled(&sample)
    }

    /// Noise in the shape of the latents (1, C, h, w).
    fn draw(&self, noise: &mut Noise) -> Result<Tensor> {
        let (c, h, w) = self.shape();
        Ok(Tensor::from_vec(noise.normal(c * h * w), (1, c, h, w), &self.device)?)
    }

    /// The same, with the variation.
    fn first_noise(&self, noise: &mut Noise) -> Result<Tensor> {
        let (c, h, w) = self.shape();
        let mut values = noise.normal(c * h * w);
        if let Some(variation) = self.variation {
            variation.mix(&mut values, (h, w));
        }
        Ok(Tensor::from_vec(values, (1, c, h, w), &self.device)?)
    }

    /// Channels, height and width of the latents.
    fn shape(&self) -> (usize, usize, usize) {
        let (size, scale) = (self.size, self.vae.scale());
        (self.vae.latent_channels, size.height() / scale, size.width() / scale)
    }

    /// The mask in the size of the latents (1, 1, h, w): the first pixel of each square (nearest).
    fn shrunk_mask(&self) -> Result<Tensor> {
        let (scale, (_, h, w)) = (self.vae.scale(), self.shape());
        let first = |i: usize| (i / w * self.size.width() + i % w) * scale;
        let value = |i: usize| f32::from(u8::from(self.is_masked(first(i))));
        Ok(Tensor::from_vec((0..h * w).map(value).collect(), (1, 1, h, w), &self.device)?)
    }

    /// What stands for the first latents until there are some: zeros.
    pub(crate) fn nothing(&self) -> Result<InitialLatents> {
        let (c, h, w) = self.shape();
        let latents = Tensor::zeros((1, c, h, w), DType::F32, &self.device)?;
        Ok(InitialLatents { latents, blend: None, mask_condition: None, step_noise: None })
    }
}

/// The pixels (H, W, 3) of the input image in -1..1; 0 where they are not `shown`.
fn pixels(input: &Img2Img, shown: impl Fn(usize) -> bool) -> Vec<f32> {
    let value = |(i, byte): (usize, &u8)| {
        if shown(i / 3) { f32::from(*byte) / 255.0 * 2.0 - 1.0 } else { 0.0 }
    };
    input.picture.data.iter().enumerate().map(value).collect()
}
