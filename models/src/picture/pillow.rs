//! Pillow's bicubic resizing of bytes, byte-identical, because the safety checker was tuned on it.
//! The image crate's filter of the same name keeps floats between its two passes; Pillow rounds to
//! bytes there and computes in fixed point.
//!
//! Reference: Pillow 12 `src/libImaging/Resample.c`.

use std::ops::Range;

use super::resample::{self, CUBIC};
use super::rgb::Rgb;

/// Fractional bits of a weight.
const PRECISION: u32 = 32 - 8 - 2;
/// The weights of the input pixels from `first` on that make one output pixel, in fixed point.
struct FixedTaps {
    first: usize,
    weights: Vec<i32>,
}

/// The crop of `side` x `side` pixels at (left, top) of an image resized to (width, height). Only
/// the crop is computed.
pub(crate) fn resized_part(
    picture: &Rgb,
    (width, height): (usize, usize),
    (left, top): (usize, usize),
    side: usize,
) -> Vec<u8> {
    let columns = fixed_taps(picture.width, width, left..left + side);
    let rows = fixed_taps(picture.height, height, top..top + side);
    let end = |taps: &FixedTaps| taps.first + taps.weights.len();
    let first = rows.iter().map(|row| row.first).min().unwrap_or(0);
    let end = rows.iter().map(end).max().unwrap_or(0);
    let lines = picture.data.chunks_exact(3 * picture.width).skip(first).take(end - first);
    let across = lines.flat_map(|line| columns.iter().flat_map(move |w| w.pixel(line, 0, 3)));
    let across: Vec<u8> = across.collect();
    let line = |row: &FixedTaps, x: usize| row.pixel(&across[3 * x..], first, 3 * side);
    rows.iter().flat_map(|row| (0..side).flat_map(move |x| line(row, x))).collect()
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
fn fixed_taps(from: usize, to: usize, range: Range<usize>) -> Vec<FixedTaps> {
    let fixed = |weight: f64| {
        let scaled = weight * f64::from(1 << PRECISION);
        (scaled + 0.5_f64.copysign(scaled)) as i32
    };
    let to_fixed = |taps: resample::Taps| FixedTaps {
        first: taps.first,
        weights: taps.weights.into_iter().map(fixed).collect(),
    };
    resample::antialiased(from, to, range, &CUBIC).into_iter().map(to_fixed).collect()
}
