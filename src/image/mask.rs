//! Masks that are made of another image.

use image::{DynamicImage, GrayImage, Luma, Rgba};

/// White where an image is transparent; none if it is not transparent anywhere.
pub fn transparency_mask(image: &DynamicImage) -> Option<GrayImage> {
    let rgba = image.color().has_alpha().then(|| image.to_rgba8())?;
    let mut mask = GrayImage::new(rgba.width(), rgba.height());
    for (masked, pixel) in mask.pixels_mut().zip(rgba.pixels()) {
        masked.0[0] = if pixel.0[3] < 128 { 255 } else { 0 };
    }
    mask.pixels().any(|pixel| pixel.0[0] > 0).then_some(mask)
}

/// A mask whose own transparency is the mask, where it has any: white where it is opaque, as in
/// AUTOMATIC1111.
pub fn opaque_mask(mask: DynamicImage) -> DynamicImage {
    let is_transparent = |pixel: &Rgba<u8>| pixel.0[3] < u8::MAX;
    let Some(rgba) = mask.color().has_alpha().then(|| mask.to_rgba8()) else { return mask };
    if !rgba.pixels().any(is_transparent) {
        return mask;
    }
    let value = |x, y| Luma([if rgba.get_pixel(x, y).0[3] > 128 { 255 } else { 0 }]);
    GrayImage::from_fn(rgba.width(), rgba.height(), value).into()
}

/// Dark where an image is light.
pub fn inverted(image: &DynamicImage) -> GrayImage {
    let mut mask = image.to_luma8();
    image::imageops::invert(&mut mask);
    mask
}
