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
    let (w, h) = (width as usize, height as usize);
    let across = blur_rows(mask, w, &kernel);
    let down = blur_rows(&transposed(&across, w, h), h, &kernel);
    GrayImage::from_raw(width, height, transposed(&down, h, w)).unwrap_or_default()
}

/// Blurs each row of so many pixels.
fn blur_rows(pixels: &[u8], length: usize, kernel: &[u32]) -> Vec<u8> {
    let reach = (kernel.len() / 2) as i64;
    let mut blurred = Vec::with_capacity(pixels.len());
    let (mut padded, mut sums) = (Vec::new(), Vec::new());
    for row in pixels.chunks_exact(length.max(1)) {
        padded.clear();
        let places = -reach..length as i64 + reach;
        padded.extend(places.map(|at| u32::from(row[reflected(at, length as i64)])));
        sums.clear();
        sums.resize(length, 128);
        for (k, weight) in kernel.iter().enumerate() {
            sums.iter_mut().zip(&padded[k..]).for_each(|(sum, value)| *sum += weight * value);
        }
        blurred.extend(sums.iter().map(|sum| (sum >> 8).min(255) as u8));
    }
    blurred
}

/// Columns as rows.
fn transposed(pixels: &[u8], width: usize, height: usize) -> Vec<u8> {
    (0..width).flat_map(|x| (0..height).map(move |y| pixels[y * width + x])).collect()
}

/// The weights of the kernel in 256ths, each rounded with what the ones farther out have lost.
fn kernel(reach: i64, sigma: f64) -> Vec<u32> {
    let weight = |k: i64| (-(k as f64).powi(2) / (2.0 * sigma * sigma)).exp();
    let all: f64 = (-reach..=reach).map(weight).sum();
    let mut lost = 0.0;
    let mut outer = Vec::new();
    for k in -reach..0 {
        let exact = weight(k) / all * 256.0 + lost;
        let rounded = exact.round_ties_even();
        lost = exact - rounded;
        outer.push(rounded as u32);
    }
    let middle = 256 - 2 * outer.iter().sum::<u32>();
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
