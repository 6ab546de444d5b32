//! Pillow's resizing of bytes, byte-identical: bicubic because CLIP's vision towers were tuned on it,
//! Lanczos and nearest neighbours as AUTOMATIC1111 resizes pictures. The image crate's filters of the
//! same names keep floats between their two passes; Pillow rounds to bytes there and computes in
//! fixed point. Its blending of pictures too.
//!
//! Reference: Pillow 12 `src/libImaging/`, `Resample.c`, `Geometry.c`, `Paste.c`, `Blend.c`.

use std::ops::Range;

use rayon::prelude::*;

use super::resample::{self, CUBIC, Filter, LANCZOS};
use super::rgb::Rgb;

/// Fractional bits of a weight.
const PRECISION: u32 = 32 - 8 - 2;
/// The weights of the input pixels from `first` on that make one output pixel, in fixed point.
struct FixedTaps {
    first: usize,
    weights: Vec<i32>,
}

/// The middle of `side` x `side` pixels of a picture whose shorter side is resized to `edge` by bicubic
/// interpolation, as transformers' `CLIPImageProcessor` shows it. Only the crop is computed.
pub(crate) fn clip_crop(picture: &Rgb, edge: usize, side: usize) -> Rgb {
    let longer = |long: usize, short: usize| edge * long / short;
    let (width, height) = match (picture.width, picture.height) {
        (w, h) if w <= h => (edge, longer(h, w)),
        (w, h) => (longer(w, h), edge),
    };
    let (left, top) = ((width - side) / 2, (height - side) / 2);
    let columns = fixed_taps(picture.width, width, left..left + side, &CUBIC);
    let rows = fixed_taps(picture.height, height, top..top + side, &CUBIC);
    Rgb { width: side, height: side, data: resampled(picture, &columns, &rows) }
}

/// A picture resized to (width, height) with Lanczos' filter.
pub(crate) fn lanczos(picture: &Rgb, (width, height): (usize, usize)) -> Rgb {
    let columns = fixed_taps(picture.width, width, 0..width, &LANCZOS);
    let rows = fixed_taps(picture.height, height, 0..height, &LANCZOS);
    Rgb { width, height, data: resampled(picture, &columns, &rows) }
}

/// A picture resized to (width, height) by nearest neighbours.
pub(crate) fn nearest(picture: &Rgb, (width, height): (usize, usize)) -> Rgb {
    // Added up, as in `Geometry.c`: the sums are rounded.
    let places = |from: usize, to: usize| -> Vec<usize> {
        let step = from as f64 / to as f64;
        let at = std::iter::successors(Some(step * 0.5), |at| Some(at + step));
        at.take(to).map(|at| (at as usize).min(from - 1)).collect()
    };
    let (columns, rows) = (places(picture.width, width), places(picture.height, height));
    let pixel = |y: usize, x: usize| {
        let at = 3 * (y * picture.width + x);
        [picture.data[at], picture.data[at + 1], picture.data[at + 2]]
    };
    let row = |y: usize| columns.iter().flat_map(move |x| pixel(y, *x));
    Rgb { width, height, data: rows.iter().flat_map(|y| row(*y)).collect() }
}

/// `a` and `b`, of one size, in the shares 1 - `share` and `share`.
pub(crate) fn blended(a: &Rgb, b: &Rgb, share: f32) -> Rgb {
    let mix = |(a, b): (&u8, &u8)| {
        let (a, b) = (f32::from(*a), f32::from(*b));
        (a + share * (b - a)) as u8
    };
    let data =
        if share >= 1.0 { b.data.clone() } else { a.data.iter().zip(&b.data).map(mix).collect() };
    Rgb { data, ..*a }
}

/// A byte `under` below a byte `over` of this opacity.
pub(crate) fn pasted(under: u8, over: u8, opacity: u8) -> u8 {
    let [under, over, opacity] = [under, over, opacity].map(u32::from);
    let sum = under * (255 - opacity) + over * opacity + 128;
    (((sum >> 8) + sum) >> 8) as u8
}

/// The pixels of `columns` and `rows`, row by row.
fn resampled(picture: &Rgb, columns: &[FixedTaps], rows: &[FixedTaps]) -> Vec<u8> {
    let end = |taps: &FixedTaps| taps.first + taps.weights.len();
    let first = rows.iter().map(|row| row.first).min().unwrap_or(0);
    let end = rows.iter().map(end).max().unwrap_or(0);
    let width = columns.len();
    let mut across = vec![0; 3 * width * (end - first)];
    let lines = picture.data.par_chunks_exact(3 * picture.width).skip(first);
    across.par_chunks_exact_mut(3 * width).zip(lines).for_each(|(out, line)| {
        for (out, column) in out.chunks_exact_mut(3).zip(columns) {
            out.copy_from_slice(&column.pixel(line, 0, 3));
        }
    });
    let mut down = vec![0; 3 * width * rows.len()];
    down.par_chunks_exact_mut(3 * width).zip(rows).for_each(|(out, row)| {
        for (x, out) in out.chunks_exact_mut(3).enumerate() {
            out.copy_from_slice(&row.pixel(&across[3 * x..], first, 3 * width));
        }
    });
    down
}

impl FixedTaps {
    /// Three channels of one output pixel, from a line whose first pixel is `from` and whose pixels
    /// are `stride` bytes apart.
    fn pixel(&self, line: &[u8], from: usize, stride: usize) -> [u8; 3] {
        let sum = |channel: usize| {
            let byte = |k: usize| i32::from(line[(self.first - from + k) * stride + channel]);
            let half = 1 << (PRECISION - 1);
            self.weights.iter().enumerate().fold(half, |sum, (k, weight)| sum + byte(k) * weight)
        };
        [0, 1, 2].map(|channel| (sum(channel) >> PRECISION).clamp(0, 255) as u8)
    }
}

/// The taps of a range of a line of `to` pixels, from one of `from` pixels.
fn fixed_taps(from: usize, to: usize, range: Range<usize>, filter: &Filter) -> Vec<FixedTaps> {
    let fixed = |weight: f64| {
        let scaled = weight * f64::from(1 << PRECISION);
        (scaled + 0.5_f64.copysign(scaled)) as i32
    };
    let to_fixed = |taps: resample::Taps| FixedTaps {
        first: taps.first,
        weights: taps.weights.into_iter().map(fixed).collect(),
    };
    resample::antialiased(from, to, range, filter).into_iter().map(to_fixed).collect()
}
