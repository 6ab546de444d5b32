//! Masks that are made of a picture's file.

use std::io::Cursor;

use image::{DynamicImage, GrayImage, ImageFormat};

use super::decode::decode;

/// A mask that is made of a picture's file, as PNG, if `make` finds one in it.
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

/// White where a picture is transparent; nothing where it is not.
pub fn transparency_mask(image: &DynamicImage) -> Option<GrayImage> {
    let rgba = image.color().has_alpha().then(|| image.to_rgba8())?;
    let mut mask = GrayImage::new(rgba.width(), rgba.height());
    for (hole, pixel) in mask.pixels_mut().zip(rgba.pixels()) {
        hole.0[0] = if pixel.0[3] < 128 { 255 } else { 0 };
    }
    mask.pixels().any(|pixel| pixel.0[0] > 0).then_some(mask)
}

/// Dark where a picture is light.
pub fn inverted(image: &DynamicImage) -> Option<GrayImage> {
    let mut mask = image.to_luma8();
    image::imageops::invert(&mut mask);
    Some(mask)
}
