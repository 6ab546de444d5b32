//! Masks that are made of another image.

use image::{DynamicImage, GrayImage};

/// White where an image is transparent; none if it is not transparent anywhere.
pub fn transparency_mask(image: &DynamicImage) -> Option<GrayImage> {
    let rgba = image.color().has_alpha().then(|| image.to_rgba8())?;
    let mut mask = GrayImage::new(rgba.width(), rgba.height());
    for (masked, pixel) in mask.pixels_mut().zip(rgba.pixels()) {
        masked.0[0] = if pixel.0[3] < 128 { 255 } else { 0 };
    }
    mask.pixels().any(|pixel| pixel.0[0] > 0).then_some(mask)
}

/// Dark where an image is light.
pub fn inverted(image: &DynamicImage) -> GrayImage {
    let mut mask = image.to_luma8();
    image::imageops::invert(&mut mask);
    mask
}
