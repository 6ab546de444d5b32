//! Resampling along one line: which values of the input make one of the output, and by how much. In
//! Pillow's way, which is torch's with antialiasing, and in torch's way without.

use std::ops::Range;

/// How far a filter reaches, and its value there.
pub(crate) struct Filter {
    pub(crate) support: f64,
    pub(crate) value: fn(f64) -> f64,
}

pub(crate) const TRIANGLE: Filter = Filter { support: 1.0, value: |x| (1.0 - x.abs()).max(0.0) };
pub(crate) const CUBIC: Filter = Filter { support: 2.0, value: |x| cubic(x, -0.5) };

/// The values from `first` on that make one of the output, and their weights, of sum 1.
pub(crate) struct Taps {
    pub(crate) first: usize,
    pub(crate) weights: Vec<f64>,
}

/// The windows of a range of a line of `to` values in one of `from`: the filter is as wide as a
/// value of the output where that is the wider one, and ends with the line.
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

/// The same without antialiasing: the values around a point, of which those beyond an end of the
/// line are that end: so many on each side, with a filter's values.
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
