//! Group and layer normalisation. The statistics of a group are sums in f64, those of a token are
//! computed in two passes in f32.

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::activation::silu;
use super::buffers::{FEWEST, fill_chunks};
use super::host::host;
use super::simd::vectorized;
use crate::ops::concat::ChannelConcat;

/// Pixels of a run, which one thread takes at a time. Fixed, so that the order of sums does not
/// depend on the number of threads.
const RUN: usize = 64;

/// Images of some of the channels, and which.
type ImagePart<'a> = (&'a [f32], Range<usize>);

/// Group normalisation: (B, H, W, C) -> (B, H, W, C), `weight` and `bias` (C).
pub(in crate::ops) fn group_norm(
    x: &ChannelConcat,
    (weight, bias): (&[f32], &[f32]),
    groups: usize,
    eps: f64,
    with_silu: bool,
) -> Result<Tensor> {
    let (batch, h, w, _) = x.first.dims4()?;
    let (c1, c2) = x.channels()?;
    if c1 + c2 != weight.len() {
        bail!("a norm of {} channels was given {c1} + {c2}", weight.len());
    }
    let (first, second) = (host(&x.first)?, x.second.as_ref().map(host).transpose()?);
    let second = second.as_ref().map_or(Ok(&[][..]), |second| second.data())?;
    let parts = [(first.data()?, 0..c1), (second, c1..c1 + c2)];
    let parts = if c2 == 0 { &parts[..1] } else { &parts[..] };
    let (pixels, channels) = (h * w, c1 + c2);
    let coefficients = coefficients(parts, (batch, pixels), weight, (groups, eps));
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
                // SAFETY: the parts have all channels of a pixel, and normalize() has written its
                // own in every pixel.
                silu(unsafe { piece.assume_init_mut() });
            }
            first += count;
            out = rest;
        }
    };
    // SAFETY: as above.
    let out = unsafe { fill_chunks(batch * pixels * channels, RUN * channels, normalized) };
    Tensor::from_vec(out, (batch, h, w, channels), x.first.device())
}

/// Mean and scale of every channel of each sample: y = (x - mean) * scale + bias.
fn coefficients(
    parts: &[ImagePart<'_>],
    (batch, pixels): (usize, usize),
    weight: &[f32],
    (groups, eps): (usize, f64),
) -> Vec<(Vec<f32>, Vec<f32>)> {
    let channels = weight.len();
    let count = (pixels * channels / groups) as f64;
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
    let per_group = channels / groups;
    let of_sample = |runs: &[(Vec<f64>, Vec<f64>)]| {
        let (mut means, mut scale) = (vec![0f32; channels], vec![0f32; channels]);
        for group in 0..groups {
            let own = group * per_group..(group + 1) * per_group;
            let total = |runs: &mut dyn Iterator<Item = &Vec<f64>>| -> f64 {
                runs.flat_map(|run| &run[own.clone()]).sum()
            };
            let mean = total(&mut runs.iter().map(|run| &run.0)) / count;
            let variance =
                (total(&mut runs.iter().map(|run| &run.1)) / count - mean * mean).max(0.0);
            let inverse = 1.0 / (variance + eps).sqrt();
            for c in own.clone() {
                means[c] = mean as f32;
                scale[c] = (f64::from(weight[c]) * inverse) as f32;
            }
        }
        (means, scale)
    };
    runs.chunks(per_sample).map(of_sample).collect()
}

vectorized! {
    /// Adds the pixels (.., C) to `sum` (C), and their squares: in f64, since the difference of the
    /// two is small where the mean is large.
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
    /// out = (data - mean) * scale + bias, `affine` being the three, (C) each, in the channels from
    /// `first` on of the `channels` of `out`.
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

/// Layer normalisation: (.., C) -> (.., C), `weight` and `bias` (C).
pub(in crate::ops) fn layer_norm(
    x: &Tensor,
    weight: &[f32],
    bias: &[f32],
    eps: f64,
) -> Result<Tensor> {
    let source = host(x)?;
    let data = source.data()?;
    let width = weight.len();
    if x.dims().last() != Some(&width) {
        bail!("a norm of {width} channels was given {:?}", x.dims());
    }
    let normalized = |run: usize, out: &mut [MaybeUninit<f32>]| {
        let data = &data[run * RUN * width..][..out.len()];
        normalize_rows(data, weight, bias, eps as f32, out);
    };
    // SAFETY: normalize_rows() writes all of the rows that it is given, and chunks are whole rows.
    let out = unsafe { fill_chunks(data.len(), RUN * width, normalized) };
    Tensor::from_vec(out, x.shape(), x.device())
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

/// The sum of `value` over a row, in sixteen partial sums, which vectorise.
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
