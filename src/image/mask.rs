//! Masks computed from image files.

use std::io::Cursor;

use image::{DynamicImage, GrayImage, ImageFormat};

use super::decode::decode;

/// Computes a mask from an image file with `make`, as PNG; `None` if `make` finds none.
pub fn mask(
    file: &[u8],
    max_pixels: usize,
    make: impl FnOnce(&DynamicImage) -> Option<GrayImage>,
) -> Result<Option<Vec<u8>>, String> {
    let Some(mask) = make(&decode(file, max_pixels)?) else { return Ok(None) };
    let mut file = Cursor::new(Vec::new());
    let written = mask.write_to(&mut file, ImageFormat::Png);
    written.map(|()| Some(file.into_inner())).map_err(|error| format!("cannot be used: {error}"))
}

/// White where the image is transparent; `None` if it is nowhere.
pub fn transparency_mask(image: &DynamicImage) -> Option<GrayImage> {
    let rgba = image.color().has_alpha().then(|| image.to_rgba8())?;
    let mut mask = GrayImage::new(rgba.width(), rgba.height());
    for (hole, pixel) in mask.pixels_mut().zip(rgba.pixels()) {
        hole.0[0] = if pixel.0[3] < 128 { 255 } else { 0 };
    }
    mask.pixels().any(|pixel| pixel.0[0] > 0).then_some(mask)
}

/// The inverted image.
pub fn inverted(image: &DynamicImage) -> Option<GrayImage> {
    let mut mask = image.to_luma8();
    image::imageops::invert(&mut mask);
    Some(mask)
}
