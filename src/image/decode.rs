//! Decodes input images.

use std::fmt;
use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageReader, Limits, Rgba};
use sd_models::{Rgb, Size};

use super::fit::{Fit, fitted};

/// Maximum side of an input image, in pixels: no filter is made for longer lines.
const MAX_SIDE: u32 = 1 << 15;

/// Decodes a PNG, JPEG, WebP, GIF (first frame) or BMP file and applies its EXIF orientation. The
/// error message is the predicate of a sentence whose subject is the field.
pub fn decode(file: &[u8], max_pixels: usize) -> Result<DynamicImage, String> {
    let mut decoder = open(file, max_pixels)?;
    let orientation = decoder.orientation().map_err(|error| unreadable(&error))?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(|error| unreadable(&error))?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Memory that decoding a file takes, in bytes, from its header: the pixels, and as much again for
/// a second copy in a decoder, a rotation or a change of format or size.
pub fn decoded_bytes(file: &[u8], max_pixels: usize) -> Result<usize, String> {
    let bytes = open(file, max_pixels)?.total_bytes().saturating_mul(2);
    Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
}

/// Width and height of a file, from its header.
pub fn dimensions(file: &[u8], max_pixels: usize) -> Result<(u32, u32), String> {
    Ok(open(file, max_pixels)?.dimensions())
}

/// Reads the header of a file, and rejects more pixels than `max_pixels`.
fn open(file: &[u8], max_pixels: usize) -> Result<impl ImageDecoder, String> {
    /// Bytes of a pixel of four 16-bit channels; a decoder may hold a second copy.
    const PIXEL_BYTES: u64 = 2 * 8;
    let reader = ImageReader::new(Cursor::new(file));
    let mut reader = reader.with_guessed_format().map_err(|error| unreadable(&error))?;
    if reader.format().is_none() {
        return Err("is in no known format; send PNG, JPEG, WebP, GIF or BMP".into());
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some((max_pixels as u64).saturating_mul(PIXEL_BYTES).max(1 << 20));
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|error| unreadable(&error))?;
    let (width, height) = decoder.dimensions();
    if width.max(height) > MAX_SIDE {
        return Err(format!("is {width}x{height}; at most {MAX_SIDE} pixels a side are read"));
    }
    if u64::from(width) * u64::from(height) > max_pixels as u64 {
        return Err(format!("is {width}x{height}; at most {max_pixels} pixels are read"));
    }
    Ok(decoder)
}

fn unreadable(error: &dyn fmt::Display) -> String {
    format!("cannot be read: {error}")
}

/// Whether an image is transparent anywhere, even a little.
pub fn is_transparent(image: &DynamicImage) -> bool {
    image.color().has_alpha() && image.to_rgba8().pixels().any(|pixel| pixel.0[3] < u8::MAX)
}

/// An image before a white background.
pub fn on_white(image: DynamicImage) -> DynamicImage {
    if !image.color().has_alpha() {
        return image;
    }
    let mut image = image.into_rgba8();
    for Rgba([red, green, blue, alpha]) in image.pixels_mut() {
        let opacity = u16::from(*alpha);
        for channel in [red, green, blue] {
            let blended = u16::from(*channel) * opacity + 255 * (255 - opacity);
            *channel = ((blended + 127) / 255) as u8;
        }
        *alpha = u8::MAX;
    }
    image.into()
}

/// The RGB pixels of an image, resized by a Lanczos filter if necessary. Transparency is ignored,
/// as in diffusers.
pub fn resize_to(image: &DynamicImage, size: Size, fit: Fit) -> Rgb {
    let (width, height) = (size.width(), size.height());
    let data = fitted(image, (width as u32, height as u32), fit).into_rgb8().into_raw();
    Rgb { width, height, data }
}

/// The mask of a grayscale image: one byte per pixel.
pub fn fit_mask(image: &DynamicImage, size: Size, fit: Fit) -> Vec<u8> {
    let sides = (size.width() as u32, size.height() as u32);
    fitted(&DynamicImage::ImageLuma8(image.to_luma8()), sides, fit).into_luma8().into_raw()
}
