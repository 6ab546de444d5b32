//! Blurs images that must not be recognisable.

use image::RgbImage;
use image::imageops::FilterType;
use sd_models::Rgb;

/// Blurs an image until only colours remain: details smaller than an eighth of its shorter side are
/// removed.
pub fn blurred(rgb: &Rgb) -> Rgb {
    const PIECES: usize = 8;
    let (width, height) = (rgb.width, rgb.height);
    let piece = (width.min(height) / PIECES).max(1);
    let (across, down) = (width.div_ceil(piece), height.div_ceil(piece));
    let mut means = vec![[0_u8; 3]; across * down];
    for (place, mean) in means.iter_mut().enumerate() {
        let (left, top) = (place % across * piece, place / across * piece);
        let (right, bottom) = ((left + piece).min(width), (top + piece).min(height));
        let pixels = (bottom - top) * (right - left);
        let bytes = |channel| {
            let row = move |y: usize| (left..right).map(move |x| 3 * (y * width + x) + channel);
            (top..bottom).flat_map(row).map(|i| u64::from(rgb.data[i]))
        };
        *mean = [0, 1, 2].map(|channel| (bytes(channel).sum::<u64>() / pixels as u64) as u8);
    }
    let small = RgbImage::from_raw(across as u32, down as u32, means.concat());
    let large = small.map(|small| {
        image::imageops::resize(&small, width as u32, height as u32, FilterType::Triangle)
    });
    Rgb { width, height, data: large.unwrap_or_default().into_raw() }
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
