//! Group and layer normalisation. The statistics of a group are sums in f64, those of a token are
//! taken in two passes in f32.

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::{D, DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

use super::activation::silu;
use super::buffers::{FEWEST, written_in_chunks};
use super::simd::vectorized;
use super::{Joined, host, to_host};

/// Pixels that are taken at a time. Fixed, so that the order of sums does not depend on the number of
/// threads.
const RUN: usize = 64;

/// Scale and shift of a normalisation.
enum Affine {
    Cpu {
        weight: Vec<f32>,
        bias: Vec<f32>,
    },
    /// In f32: norms accumulate in f32 on every device.
    Device {
        weight: Tensor,
        bias: Tensor,
    },
}

impl Affine {
    fn new(weight: &Tensor, bias: &Tensor, device: &Device) -> Result<Self> {
        if device.is_cpu() {
            return Ok(Self::Cpu { weight: to_host(weight)?, bias: to_host(bias)? });
        }
        let place = |t: &Tensor| t.to_dtype(DType::F32)?.to_device(device);
        Ok(Self::Device { weight: place(weight)?, bias: place(bias)? })
    }
}

/// A picture, and its channels among those of all.
type Part<'a> = (&'a [f32], Range<usize>);

/// Group normalisation (Wu and He 2018) over (B, H, W, C), with or without SiLU behind it.
pub(crate) struct GroupNorm {
    affine: Affine,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// From a weight (C) and a bias (C).
    pub(crate) fn new(
        weight: &Tensor,
        bias: &Tensor,
        groups: usize,
        eps: f64,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self { affine: Affine::new(weight, bias, device)?, groups, eps })
    }

    /// (B, H, W, C) -> (B, H, W, C)
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(&Joined::one(x), false)
    }

    /// (B, H, W, C) -> (B, H, W, C), through SiLU
    pub(crate) fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.run(&Joined::one(x), true)
    }

    /// As `forward_silu` on two pictures as one.
    pub(crate) fn forward_silu_joined(&self, x: &Joined) -> Result<Tensor> {
        self.run(x, true)
    }

    fn run(&self, joined: &Joined, with_silu: bool) -> Result<Tensor> {
        let x = &joined.first;
        let (batch, h, w, _) = x.dims4()?;
        let (weight, bias) = match &self.affine {
            Affine::Cpu { weight, bias } => (weight, bias),
            Affine::Device { weight, bias } => {
                #[cfg(feature = "cuda")]
                if let Some(y) = super::cuda::group_norm(
                    joined,
                    (weight, bias),
                    self.groups,
                    self.eps,
                    with_silu,
                )? {
                    return Ok(y);
                }
                let x = joined.whole()?;
                let y = group_norm_reference(&x, weight, bias, self.groups, self.eps)?;
                return if with_silu { y.silu() } else { Ok(y) };
            }
        };
        let (c1, c2) = joined.channels()?;
        if c1 + c2 != weight.len() {
            bail!("a norm of {} channels was given {c1} + {c2}", weight.len());
        }
        let (first, second) = (host(x)?, joined.second.as_ref().map(host).transpose()?);
        let second = second.as_ref().map_or(Ok(&[][..]), |second| second.data())?;
        let parts = [(first.data()?, 0..c1), (second, c1..c1 + c2)];
        let parts = if c2 == 0 { &parts[..1] } else { &parts[..] };
        let (pixels, channels) = (h * w, c1 + c2);
        let coefficients = self.coefficients(parts, (batch, pixels), weight);
        let normalized = |run: usize, mut out: &mut [MaybeUninit<f32>]| {
            let mut first = run * RUN;
            // A run may hold the end of one sample and the start of the next.
            while !out.is_empty() {
                let (mean, scale) = &coefficients[first / pixels];
                let count = (out.len() / channels).min(pixels - first % pixels);
                let (piece, rest) = out.split_at_mut(count * channels);
                for (data, own) in parts {
                    let data = &data[first * own.len()..][..count * own.len()];
                    let affine = (&mean[own.clone()], &scale[own.clone()], &bias[own.clone()]);
                    normalize(data, affine, own.start, channels, piece);
                }
                if with_silu {
                    // SAFETY: the channels of the parts are all that a pixel has, and normalize()
                    // has written its own in every pixel.
                    silu(unsafe { piece.assume_init_mut() });
                }
                first += count;
                out = rest;
            }
        };
        // SAFETY: as above.
        let out =
            unsafe { written_in_chunks(batch * pixels * channels, RUN * channels, normalized) };
        Tensor::from_vec(out, (batch, h, w, channels), x.device())
    }

    /// Mean and scale of every channel of each sample: y = (x - mean) * scale + bias.
    fn coefficients(
        &self,
        parts: &[Part<'_>],
        (batch, pixels): (usize, usize),
        weight: &[f32],
    ) -> Vec<(Vec<f32>, Vec<f32>)> {
        let channels = weight.len();
        let count = (pixels * channels / self.groups) as f64;
        let per_sample = pixels.div_ceil(RUN);
        let runs: Vec<(Vec<f64>, Vec<f64>)> = (0..batch * per_sample)
            .into_par_iter()
            .with_min_len(FEWEST.div_ceil(RUN * channels))
            .map(|run| {
                let (sample, first) = (run / per_sample, run % per_sample * RUN);
                let run = sample * pixels + first..sample * pixels + pixels.min(first + RUN);
                let (mut sum, mut squares) = (vec![0f64; channels], vec![0f64; channels]);
                for (data, own) in parts {
                    let data = &data[run.start * own.len()..run.end * own.len()];
                    sums(data, &mut sum[own.clone()], &mut squares[own.clone()]);
                }
                (sum, squares)
            })
            .collect();
        let per_group = channels / self.groups;
        let of_sample = |runs: &[(Vec<f64>, Vec<f64>)]| {
            let (mut means, mut scale) = (vec![0f32; channels], vec![0f32; channels]);
            for group in 0..self.groups {
                let own = group * per_group..(group + 1) * per_group;
                let total = |runs: &mut dyn Iterator<Item = &Vec<f64>>| -> f64 {
                    runs.flat_map(|run| &run[own.clone()]).sum()
                };
                let mean = total(&mut runs.iter().map(|run| &run.0)) / count;
                let variance =
                    (total(&mut runs.iter().map(|run| &run.1)) / count - mean * mean).max(0.0);
                let inverse = 1.0 / (variance + self.eps).sqrt();
                for c in own.clone() {
                    means[c] = mean as f32;
                    scale[c] = (f64::from(weight[c]) * inverse) as f32;
                }
            }
            (means, scale)
        };
        runs.chunks(per_sample).map(of_sample).collect()
    }
}

vectorized! {
    /// Adds the pixels (.., C) to (C), and their squares: in f64, since the difference of the two is
    /// small where the mean is large.
    fn sums(data: &[f32], sum: &mut [f64], squares: &mut [f64]) {
        for pixel in data.chunks_exact(sum.len()) {
            for ((sum, squares), x) in sum.iter_mut().zip(squares.iter_mut()).zip(pixel) {
                let x = f64::from(*x);
                *sum += x;
                *squares += x * x;
            }
        }
    }
}

vectorized! {
    /// out = (data - mean) * scale + bias, the three (C) each, in the channels from `first` on of
    /// the `channels` that a pixel of `out` has
    fn normalize(
        data: &[f32],
        affine: (&[f32], &[f32], &[f32]),
        first: usize,
        channels: usize,
        out: &mut [MaybeUninit<f32>],
    ) {
        let (mean, scale, bias) = affine;
        let width = mean.len();
        for (out, data) in out.chunks_exact_mut(channels).zip(data.chunks_exact(width)) {
            let out = &mut out[first..][..width];
            let affine = mean.iter().zip(scale).zip(bias);
            for ((out, x), ((mean, scale), bias)) in out.iter_mut().zip(data).zip(affine) {
                out.write((x - mean) * scale + bias);
            }
        }
    }
}

/// The same from candle's operations, in f32 whatever the type of `x`.
fn group_norm_reference(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
) -> Result<Tensor> {
    let (batch, h, w, channels) = x.dims4()?;
    let y = x.to_dtype(DType::F32)?.reshape((batch, h * w, groups, channels / groups))?;
    let y = y.transpose(1, 2)?.flatten_from(2)?; // (B, groups, H * W * C / groups)
    let y = y.broadcast_sub(&y.mean_keepdim(D::Minus1)?)?;
    let variance = y.sqr()?.mean_keepdim(D::Minus1)?;
    let y = y.broadcast_div(&(variance + eps)?.sqrt()?)?;
    let y = y.reshape((batch, groups, h * w, channels / groups))?.transpose(1, 2)?;
    let y = y.contiguous()?.reshape((batch, h, w, channels))?;
    y.broadcast_mul(weight)?.broadcast_add(bias)?.to_dtype(x.dtype())
}

/// Layer normalisation (Ba et al. 2016) over the last dimension.
pub(crate) struct LayerNorm {
    affine: Affine,
    eps: f64,
}

impl LayerNorm {
    /// From a weight (C) and a bias (C).
    pub(crate) fn new(weight: &Tensor, bias: &Tensor, eps: f64, device: &Device) -> Result<Self> {
        Ok(Self { affine: Affine::new(weight, bias, device)?, eps })
    }

    /// (.., C) -> (.., C)
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = match &self.affine {
            Affine::Cpu { weight, bias } => (weight, bias),
            Affine::Device { weight, bias } => {
                #[cfg(feature = "cuda")]
                if let Some(y) = super::cuda::layer_norm(x, weight, bias, self.eps)? {
                    return Ok(y);
                }
                return layer_norm_reference(x, weight, bias, self.eps);
            }
        };
        let source = host(x)?;
        let data = source.data()?;
        let width = weight.len();
        if x.dims().last() != Some(&width) {
            bail!("a norm of {width} channels was given {:?}", x.dims());
        }
        let normalized = |run: usize, out: &mut [MaybeUninit<f32>]| {
            let data = &data[run * RUN * width..][..out.len()];
            normalize_rows(data, weight, bias, self.eps as f32, out);
        };
        // SAFETY: normalize_rows() writes all rows of what it is given, which is nothing but rows.
        let out = unsafe { written_in_chunks(data.len(), RUN * width, normalized) };
        Tensor::from_vec(out, x.shape(), x.device())
    }
}

vectorized! {
    fn normalize_rows(
        data: &[f32],
        weight: &[f32],
        bias: &[f32],
        eps: f32,
        out: &mut [MaybeUninit<f32>],
    ) {
        let width = weight.len();
        for (out, row) in out.chunks_exact_mut(width).zip(data.chunks_exact(width)) {
            let mean = sum_of(row, |x| x) / width as f32;
            let variance = sum_of(row, |x| (x - mean) * (x - mean)) / width as f32;
            let inverse = 1.0 / (variance + eps).sqrt();
            for (((out, x), weight), bias) in out.iter_mut().zip(row).zip(weight).zip(bias) {
                out.write((x - mean) * inverse * weight + bias);
            }
        }
    }
}

/// Sixteen partial sums vectorise; a single one would be summed in sequence.
#[inline(always)]
fn sum_of(row: &[f32], value: impl Fn(f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|x| value(*x)).sum();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += value(*x);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// The same from candle's operations, in f32 whatever the type of `x`.
fn layer_norm_reference(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let y = x.to_dtype(DType::F32)?;
    let y = y.broadcast_sub(&y.mean_keepdim(D::Minus1)?)?;
    let variance = y.sqr()?.mean_keepdim(D::Minus1)?;
    let y = y.broadcast_div(&(variance + eps)?.sqrt()?)?;
    y.broadcast_mul(weight)?.broadcast_add(bias)?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{difference, tensor};

    #[test]
    fn group_norm_agrees_with_the_reference() {
        for (h, w, channels, groups) in [(8, 8, 64, 32), (5, 13, 48, 16), (1, 1, 32, 32)] {
            let (weight, bias) = (tensor(&[channels], 2), tensor(&[channels], 3));
            let norm = GroupNorm::new(&weight, &bias, groups, 1e-5, &Device::Cpu).unwrap();
            // The rounding of the numbers themselves counts where their mean is large.
            for (mean, allowed) in [(0.7, 1e-5), (300.0, 1e-4)] {
                let x = tensor(&[2, h, w, channels], 1).affine(3.0, mean).unwrap();
                let want = group_norm_reference(&x, &weight, &bias, groups, 1e-5).unwrap();
                assert!(difference(&norm.forward(&x).unwrap(), &want) < allowed, "mean {mean}");
                let want = want.silu().unwrap();
                assert!(difference(&norm.forward_silu(&x).unwrap(), &want) < allowed);
            }
        }
    }

    #[test]
    fn two_pictures_are_normalised_as_one() {
        // The groups of 17 straddle the border.
        let (x, skip) = (tensor(&[2, 9, 8, 40], 1), tensor(&[2, 9, 8, 28], 2));
        let (weight, bias) = (tensor(&[68], 3), tensor(&[68], 4));
        let norm = GroupNorm::new(&weight, &bias, 4, 1e-5, &Device::Cpu).unwrap();
        let joined = Joined::new(&x, &skip).unwrap();
        let want = norm.forward_silu(&joined.whole().unwrap()).unwrap();
        assert_eq!(difference(&norm.forward_silu_joined(&joined).unwrap(), &want), 0.0);
    }

    #[test]
    fn layer_norm_agrees_with_the_reference() {
        for width in [5, 64, 77] {
            let x = tensor(&[2, 70, width], 1).affine(3.0, -0.2).unwrap();
            let (weight, bias) = (tensor(&[width], 2), tensor(&[width], 3));
            let norm = LayerNorm::new(&weight, &bias, 1e-5, &Device::Cpu).unwrap();
            let want = layer_norm_reference(&x, &weight, &bias, 1e-5).unwrap();
            assert!(difference(&norm.forward(&x).unwrap(), &want) < 1e-5);
        }
    }
}
