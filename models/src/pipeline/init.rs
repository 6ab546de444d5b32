//! How the latents of a picture begin: as noise, as another picture under noise, or as one with a
//! part to paint anew. Not the sampler's steps, which do not know where the latents came from.
//!
//! Reference: diffusers 0.42 `pipelines/stable_diffusion/`, `pipeline_stable_diffusion_img2img.py`
//! and `..._inpaint.py`; the noise of a picture is drawn in their order.

use candle_core::{Device, Tensor};

use super::spec::{Img2Img, Spec};
use crate::error::Result;
use crate::networks::Encoder;
use crate::noise::Noise;
use crate::picture::Size;
use crate::sampler::Sampler;

/// The first latents of a picture and what keeps it in its frame.
pub(crate) struct InitialLatents {
    /// (1, C, h, w) f32
    pub(crate) latents: Tensor,
    /// What must come out as it went in, where the UNet knows of no mask.
    pub(crate) blend: Option<InpaintBlend>,
    /// Mask and masked picture (1, 1 + C, h, w) f32, for a UNet that was trained with them.
    pub(crate) mask_condition: Option<Tensor>,
}

/// The part of a picture that is not painted anew.
pub(crate) struct InpaintBlend {
    /// The picture's latents (1, C, h, w), f32 as all of these.
    picture: Tensor,
    noise: Tensor,
    /// (1, 1, h, w); 1 where the picture is painted anew, 0 where it is kept.
    mask: Tensor,
}

impl InpaintBlend {
    /// Latents (1, C, h, w) that are those of the sampler where the picture is painted anew, and
    /// elsewhere the picture's under as much noise.
    pub(crate) fn apply(&self, latents: &Tensor, sampler: &Sampler) -> Result<Tensor> {
        self.beside(&sampler.noised(&self.picture, &self.noise)?, latents)
    }

    /// The same without any noise, for latents that have none.
    pub(crate) fn without_noise(&self, latents: &Tensor) -> Result<Tensor> {
        self.beside(&self.picture, latents)
    }

    fn beside(&self, known: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let keep = self.mask.affine(-1.0, 1.0)?;
        Ok((known.broadcast_mul(&keep)? + latents.broadcast_mul(&self.mask)?)?)
    }
}

/// What a beginning is made with.
pub(crate) struct LatentInit<'a> {
    pub(crate) encoder: &'a Encoder,
    pub(crate) device: &'a Device,
    /// Whether the UNet takes mask and masked picture beside the latents.
    pub(crate) inpainting: bool,
}

impl LatentInit<'_> {
    /// The beginning of a picture. A UNet for inpainting that is given no mask, or no picture, has
    /// everything to paint.
    pub(crate) fn begin(
        &self,
        spec: &Spec,
        sampler: &Sampler,
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
        let drawn = self.draw(spec.size, noise)?;
        let latents = match &picture {
            Some(picture) if !all_noise => sampler.noised(picture, &drawn)?,
            _ => (&drawn * sampler.init_noise_sigma())?,
        };
        if !painting {
            return Ok(InitialLatents { latents, blend: None, mask_condition: None });
        }
        let masked = |pixel: usize| mask.is_none_or(|mask| mask[pixel] >= 128);
        let shrunk = self.shrunk(masked, spec.size)?;
        if !self.inpainting {
            // diffusers encodes the masked picture here too: its draw is part of the stream.
            self.draw(spec.size, noise)?;
            let blend = picture.map(|picture| InpaintBlend { picture, noise: drawn, mask: shrunk });
            return Ok(InitialLatents { latents, blend, mask_condition: None });
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
        })
    }

    /// Pixels (H, W, 3) in -1..1 -> a sample of their latents (1, C, h, w), scaled.
    fn encode(&self, pixels: &[f32], size: Size, noise: &mut Noise) -> Result<Tensor> {
        let shape = (1, size.height(), size.width(), 3);
        let pixels = Tensor::from_slice(pixels, shape, self.device)?;
        let (mean, logvar) = self.encoder.forward(&pixels)?;
        let drawn = self.draw(size, noise)?;
        let sample = (mean + ((logvar * 0.5)?.exp()? * drawn)?)?;
        Ok((sample * self.encoder.config().scaling_factor)?)
    }

    /// Noise in the shape of the latents (1, C, h, w).
    fn draw(&self, size: Size, noise: &mut Noise) -> Result<Tensor> {
        let config = self.encoder.config();
        let (h, w) = (size.height() / config.scale(), size.width() / config.scale());
        let values = noise.normal(config.latent_channels * h * w);
        Ok(Tensor::from_vec(values, (1, config.latent_channels, h, w), self.device)?)
    }

    /// The mask in the size of the latents (1, 1, h, w): of each square the first pixel.
    fn shrunk(&self, masked: impl Fn(usize) -> bool, size: Size) -> Result<Tensor> {
        let scale = self.encoder.config().scale();
        let (h, w) = (size.height() / scale, size.width() / scale);
        let first = |i: usize| (i / w * size.width() + i % w) * scale;
        let values = (0..h * w).map(|i| f32::from(u8::from(masked(first(i))))).collect();
        Ok(Tensor::from_vec(values, (1, 1, h, w), self.device)?)
    }
}

/// The pixels (H, W, 3) of a picture in -1..1; those that are not shown are in the middle.
fn pixels(input: &Img2Img, shown: impl Fn(usize) -> bool) -> Vec<f32> {
    let value = |(i, byte): (usize, &u8)| {
        if shown(i / 3) { f32::from(*byte) / 255.0 * 2.0 - 1.0 } else { 0.0 }
    };
    input.picture.data.iter().enumerate().map(value).collect()
}
