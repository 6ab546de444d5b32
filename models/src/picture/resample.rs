//! Resampling along one line: the filter taps of each output value. Antialiased as in Pillow and in
//! torch with antialiasing, or interpolated as in torch without.

use std::ops::Range;

/// A filter: its reach on each side, and its value at a distance.
pub(crate) struct Filter {
    pub(crate) support: f64,
    pub(crate) value: fn(f64) -> f64,
}

pub(crate) const TRIANGLE: Filter = Filter { support: 1.0, value: |x| (1.0 - x.abs()).max(0.0) };
pub(crate) const CUBIC: Filter = Filter { support: 2.0, value: |x| cubic(x, -0.5) };

/// Lanczos' filter of three lobes.
pub(crate) const LANCZOS: Filter = Filter {
    support: 3.0,
    value: |x| if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 },
};

fn sinc(x: f64) -> f64 {
    let x = x * std::f64::consts::PI;
    if x == 0.0 { 1.0 } else { x.sin() / x }
}

/// The weights, of sum 1, of the input values from `first` on that make one output value.
pub(crate) struct Taps {
    pub(crate) first: usize,
    pub(crate) weights: Vec<f64>,
}

/// The taps of a range of a line of `to` values from one of `from` values. When downscaling, the
/// filter is stretched by the scale. Taps beyond an end of the line are dropped.
pub(crate) fn antialiased(
    from: usize,
    to: usize,
    range: Range<usize>,
    filter: &Filter,
) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support * stretch;
    let taps = |i: usize| {
        let center = (i as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let weight = |k: usize| (filter.value)((k as f64 - center + 0.5) / stretch);
        let weights: Vec<f64> = (first..end).map(weight).collect();
        let all: f64 = weights.iter().sum();
        Taps { first, weights: weights.into_iter().map(|weight| weight / all).collect() }
    };
    range.map(taps).collect()
}

/// The same without antialiasing: `reach` values on each side with the filter's `value`, where
/// values beyond an end of the line repeat its last.
pub(crate) fn interpolated(
    from: usize,
    to: usize,
    range: Range<usize>,
    (reach, value): (isize, fn(f64) -> f64),
) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let taps = |i: usize| {
        let at = (i as f64 + 0.5) * scale - 0.5;
        let below = at.floor();
        let last = from as isize - 1;
        let inside = |k: isize| (below as isize + k).clamp(0, last) as usize;
        let (first, end) = (inside(1 - reach), inside(reach));
        let mut weights = vec![0.0; end - first + 1];
        for k in 1 - reach..=reach {
            weights[inside(k) - first] += value(at - below - k as f64);
        }
        Taps { first, weights }
    };
    range.map(taps).collect()
}

/// Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing".
pub(crate) fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}
