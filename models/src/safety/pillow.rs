//! Pillow's bicubic resizing of bytes, bit for bit: what a checker was tuned on, it should see. The
//! image crate's filter of the same name keeps floats between its two passes, Pillow rounds to
//! bytes there and counts in fixed point.
//!
//! Reference: Pillow 12 `src/libImaging/Resample.c`.

use std::ops::Range;

use crate::spec::Rgb;

/// Bits behind the point of a weight.
const PRECISION: u32 = 32 - 8 - 2;
/// Pixels of the input on each side that a pixel of the output sees when nothing is made smaller.
const SUPPORT: f64 = 2.0;

/// The pixels from `first` on that make one of the output, and their weights.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// The square of `side` pixels whose upper left corner is at (left, top) of a picture that has been
/// resized to (width, height). Only that square is computed: a narrow picture is long in any size.
pub(super) fn resized_part(
    picture: &Rgb,
    (width, height): (usize, usize),
    (left, top): (usize, usize),
    side: usize,
) -> Vec<u8> {
    let columns = windows(picture.width, width, left..left + side);
    let rows = windows(picture.height, height, top..top + side);
    let end = |window: &Window| window.first + window.weights.len();
    let first = rows.iter().map(|row| row.first).min().unwrap_or(0);
    let end = rows.iter().map(end).max().unwrap_or(0);
    let lines = picture.data.chunks_exact(3 * picture.width).skip(first).take(end - first);
    let across = lines.flat_map(|line| columns.iter().flat_map(move |w| w.pixel(line, 0, 3)));
    let across: Vec<u8> = across.collect();
    let line = |row: &Window, x: usize| row.pixel(&across[3 * x..], first, 3 * side);
    rows.iter().flat_map(|row| (0..side).flat_map(move |x| line(row, x))).collect()
}

impl Window {
    /// Three channels of a line that begins at pixel `from` and has one every `stride` bytes.
    fn pixel(&self, line: &[u8], from: usize, stride: usize) -> [u8; 3] {
        let sum = |channel: usize| {
            let byte = |k: usize| i32::from(line[(self.first - from + k) * stride + channel]);
            let half = 1 << (PRECISION - 1);
            self.weights.iter().enumerate().fold(half, |sum, (k, weight)| sum + byte(k) * weight)
        };
        [0, 1, 2].map(|channel| (sum(channel) >> PRECISION).clamp(0, 255) as u8)
    }
}

/// The windows of a range of a line of `to` pixels in one of `from`.
fn windows(from: usize, to: usize, range: Range<usize>) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = SUPPORT * stretch;
    let window = |i: usize| {
        let center = (i as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let weight = |k: usize| cubic((k as f64 - center + 0.5) / stretch);
        let weights: Vec<f64> = (first..end).map(weight).collect();
        let all: f64 = weights.iter().sum();
        let fixed = |w: f64| {
            let scaled = w / all * f64::from(1 << PRECISION);
            (scaled + 0.5_f64.copysign(scaled)) as i32
        };
        Window { first, weights: weights.into_iter().map(fixed).collect() }
    };
    range.map(window).collect()
}

/// Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing", with a = -1/2.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}
