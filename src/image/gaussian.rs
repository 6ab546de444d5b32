//! Gaussian blurs of bytes, as the libraries of AUTOMATIC1111 compute them: OpenCV's of masks, and
//! Pillow's of images, which is three box blurs in each direction (Gwosdek et al. 2011).

use image::GrayImage;

/// OpenCV's `GaussianBlur` with a kernel of 2.5 sigma on each side, in rows and then in columns.
pub(super) fn blur_mask(mask: &GrayImage, sigma: f64) -> GrayImage {
    if sigma <= 0.0 {
        return mask.clone();
    }
    let reach = (2.5 * sigma + 0.5) as i64;
    let kernel = kernel(reach, sigma);
    let (width, height) = mask.dimensions();
    let blur = |values: &[u8], length: usize, stride: usize, starts: &[usize]| {
        let mut blurred = vec![0; values.len()];
        for &start in starts {
            for at in 0..length {
                let value = |k: usize| {
                    let at = reflected(at as i64 + k as i64 - reach, length as i64);
                    i64::from(values[start + at * stride])
                };
                let sum: i64 = kernel.iter().enumerate().map(|(k, w)| w * value(k)).sum();
                blurred[start + at * stride] = ((sum + 128) >> 8).clamp(0, 255) as u8;
            }
        }
        blurred
    };
    let (w, h) = (width as usize, height as usize);
    let rows: Vec<usize> = (0..h).map(|y| y * w).collect();
    let columns: Vec<usize> = (0..w).collect();
    let blurred = blur(&blur(mask, w, 1, &rows), h, w, &columns);
    GrayImage::from_raw(width, height, blurred).unwrap_or_default()
}

/// The weights of the kernel in 256ths, each rounded with what the ones farther out have lost.
fn kernel(reach: i64, sigma: f64) -> Vec<i64> {
    let weight = |k: i64| (-(k as f64).powi(2) / (2.0 * sigma * sigma)).exp();
    let all: f64 = (-reach..=reach).map(weight).sum();
    let mut lost = 0.0;
    let mut outer = Vec::new();
    for k in -reach..0 {
        let exact = weight(k) / all * 256.0 + lost;
        let rounded = exact.round_ties_even();
        lost = exact - rounded;
        outer.push(rounded as i64);
    }
    let middle = 256 - 2 * outer.iter().sum::<i64>();
    let inner = outer.iter().rev().copied();
    outer.iter().copied().chain([middle]).chain(inner).collect()
}

/// A place beyond an end, reflected at the last pixel (OpenCV's default border).
fn reflected(at: i64, length: i64) -> usize {
    if length == 1 {
        return 0;
    }
    let period = 2 * (length - 1);
    let at = at.rem_euclid(period);
    at.min(period - at) as usize
}

/// Pillow's `GaussianBlur` of pixels of `C` channels, `width` to a row.
pub(super) fn blur_pixels<const C: usize>(pixels: &mut [[u8; C]], width: usize, radius: f64) {
    const PASSES: usize = 3;
    let height = pixels.len() / width.max(1);
    let radius = box_radius(radius, PASSES as f64);
    if radius <= 0.0 {
        return;
    }
    let mut line = Vec::new();
    for row in pixels.chunks_exact_mut(width) {
        (0..PASSES).for_each(|_| box_blur(row, radius, &mut line));
    }
    let mut column = Vec::new();
    for x in 0..width {
        column.clear();
        column.extend((0..height).map(|y| pixels[y * width + x]));
        (0..PASSES).for_each(|_| box_blur(&mut column, radius, &mut line));
        column.iter().enumerate().for_each(|(y, pixel)| pixels[y * width + x] = *pixel);
    }
}

/// The radius of the boxes that make a Gaussian blur, with a fraction.
fn box_radius(radius: f64, passes: f64) -> f64 {
    let variance = radius * radius / passes;
    let length = (12.0 * variance + 1.0).sqrt();
    let whole = ((length - 1.0) / 2.0).floor();
    let fraction = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
        / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)));
    whole + fraction
}

/// The mean of a box around each pixel, whose last pixels count in part; beyond an end its pixel
/// repeats. In Pillow's fixed point.
fn box_blur<const C: usize>(line: &mut [[u8; C]], radius: f64, sums: &mut Vec<[u64; C]>) {
    const ONE: u64 = 1 << 24;
    let reach = radius as usize;
    let weight = (ONE as f64 / (radius * 2.0 + 1.0)) as u64;
    let far_weight = (ONE - (2 * reach as u64 + 1) * weight) / 2;
    let (first, last) = match line {
        [] => return,
        [first, .., last] => (*first, *last),
        [only] => (*only, *only),
    };
    // The sums of the pixels before each.
    sums.clear();
    sums.push([0; C]);
    for pixel in line.iter() {
        let mut sum = sums.last().copied().unwrap_or([0; C]);
        sum.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += u64::from(*value));
        sums.push(sum);
    }
    let length = line.len();
    let original: Vec<[u8; C]> = line.to_vec();
    let at = |place: i64| original[place.clamp(0, length as i64 - 1) as usize];
    for (x, pixel) in line.iter_mut().enumerate() {
        let (begin, end) = (x.saturating_sub(reach), (x + reach + 1).min(length));
        let before = (reach - (x - begin)) as u64;
        let after = (x + reach + 1 - end) as u64;
        let (left, right) = (at(x as i64 - reach as i64 - 1), at((x + reach + 1) as i64));
        for channel in 0..C {
            let inside = sums[end][channel] - sums[begin][channel];
            let outside = before * u64::from(first[channel]) + after * u64::from(last[channel]);
            let far = u64::from(left[channel]) + u64::from(right[channel]);
            let sum = (inside + outside) * weight + far * far_weight;
            pixel[channel] = ((sum + ONE / 2) / ONE) as u8;
        }
    }
}
