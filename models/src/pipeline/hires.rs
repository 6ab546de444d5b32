//! The hires pass ("hires fix"): the latents of the base pass are upscaled and put under noise, and
//! the sampler runs again from there.
//!
//! Reference: AUTOMATIC1111's `StableDiffusionProcessingTxt2Img.sample_hr_pass`. Latents are
//! upscaled as by `torch.nn.functional.interpolate`, and the steps are those of diffusers' img2img.
//! A picture is upscaled between the two passes (`between`), and its latents are the mean of what
//! the encoder says of it, where AUTOMATIC1111 draws from that with noise of no seed.

use std::ops::Range;

use candle_core::Tensor;

use super::enlarge::LoadedUpscaler;
use super::run::PassRun;
use super::upscaler::LatentUpscaler;
use super::variation::Variation;
use crate::error::Result;
use crate::ops::on_host;
use crate::picture::{CUBIC, Size, TRIANGLE, Taps, antialiased, cubic, interpolated};
use crate::sampling::{Noise, SamplerState};

/// The hires pass of an image whose base pass runs.
pub(crate) struct HiresPass {
    pub(crate) size: Size,
    pub(super) run: PassRun,
    pub(crate) upscaler: HiresUpscaler,
    pub(crate) seed: u64,
    /// What is added to the seed for the sampler's noise.
    pub(crate) seed_delta: i64,
    pub(crate) variation: Option<Variation>,
}

/// How the image is upscaled.
pub(crate) enum HiresUpscaler {
    Latent(LatentUpscaler),
    Picture {
        upscaler: LoadedUpscaler,
        /// Whether the picture becomes larger.
        enlarges: bool,
        /// Steps between the passes.
        steps: usize,
        /// The work of each, in pixels times rows times UNet calls.
        step_work: usize,
    },
}

impl HiresUpscaler {
    /// Steps between the passes.
    pub(crate) fn steps(&self) -> usize {
        match self {
            Self::Latent(_) => 0,
            Self::Picture { steps, .. } => *steps,
        }
    }

    /// The work of a step between the passes, in pixels times rows times UNet calls.
    pub(crate) fn step_work(&self) -> usize {
        match self {
            Self::Latent(_) => 0,
            Self::Picture { step_work, .. } => *step_work,
        }
    }
}

/// The latents with which the hires pass begins: upscaled (1, C, h, w) f32, the same under noise,
/// and the sampler and the state of the noise after the draws.
pub(crate) struct UpscaledLatents {
    pub(crate) clean: Tensor,
    pub(crate) latents: Tensor,
    pub(crate) sampler: SamplerState,
    pub(crate) noise: Noise,
}

impl HiresPass {
    /// Upscales the latents of the base pass; `scale` is pixels per latent pixel. `None` if it is
    /// the picture that is upscaled.
    pub(crate) fn begin(
        &self,
        latents: &Tensor,
        from: Size,
        scale: usize,
    ) -> Result<Option<UpscaledLatents>> {
        let HiresUpscaler::Latent(upscaler) = &self.upscaler else { return Ok(None) };
        self.begin_with(upscaler.upscale(latents, (from, self.size), scale)?).map(Some)
    }

    /// Puts upscaled latents (1, C, h, w) f32 under noise. As in AUTOMATIC1111, it is a new stream
    /// of the same seed, with the same variation.
    pub(crate) fn begin_with(&self, clean: Tensor) -> Result<UpscaledLatents> {
        let mut noise = Noise::new(self.seed);
        let mut drawn = noise.normal(clean.elem_count());
        if let Some(variation) = self.variation {
            let (_, _, h, w) = clean.dims4()?;
            variation.mix(&mut drawn, (h, w));
        }
        let drawn = Tensor::from_vec(drawn, clean.shape(), clean.device())?;
        if self.seed_delta != 0 {
            noise = noise.moved(self.seed_delta);
        }
        let mut sampler = self.run.sampler.clone();
        let latents = sampler.begin(Some(&clean), &drawn, &mut noise)?;
        sampler.draw_ahead(latents.shape(), &mut noise, latents.device())?;
        Ok(UpscaledLatents { clean, latents, sampler, noise })
    }
}

impl LatentUpscaler {
    /// Latents (1, C, h, w) f32 of an image of one size -> (1, C, h', w') of another size on the
    /// same device: upscaled until they cover it, then cropped at the centre. `scale` is pixels per
    /// latent pixel.
    pub fn upscale(
        self,
        latents: &Tensor,
        (from, to): (Size, Size),
        scale: usize,
    ) -> Result<Tensor> {
        let (batch, channels, h, w) = latents.dims4()?;
        let covering = covering(from, to);
        // Only the crop is computed: a narrow image is long where it covers a square.
        let middle = |covering: usize, side: usize| {
            let first = (covering - side) / scale / 2;
            first..first + side / scale
        };
        let across = self.line(w, covering.0 / scale, middle(covering.0, to.width()));
        let down = self.line(h, covering.1 / scale, middle(covering.1, to.height()));
        let values = on_host(latents)?.flatten_all()?.to_vec1::<f32>()?;
        let planes =
            values.chunks_exact(h * w).flat_map(|plane| resampled(plane, w, &across, &down));
        let shape = (batch, channels, down.len(), across.len());
        Ok(Tensor::from_vec(planes.collect(), shape, latents.device())?)
    }

    /// The filter taps of a range of `to` values from a line of `from` values.
    fn line(self, from: usize, to: usize, range: Range<usize>) -> Vec<Taps> {
        let nearest = |shift: f64| {
            let at = move |i: usize| ((i as f64 + shift) * from as f64 / to as f64) as usize;
            let taps = move |i| Taps { first: at(i).min(from - 1), weights: vec![1.0] };
            range.clone().map(taps).collect()
        };
        match self {
            Self::Bilinear => interpolated(from, to, range, (1, TRIANGLE.value)),
            Self::BilinearAntialiased => antialiased(from, to, range, &TRIANGLE),
            Self::Bicubic => interpolated(from, to, range, (2, |x| cubic(x, -0.75))),
            Self::BicubicAntialiased => antialiased(from, to, range, &CUBIC),
            Self::Nearest => nearest(0.0),
            Self::NearestExact => nearest(0.5),
        }
    }
}

/// A plane with rows of `w` values, resampled along its rows and then its columns.
fn resampled(plane: &[f32], w: usize, across: &[Taps], down: &[Taps]) -> Vec<f32> {
    let sum = |taps: &Taps, value: &dyn Fn(usize) -> f64| -> f64 {
        taps.weights.iter().enumerate().map(|(k, w)| w * value(taps.first + k)).sum()
    };
    let row = |row: &[f32]| -> Vec<f64> {
        across.iter().map(|taps| sum(taps, &|x| f64::from(row[x]))).collect()
    };
    let rows: Vec<Vec<f64>> = plane.chunks_exact(w).map(row).collect();
    let line = |taps: &Taps| -> Vec<f32> {
        (0..across.len()).map(|x| sum(taps, &|y| rows[y][x]) as f32).collect()
    };
    down.iter().flat_map(line).collect()
}

/// The smallest size with the aspect ratio of `from` that covers `to`.
pub(super) fn covering(from: Size, to: Size) -> (usize, usize) {
    let wider = to.width() * from.height() > from.width() * to.height();
    match wider {
        true => (to.width(), to.width() * from.height() / from.width()),
        false => (to.height() * from.width() / from.height(), to.height()),
    }
}
