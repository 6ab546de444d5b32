//! Resizes an image into other proportions, by AUTOMATIC1111's resize modes.

use image::imageops::{FilterType, crop_imm, overlay, resize};
use image::{DynamicImage, GenericImageView as _, RgbaImage};

/// How an image fills a size of other proportions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fit {
    /// Its proportions change.
    #[default]
    Stretch,
    /// It is cropped evenly.
    Crop,
    /// Its edges are continued.
    Pad,
}

impl Fit {
    /// The name of AUTOMATIC1111's extension for ControlNets.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Stretch => "Just Resize",
            Self::Crop => "Crop and Resize",
            Self::Pad => "Resize and Fill",
        }
    }
}

/// An image in this size, by a Lanczos filter.
pub(super) fn fitted(image: &DynamicImage, (width, height): (u32, u32), fit: Fit) -> DynamicImage {
    let (w, h) = image.dimensions();
    if (w, h) == (width, height) {
        return image.clone();
    }
    // Whether the image is wider than the size.
    let wider = u64::from(w) * u64::from(height) > u64::from(h) * u64::from(width);
    let (inner_width, inner_height) = match (fit, wider) {
        (Fit::Stretch, _) => return resized(image, (width, height)),
        // Cropped first: what is cut off takes no memory.
        (Fit::Crop, _) => return resized(&cropped(image, (width, height)), (width, height)),
        (Fit::Pad, true) => (width, scaled(h, width, w)),
        (Fit::Pad, false) => (scaled(w, height, h), height),
    };
    let inner = resized(image, (inner_width, inner_height)).into_rgba8();
    let mut outer = RgbaImage::new(width, height);
    let (left, top) = (half(width, inner_width), half(height, inner_height));
    overlay(&mut outer, &inner, left, top);
    pad(&mut outer, &inner, (left, top));
    match image.color().has_alpha() {
        true => outer.into(),
        false => DynamicImage::from(outer).into_rgb8().into(),
    }
}

/// The middle of an image that has the proportions of this size.
fn cropped(image: &DynamicImage, (width, height): (u32, u32)) -> DynamicImage {
    let (w, h) = image.dimensions();
    let part = (scaled(h, width, height).min(w), scaled(w, height, width).min(h));
    image.crop_imm((w - part.0) / 2, (h - part.1) / 2, part.0, part.1)
}

/// `side * by / of`, a side again.
fn scaled(side: u32, by: u32, of: u32) -> u32 {
    u32::try_from(u64::from(side) * u64::from(by) / u64::from(of)).unwrap_or(side).max(1)
}

/// An image in this size. The side that shrinks more is resized first, so that what is between the
/// two takes no more memory than the image or the result.
fn resized(image: &DynamicImage, (width, height): (u32, u32)) -> DynamicImage {
    let (w, h) = image.dimensions();
    let rows_first = u64::from(w) * u64::from(height) <= u64::from(width) * u64::from(h);
    if rows_first || w == width {
        return image.resize_exact(width, height, FilterType::Lanczos3);
    }
    let narrow = image.resize_exact(width, h, FilterType::Lanczos3);
    narrow.resize_exact(width, height, FilterType::Lanczos3)
}

/// The place of something of a length in the middle of a side.
fn half(side: u32, length: u32) -> i64 {
    i64::from(side / 2) - i64::from(length / 2)
}

/// Continues the first and last line or column of `inner`, which is at (left, top).
fn pad(outer: &mut RgbaImage, inner: &RgbaImage, (left, top): (i64, i64)) {
    let (width, height) = outer.dimensions();
    let (w, h) = inner.dimensions();
    let mut fill = |line: (u32, u32, u32, u32), area: (u32, u32), at: (i64, i64)| {
        if area.0 > 0 && area.1 > 0 {
            let line = crop_imm(inner, line.0, line.1, line.2, line.3).to_image();
            overlay(outer, &resize(&line, area.0, area.1, FilterType::Nearest), at.0, at.1);
        }
    };
    let (left_space, top_space) = (left.max(0) as u32, top.max(0) as u32);
    let bottom = height.saturating_sub(top_space + h);
    let right = width.saturating_sub(left_space + w);
    fill((0, 0, w, 1), (width, top_space), (0, 0));
    fill((0, h - 1, w, 1), (width, bottom), (0, top + i64::from(h)));
    fill((0, 0, 1, h), (left_space, height), (0, 0));
    fill((w - 1, 0, 1, h), (right, height), (left + i64::from(w), 0));
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn an_image_fills_other_proportions() {
        // Four columns of eight pixels.
        let column = |x: u32, _| Rgb([[10, 90, 170, 250][x as usize / 8], 0, 0]);
        let image = DynamicImage::from(image::RgbImage::from_fn(32, 16, column));
        let line = |size, fit, y| -> Vec<u8> {
            let fitted = fitted(&image, size, fit).into_rgb8();
            assert_eq!(fitted.dimensions(), size);
            (0..4).map(|k| fitted.get_pixel(size.0 / 8 + k * size.0 / 4, y).0[0]).collect()
        };
        let alike = |found: Vec<u8>, expected: [u8; 4]| {
            let near = found.iter().zip(expected).all(|(a, b)| a.abs_diff(b) < 4);
            assert!(near, "{found:?}, not {expected:?}");
        };
        alike(line((16, 16), Fit::Stretch, 8), [10, 90, 170, 250]);
        alike(line((16, 16), Fit::Crop, 8), [90, 90, 170, 170]);
        // Above and below eight lines of the image its edges go on.
        for y in [0, 3, 8, 15] {
            alike(line((16, 16), Fit::Pad, y), [10, 90, 170, 250]);
        }
        // Each of these would take gigabytes in the other order.
        for (sides, size) in
            [((32768, 1), (8, 65536)), ((1, 32768), (65536, 8)), ((32768, 8), (512, 512))]
        {
            let thin = DynamicImage::new_rgb8(sides.0, sides.1);
            for fit in [Fit::Stretch, Fit::Crop, Fit::Pad] {
                assert_eq!(super::fitted(&thin, size, fit).dimensions(), size);
            }
        }
        alike(line((64, 16), Fit::Pad, 8), [10, 90, 250, 250]);
    }
}
