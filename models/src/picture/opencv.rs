//! Pictures resized as by OpenCV, to the byte: but for cubic ones where a sum is near the middle of
//! two, since its packages for x86-64 leave these to a library that computes in f32.
//!
//! Reference: OpenCV 4.11 `modules/imgproc/src/resize.cpp` and `thresh.cpp`.

use std::ops::Range;

use super::resample::{cubic as keys, interpolated};
use super::rgb::Rgb;

/// How a picture is resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interpolation {
    /// `INTER_NEAREST`
    Nearest,
    /// `INTER_AREA`
    Area,
    /// `INTER_CUBIC`
    Cubic,
}

/// A value of a line that has part in another, and how much.
struct Share {
    from: usize,
    weight: f32,
}

/// Where a picture is resized: the size it has, the one it gets, and the part of that which is computed.
#[derive(Clone)]
struct Frame {
    from: [usize; 2],
    to: [usize; 2],
    part: [Range<usize>; 2],
}

impl Interpolation {
    /// A picture in (width, height).
    pub fn resize(self, picture: &Rgb, (width, height): (usize, usize)) -> Rgb {
        self.resize_part(picture, (width, height), [0..width, 0..height])
    }

    /// The columns and rows of a picture in (width, height). Only they are computed.
    pub fn resize_part(
        self,
        picture: &Rgb,
        (width, height): (usize, usize),
        part: [Range<usize>; 2],
    ) -> Rgb {
        let from = [picture.width, picture.height];
        let frame = Frame { from, to: [width, height], part };
        let sides = frame.part.each_ref().map(ExactSizeIterator::len);
        let data = match self {
            _ if from == [width, height] => nearest(picture, &frame),
            Self::Nearest => nearest(picture, &frame),
            Self::Area if (0..2).all(|axis| frame.scale(axis) >= 1.0) => area(picture, &frame),
            Self::Area => linear(picture, &frame),
            Self::Cubic => cubic(picture, &frame),
        };
        Rgb { width: sides[0], height: sides[1], data }
    }
}

impl Frame {
    fn inverse(&self, axis: usize) -> f64 {
        self.to[axis] as f64 / self.from[axis] as f64
    }

    fn scale(&self, axis: usize) -> f64 {
        1.0 / self.inverse(axis)
    }

    /// Something for each value of a line along an axis that is computed.
    fn line<T>(&self, axis: usize, of: impl FnMut(usize) -> T) -> Vec<T> {
        self.part[axis].clone().map(of).collect()
    }
}

fn nearest(picture: &Rgb, frame: &Frame) -> Vec<u8> {
    let place = |axis: usize| {
        let place =
            |at: usize| ((at as f64 * frame.scale(axis)) as usize).min(frame.from[axis] - 1);
        frame.line(axis, place)
    };
    let [columns, rows] = [0, 1].map(place);
    let pixel =
        |row: usize, column: usize| &picture.data[3 * (row * picture.width + column)..][..3];
    rows.iter()
        .flat_map(|row| columns.iter().flat_map(|column| pixel(*row, *column)))
        .copied()
        .collect()
}

/// Each value is the mean of the area that it covers.
fn area(picture: &Rgb, frame: &Frame) -> Vec<u8> {
    let whole = [0, 1].map(|axis| frame.scale(axis).round_ties_even());
    let is_whole = |axis: usize| (frame.scale(axis) - whole[axis]).abs() < f64::EPSILON;
    if is_whole(0) && is_whole(1) {
        return blocks(picture, frame, whole.map(|side| side as usize));
    }
    let shares = |axis| frame.line(axis, |at| shares(at, frame.from[axis], frame.scale(axis)));
    let [columns, rows] = [0, 1].map(shares);
    let mut data = Vec::new();
    for row in rows {
        let mut sum = vec![0_f32; 3 * columns.len()];
        for (k, Share { from, weight }) in row.into_iter().enumerate() {
            let line = &picture.data[3 * from * picture.width..];
            for (sum, column) in sum.chunks_exact_mut(3).zip(&columns) {
                for (channel, sum) in sum.iter_mut().enumerate() {
                    let value = |share: &Share| f32::from(line[3 * share.from + channel]);
                    let across = column.iter().fold(0.0, |all, s| all + value(s) * s.weight);
                    *sum = if k == 0 { weight * across } else { *sum + weight * across };
                }
            }
        }
        data.extend(sum.into_iter().map(byte));
    }
    data
}

/// The values that one value covers where a line is `scale` times shorter.
fn shares(at: usize, side: usize, scale: f64) -> Vec<Share> {
    const LEAST: f64 = 1e-3;
    let begin = at as f64 * scale;
    let end = begin + scale;
    let width = scale.min(side as f64 - begin);
    let last = (end.floor() as usize).min(side - 1);
    let first = (begin.ceil() as usize).min(last);
    let mut shares = Vec::new();
    if first as f64 - begin > LEAST {
        let weight = ((first as f64 - begin) / width) as f32;
        shares.push(Share { from: first - 1, weight });
    }
    shares.extend((first..last).map(|from| Share { from, weight: (1.0 / width) as f32 }));
    if end - last as f64 > LEAST {
        let weight = ((end - last as f64).min(1.0).min(width) / width) as f32;
        shares.push(Share { from: last, weight });
    }
    shares
}

/// Means of blocks of whole pixels.
fn blocks(picture: &Rgb, frame: &Frame, [across, down]: [usize; 2]) -> Vec<u8> {
    let mut data = Vec::new();
    for row in frame.part[1].clone() {
        for column in frame.part[0].clone() {
            for channel in 0..3 {
                let line = |y: usize| {
                    let first = (row * down + y) * picture.width + column * across;
                    (0..across).map(move |x| u32::from(picture.data[3 * (first + x) + channel]))
                };
                let sum: u32 = (0..down).flat_map(line).sum();
                data.push(match (across, down) {
                    (2, 2) => ((sum + 2) >> 2) as u8,
                    _ => byte(sum as f32 * (1.0 / (across * down) as f32)),
                });
            }
        }
    }
    data
}

/// What OpenCV takes for the area where a side becomes longer: the line between two values, in fixed
/// point.
fn linear(picture: &Rgb, frame: &Frame) -> Vec<u8> {
    const ONE: f32 = (1 << 11) as f32;
    let taps = |axis: usize| {
        frame.line(axis, |at| {
            let last = frame.from[axis] - 1;
            let first = (at as f64 * frame.scale(axis)).floor();
            let part = ((at + 1) as f64 - (first + 1.0) * frame.inverse(axis)) as f32;
            let part = if part <= 0.0 { 0.0 } else { part - part.floor() };
            let first = (first as usize).min(last);
            // Of a line of one pixel OpenCV takes the same twice, with both weights.
            let part = if axis == 0 && first == last { 0.0 } else { part };
            let weights = [1.0 - part, part].map(|w| (w * ONE).round_ties_even() as i32);
            ([first, (first + 1).min(last)], weights)
        })
    };
    let [columns, rows] = [0, 1].map(taps);
    let mut data = Vec::with_capacity(3 * columns.len() * rows.len());
    for (lines, down) in &rows {
        for (places, across) in &columns {
            for channel in 0..3 {
                let value = |line: usize, k: usize| {
                    let at = 3 * (lines[line] * picture.width + places[k]) + channel;
                    i32::from(picture.data[at]) * across[k]
                };
                let across = |line| (value(line, 0) + value(line, 1)) >> 4;
                let mixed = |line| (across(line) * down[line]) >> 16;
                data.push(((mixed(0) + mixed(1) + 2) >> 2).clamp(0, 255) as u8);
            }
        }
    }
    data
}

fn cubic(picture: &Rgb, frame: &Frame) -> Vec<u8> {
    let taps = |axis: usize| {
        let (from, to) = (frame.from[axis], frame.to[axis]);
        interpolated(from, to, frame.part[axis].clone(), (2, |x| keys(x, -0.75)))
    };
    let [columns, rows] = [0, 1].map(taps);
    let mut data = Vec::with_capacity(3 * columns.len() * rows.len());
    for row in &rows {
        for column in &columns {
            for channel in 0..3 {
                let line = |y: usize| {
                    let first = (row.first + y) * picture.width + column.first;
                    let value = |x: usize| f64::from(picture.data[3 * (first + x) + channel]);
                    column.weights.iter().enumerate().map(|(x, w)| w * value(x)).sum::<f64>()
                };
                let sum: f64 = row.weights.iter().enumerate().map(|(y, w)| w * line(y)).sum();
                data.push(sum.round_ties_even().clamp(0.0, 255.0) as u8);
            }
        }
    }
    data
}

fn byte(value: f32) -> u8 {
    value.round_ties_even().clamp(0.0, 255.0) as u8
}

/// The threshold of `THRESH_OTSU`: bytes up to it and bytes above it differ among themselves as little
/// as possible.
pub fn otsu(bytes: &[u8]) -> u8 {
    let mut counts = [0_usize; 256];
    bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    let share = |value: usize| counts[value] as f64 * (1.0 / bytes.len().max(1) as f64);
    let mean: f64 = (0..256).map(|value| value as f64 * counts[value] as f64).sum();
    let mean = mean * (1.0 / bytes.len().max(1) as f64);
    let (mut below, mut mean_below, mut best) = (0.0_f64, 0.0, (0.0, 0));
    for value in 0..256 {
        mean_below *= below;
        below += share(value);
        let above = 1.0 - below;
        let least = f64::from(f32::EPSILON);
        if below.min(above) < least || below.max(above) > 1.0 - least {
            continue;
        }
        mean_below = (mean_below + value as f64 * share(value)) / below;
        let mean_above = (mean - below * mean_below) / above;
        let between = below * above * (mean_below - mean_above) * (mean_below - mean_above);
        if between > best.0 {
            best = (between, value);
        }
    }
    best.1 as u8
}
