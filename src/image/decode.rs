//! Decodes input images.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, Rgba};
use sd_models::{Rgb, Size};

use super::fit::{Fit, fitted};

/// Maximum side of an input image, in pixels: no filter is made for longer lines.
const MAX_SIDE: u32 = 1 << 15;

const UNKNOWN: &str = "is in no known format; send PNG, JPEG, WebP, GIF or BMP";

/// Decodes a PNG, JPEG, WebP, GIF (first frame) or BMP file and applies its EXIF orientation. The
/// error message is the predicate of a sentence whose subject is the field.
pub fn decode(file: &[u8], max_pixels: usize) -> Result<DynamicImage, String> {
    let (mut decoder, name) = open(file, max_pixels)?;
    // The decoder takes what is missing of a JPEG for grey.
    if name == "JPEG" && !is_whole_jpeg(file) {
        return Err(damaged(name));
    }
    let orientation = decoder.orientation().map_err(|error| unreadable(name, &error))?;
    let image = DynamicImage::from_decoder(decoder);
    let mut image = image.map_err(|error| unreadable(name, &error))?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Memory that decoding a file takes, in bytes, from its header: the pixels, and as much again for
/// a second copy in a decoder, a rotation or a change of format or size.
pub fn decoded_bytes(file: &[u8], max_pixels: usize) -> Result<usize, String> {
    let bytes = open(file, max_pixels)?.0.total_bytes().saturating_mul(2);
    Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
}

/// Width and height of a file, from its header.
pub fn dimensions(file: &[u8], max_pixels: usize) -> Result<(u32, u32), String> {
    Ok(open(file, max_pixels)?.0.dimensions())
}

/// Reads the header of a file, and rejects more pixels than `max_pixels`. Returns its format, too.
fn open(file: &[u8], max_pixels: usize) -> Result<(impl ImageDecoder, &'static str), String> {
    /// Bytes of a pixel of four 16-bit channels; a decoder may hold a second copy.
    const PIXEL_BYTES: u64 = 2 * 8;
    let reader = ImageReader::new(Cursor::new(file));
    let mut reader = reader.with_guessed_format().map_err(|_| UNKNOWN)?;
    let name = format(file, reader.format())?;
    let mut limits = Limits::default();
    limits.max_alloc = Some((max_pixels as u64).saturating_mul(PIXEL_BYTES).max(1 << 20));
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|error| unreadable(name, &error))?;
    let (width, height) = decoder.dimensions();
    if width.max(height) > MAX_SIDE {
        return Err(format!("is {width}x{height}; at most {MAX_SIDE} pixels a side are read"));
    }
    if u64::from(width) * u64::from(height) > max_pixels as u64 {
        return Err(format!("is {width}x{height}; at most {max_pixels} pixels are read"));
    }
    Ok((decoder, name))
}

/// The name of a file's format, if files of it are read.
pub(super) fn format(file: &[u8], guessed: Option<ImageFormat>) -> Result<&'static str, String> {
    let other = match guessed {
        Some(ImageFormat::Png) => return Ok("PNG"),
        Some(ImageFormat::Jpeg) => return Ok("JPEG"),
        Some(ImageFormat::WebP) => return Ok("WebP"),
        Some(ImageFormat::Gif) => return Ok("GIF"),
        Some(ImageFormat::Bmp) => return Ok("BMP"),
        Some(ImageFormat::Tiff) => "a TIFF file",
        Some(ImageFormat::Ico) => "an ICO file",
        Some(ImageFormat::Avif) => "an AVIF file",
        Some(ImageFormat::Tga) => "a TGA file",
        Some(ImageFormat::Dds) => "a DDS file",
        Some(ImageFormat::Pnm) => "a PNM file",
        Some(ImageFormat::Hdr) => "an HDR file",
        Some(ImageFormat::OpenExr) => "an OpenEXR file",
        Some(ImageFormat::Qoi) => "a QOI file",
        Some(ImageFormat::Farbfeld) => "a farbfeld file",
        _ if file.get(4..8) == Some(b"ftyp") => "a HEIC, AVIF or video file",
        _ => return Err(UNKNOWN.into()),
    };
    Err(format!("is {other}; send PNG, JPEG, WebP, GIF or BMP"))
}

/// Whether a JPEG file has an end: the marker EOI behind a scan. Markers in segments, such as those
/// of a thumbnail, are none of its own. ITU T.81, B.1.
fn is_whole_jpeg(file: &[u8]) -> bool {
    const END: u8 = 0xd9;
    const SCAN: u8 = 0xda;
    let (mut at, mut scanned) = (2, false);
    loop {
        // What is before a marker are the numbers of a scan; in them 0xff is followed by 0.
        let rest = file.get(at..).unwrap_or_default();
        let Some(begin) = rest
            .windows(2)
            .position(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff | 0x01 | 0xd0..=0xd8))
        else {
            return false;
        };
        match rest[begin + 1] {
            END => return scanned,
            kind => scanned |= kind == SCAN,
        }
        let length = rest.get(begin + 2..begin + 4).map(|pair| [pair[0], pair[1]]);
        let Some(length) = length.map(u16::from_be_bytes) else { return false };
        at += begin + 2 + usize::from(length).max(2);
    }
}

pub(super) fn damaged(format: &str) -> String {
    format!("is a {format} file that is damaged or cut short")
}

/// Why a decoder refuses a file.
pub(super) fn unreadable(format: &str, error: &ImageError) -> String {
    match error {
        ImageError::Unsupported(_) => format!("is a {format} file of a kind that is not read"),
        ImageError::Limits(_) => format!("is a {format} file that takes too much memory to read"),
        _ => damaged(format),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn file(format: ImageFormat) -> Vec<u8> {
        let pixels = (0..64 * 64 * 3_u32).map(|k| (k * k % 251) as u8).collect();
        let image = image::RgbImage::from_raw(64, 64, pixels).map(DynamicImage::from);
        let mut file = Cursor::new(Vec::new());
        image.expect("a picture").write_to(&mut file, format).expect("a file");
        file.into_inner()
    }

    #[test]
    fn files_that_are_cut_short_are_refused_in_a_sentence() {
        for (format, name) in [
            (ImageFormat::Png, "PNG"),
            (ImageFormat::Jpeg, "JPEG"),
            (ImageFormat::WebP, "WebP"),
            (ImageFormat::Bmp, "BMP"),
        ] {
            let file = file(format);
            assert!(decode(&file, 1 << 20).is_ok(), "{name}");
            for part in [file.len() / 3, file.len() / 2, file.len() - file.len() / 10] {
                let expected = Err(format!("is a {name} file that is damaged or cut short"));
                assert_eq!(decode(&file[..part], 1 << 20).map(drop), expected, "{part}");
            }
        }
        // Cameras put more behind the end of a JPEG.
        let more = [file(ImageFormat::Jpeg), b"more".to_vec()].concat();
        assert!(decode(&more, 1 << 20).is_ok());
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        let table: [(&[u8], &str); 4] = [
            (b"II*\0\x08\0\0\0\0\0\0\0", "is a TIFF file; "),
            (b"\0\0\x01\0\x01\0\0\0\0\0\0\0", "is an ICO file; "),
            (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC, AVIF or video file; "),
            (b"hello, world, how are you", "is in no known format; "),
        ];
        for (file, expected) in table {
            let expected = Err(format!("{expected}send PNG, JPEG, WebP, GIF or BMP"));
            assert_eq!(decode(file, 1 << 20).map(drop), expected);
        }
    }
}
