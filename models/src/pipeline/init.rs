//! The first latents of an image: noise, an input image under noise (image-to-image), or an input
//! image whose masked area is inpainted. Not the sampler's steps, which do not depend on where the
//! latents came from.
//!
//! Reference: diffusers 0.42 `pipelines/stable_diffusion/`, `pipeline_stable_diffusion_img2img.py`
//! and `..._inpaint.py`, whose order of random draws it follows.

use candle_core::{Device, Tensor};

use super::pass::Pass;
use super::spec::{Img2Img, MaskedStart, Spec};
use super::vae::Vae;
use crate::error::Result;
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

/// Draws the first latents.
pub(crate) struct LatentInit<'a> {
    pub(crate) vae: &'a Vae,
    pub(crate) device: &'a Device,
    /// Whether the UNet takes mask and masked image as input channels.
    pub(crate) inpainting: bool,
}

impl LatentInit<'_> {
    /// The first latents of an image. Without mask or without input image, an inpainting UNet
    /// inpaints the whole image.
    pub(crate) fn begin(
        &self,
        spec: &Spec,
        sampler: &SamplerState,
        noise: &mut Noise,
    ) -> Result<InitialLatents> {
        let input = spec.img2img.as_deref();
        let mask = input.and_then(|input| input.mask.as_deref());
        let painting = self.inpainting || mask.is_some();
        let all_noise = input.is_none_or(|input| painting && input.strength >= 1.0);
        let picture = match input {
            Some(input) if !(all_noise && self.inpainting) => {
                Some(self.encode(&pixels(input, |_| true), spec.size, noise)?)
            }
            _ => None,
        };
        let drawn = self.first_noise(spec, noise)?;
        let masked = |pixel: usize| mask.is_none_or(|mask| mask[pixel] >= 128);
        let picture = match (picture, input.map(|input| input.masked_start)) {
            (Some(picture), Some(start @ (MaskedStart::Noise | MaskedStart::Zero))) => {
                let is_noise = start == MaskedStart::Noise;
                let start = if is_noise { drawn.clone() } else { drawn.zeros_like()? };
                let mask = self.shrunk(masked, spec.size)?;
                let blend = InpaintBlend { picture, noise: drawn.clone(), mask };
                Some(blend.without_noise(&start)?)
            }
            (picture, _) => picture,
        };
        let delta = Pass::base(spec).seed_delta();
        let mut step_noise = (delta != 0).then(|| noise.moved(delta));
        let begun = picture.as_ref().filter(|_| !all_noise);
        let latents = sampler.begin(begun, &drawn, step_noise.as_mut().unwrap_or(&mut *noise))?;
        if !painting {
            return Ok(InitialLatents { latents, blend: None, mask_condition: None, step_noise });
        }
        let shrunk = self.shrunk(masked, spec.size)?;
        if !self.inpainting {
            // diffusers encodes the masked image here too, which draws noise from the stream.
            self.draw(spec.size, noise)?;
            let blend = picture.map(|picture| InpaintBlend { picture, noise: drawn, mask: shrunk });
            return Ok(InitialLatents { latents, blend, mask_condition: None, step_noise });
        }
        let rest = match input {
            Some(input) => pixels(input, |pixel| !masked(pixel)),
            None => vec![0.0; 3 * spec.size.pixels()],
        };
        let rest = self.encode(&rest, spec.size, noise)?;
        Ok(InitialLatents {
            latents,
            blend: None,
            mask_condition: Some(Tensor::cat(&[shrunk, rest], 1)?),
            step_noise,
        })
    }

    /// Pixels (H, W, 3) in -1..1 -> a sample of their latents (1, C, h, w), scaled.
    fn encode(&self, pixels: &[f32], size: Size, noise: &mut Noise) -> Result<Tensor> {
        let shape = (1, size.height(), size.width(), 3);
        let pixels = Tensor::from_slice(pixels, shape, self.device)?;
        let (mean, logvar) = self.vae.encode(&pixels)?;
        let drawn = self.draw(size, noise)?;
        let sample = (mean + ((logvar * 0.5)?.exp()? * drawn)?)?;
        self.vae.config().scaled(&sample)
    }

    /// Noise in the shape of the latents (1, C, h, w).
    fn draw(&self, size: Size, noise: &mut Noise) -> Result<Tensor> {
        let (c, h, w) = self.shape(size);
        Ok(Tensor::from_vec(noise.normal(c * h * w), (1, c, h, w), self.device)?)
    }

    /// The same, with the variation of the spec.
    fn first_noise(&self, spec: &Spec, noise: &mut Noise) -> Result<Tensor> {
        let (c, h, w) = self.shape(spec.size);
        let mut values = noise.normal(c * h * w);
        if let Some(variation) = spec.variation {
            variation.mix(&mut values, (h, w));
        }
        Ok(Tensor::from_vec(values, (1, c, h, w), self.device)?)
    }

    /// Channels, height and width of the latents.
    fn shape(&self, size: Size) -> (usize, usize, usize) {
        let config = self.vae.config();
        (config.latent_channels, size.height() / config.scale(), size.width() / config.scale())
    }

    /// The mask in the size of the latents (1, 1, h, w): the first pixel of each square (nearest).
    fn shrunk(&self, masked: impl Fn(usize) -> bool, size: Size) -> Result<Tensor> {
        let scale = self.vae.config().scale();
        let (h, w) = (size.height() / scale, size.width() / scale);
        let first = |i: usize| (i / w * size.width() + i % w) * scale;
        let values = (0..h * w).map(|i| f32::from(u8::from(masked(first(i))))).collect();
        Ok(Tensor::from_vec(values, (1, 1, h, w), self.device)?)
    }
}

/// The pixels (H, W, 3) of the input image in -1..1; 0 where they are not `shown`.
fn pixels(input: &Img2Img, shown: impl Fn(usize) -> bool) -> Vec<f32> {
    let value = |(i, byte): (usize, &u8)| {
        if shown(i / 3) { f32::from(*byte) / 255.0 * 2.0 - 1.0 } else { 0.0 }
    };
    input.picture.data.iter().enumerate().map(value).collect()
}
