//! Blurs images that must not be recognisable.

use image::ImageBuffer;
use image::imageops::{FilterType, resize, thumbnail};
use sd_models::Rgb;

/// Blurs an image until only colours remain: details smaller than an eighth of its shorter side are
/// removed.
pub fn blurred(rgb: &Rgb) -> Rgb {
    const PIECES: u32 = 8;
    let (width, height) = (rgb.width as u32, rgb.height as u32);
    let piece = (width.min(height) / PIECES).max(1);
    let large = ImageBuffer::<image::Rgb<u8>, _>::from_raw(width, height, &rgb.data[..]);
    let blurred = large.map(|large| {
        let means = thumbnail(&large, width.div_ceil(piece), height.div_ceil(piece));
        resize(&means, width, height, FilterType::Triangle)
    });
    Rgb { width: rgb.width, height: rgb.height, data: blurred.unwrap_or_default().into_raw() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_removed() {
        for (width, height) in [(64, 64), (8, 24), (131, 70), (1024, 8), (1, 3)] {
            // Lines two pixels wide on the left, their mean on the right.
            let byte = |i: usize| {
                let (x, channel) = (i / 3 % width, i % 3);
                let line = if x < width / 2 { 100 + 100 * (x / 2 % 2) } else { 150 };
                [line, 7, 250][channel] as u8
            };
            let data: Vec<u8> = (0..3 * width * height).map(byte).collect();
            let blurred = blurred(&Rgb { width, height, data });
            assert_eq!(blurred.data.len(), 3 * width * height);
            for pixel in blurred.data.chunks(3) {
                assert_eq!(pixel[1..], [7, 250], "{width}x{height}");
                let seen = width.min(height) < 32 || pixel[0].abs_diff(150) <= 30;
                assert!(seen, "{width}x{height}: {}", pixel[0]);
            }
        }
    }
}
