//! Pixels to PNG, JPEG or WebP, with the parameters of the picture in the file; and pictures that
//! came in to pixels. Not for the model thread, but for what it must not let out (`blurred`), and not
//! for async threads: both take milliseconds of a whole core.

mod hashes;
pub(crate) mod infotext;

use std::io::Cursor;

use anyhow::Context as _;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::imageops::FilterType;
use image::{
    DynamicImage, ExtendedColorType, GrayImage, ImageDecoder as _, ImageEncoder, ImageFormat,
    ImageReader, Limits, RgbImage,
};
use sd_models::{Hires, Rgb, Size, Spec};

pub use hashes::Hashes;

/// What AUTOMATIC1111 calls the list of LoRAs with their hashes.
pub(crate) const LORA_HASHES: &str = "Lora hashes";

/// Visually lossless at a quarter of PNG's size.
pub const JPEG_QUALITY: u8 = 92;

/// An image file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lossless.
    Png,
    /// Lossy and small.
    Jpeg,
    /// Lossless WebP.
    Webp,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::Png, Self::Jpeg, Self::Webp];

    /// The name in requests and of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::Webp => "webp",
        }
    }

    /// The media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name.to_ascii_lowercase().as_str() {
            "png" => Ok(Self::Png),
            "jpeg" | "jpg" => Ok(Self::Jpeg),
            "webp" => Ok(Self::Webp),
            _ => Err(format!("unknown format {name:?}; known are png, jpeg, webp")),
        }
    }
}

/// The parameters of a picture in the form that AUTOMATIC1111 writes and many tools read; `loras`
/// are those of [`Hashes::of`].
pub fn infotext(spec: &Spec, model: &str, loras: &str) -> String {
    // A zero byte would end the text inside the file.
    let clean = |text: &str| text.replace('\0', "");
    let mut text = clean(&spec.prompt);
    // As a prompt would name them that is pasted into AUTOMATIC1111.
    for (name, scale) in &spec.loras {
        text += &clean(&format!(" <lora:{name}:{scale}>"));
    }
    if !spec.negative_prompt.is_empty() {
        text += &format!("\nNegative prompt: {}", clean(&spec.negative_prompt));
    }
    let strength = spec.strength().map(|strength| format!("Denoising strength: {strength}, "));
    let hires = spec.hires.iter().flat_map(|hires| hires_parameters(spec, hires));
    let hires: String = hires.map(|(name, value)| format!("{name}: {value}, ")).collect();
    let loras = match loras {
        "" => String::new(),
        loras => format!("{LORA_HASHES}: \"{loras}\", "),
    };
    text += &format!(
        "\nSteps: {}, Sampler: {}, CFG scale: {}, Seed: {}, Size: {}, Model: {model}, {}{hires}{loras}\
         Version: sd-server {}",
        spec.steps,
        spec.scheduler.title(),
        spec.guidance_scale,
        spec.seed,
        spec.size,
        strength.unwrap_or_default(),
        env!("CARGO_PKG_VERSION"),
    );
    text
}

/// What AUTOMATIC1111 calls the parameters of a second pass.
pub(crate) fn hires_parameters(spec: &Spec, hires: &Hires) -> Vec<(&'static str, String)> {
    let (width, height) = (hires.size.width(), hires.size.height());
    let (w, h) = (spec.size.width(), spec.size.height());
    let enlarged = match width * h == height * w {
        true => ("Hires upscale", (width as f64 / w as f64).to_string()),
        false => ("Hires resize", hires.size.to_string()),
    };
    let rest = [
        // Those that are taken, as there.
        ("Hires steps", (hires.steps - hires.skipped_steps()).to_string()),
        ("Hires upscaler", hires.upscaler.title().to_owned()),
    ];
    std::iter::once(enlarged).chain(rest).collect()
}

/// A picture out of a PNG, JPEG, WebP, GIF (its first frame) or BMP file, turned as its EXIF
/// orientation says. The error is what comes after "the picture".
pub fn decode(file: &[u8], max_pixels: usize) -> Result<DynamicImage, String> {
    /// Of a pixel of four channels of 16 bits; a decoder may hold a second copy.
    const PIXEL_BYTES: u64 = 2 * 8;
    let unreadable = |error: image::ImageError| format!("cannot be read: {error}");
    let reader = ImageReader::new(Cursor::new(file));
    let mut reader = reader.with_guessed_format().map_err(|e| format!("cannot be read: {e}"))?;
    if reader.format().is_none() {
        return Err("is in no known format; send PNG, JPEG, WebP, GIF or BMP".into());
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some((max_pixels as u64).saturating_mul(PIXEL_BYTES).max(1 << 20));
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(unreadable)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > max_pixels as u64 {
        return Err(format!("is {width}x{height}; at most {max_pixels} pixels are read"));
    }
    let orientation = decoder.orientation().map_err(unreadable)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(unreadable)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// The pixels of a picture in a size, by Lanczos' filter where it has another one. Transparency is
/// passed over, as diffusers does.
pub fn fit(image: &DynamicImage, size: Size) -> Rgb {
    let (width, height) = (size.width(), size.height());
    Rgb { width, height, data: resized(image, size).into_rgb8().into_raw() }
}

/// The mask (a byte for each pixel) that a picture of light and dark stands for.
pub fn fit_mask(image: &DynamicImage, size: Size) -> Vec<u8> {
    resized(&DynamicImage::ImageLuma8(image.to_luma8()), size).into_luma8().into_raw()
}

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
pub fn holes(image: &DynamicImage) -> Option<GrayImage> {
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

/// A picture of which only the colours can be told: what is smaller than an eighth of its shorter
/// side is gone, not hidden.
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

fn resized(image: &DynamicImage, size: Size) -> DynamicImage {
    let (width, height) = (size.width() as u32, size.height() as u32);
    if (image.width(), image.height()) == (width, height) {
        return image.clone();
    }
    image.resize_exact(width, height, FilterType::Lanczos3)
}

/// Encodes a picture with its infotext: a text chunk in PNG, EXIF in JPEG and WebP. The quality,
/// up to 100, is JPEG's.
pub fn encode(rgb: &Rgb, format: Format, quality: u8, infotext: &str) -> anyhow::Result<Vec<u8>> {
    let width = u32::try_from(rgb.width).context("width")?;
    let height = u32::try_from(rgb.height).context("height")?;
    let mut file = Cursor::new(Vec::new());
    match format {
        Format::Png => png(&mut file, rgb, (width, height), infotext)?,
        Format::Jpeg => {
            let mut encoder = JpegEncoder::new_with_quality(&mut file, quality);
            encoder.set_exif_metadata(exif(infotext))?;
            encoder.write_image(&rgb.data, width, height, ExtendedColorType::Rgb8)?;
        }
        Format::Webp => {
            let mut encoder = WebPEncoder::new_lossless(&mut file);
            encoder.set_exif_metadata(exif(infotext))?;
            encoder.write_image(&rgb.data, width, height, ExtendedColorType::Rgb8)?;
        }
    }
    Ok(file.into_inner())
}

/// PNG's plain text chunk holds Latin-1 only; the international one holds the rest.
fn png(
    file: &mut Cursor<Vec<u8>>,
    rgb: &Rgb,
    (width, height): (u32, u32),
    infotext: &str,
) -> anyhow::Result<()> {
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    if infotext.chars().all(|c| u32::from(c) < 256) {
        encoder.add_text_chunk("parameters".into(), infotext.into())?;
    } else {
        encoder.add_itxt_chunk("parameters".into(), infotext.into())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&rgb.data)?;
    writer.finish()?;
    Ok(())
}

/// The smallest EXIF block with a UserComment, in UTF-16 as AUTOMATIC1111 writes it: a TIFF header,
/// a directory that points to the EXIF directory, and that one with its single entry.
fn exif(comment: &str) -> Vec<u8> {
    const EXIF_DIRECTORY: u16 = 0x8769;
    const USER_COMMENT: u16 = 0x9286;
    const LONG: u16 = 4;
    const UNDEFINED: u16 = 7;
    const FIRST: u32 = 8;
    const SECOND: u32 = FIRST + 18;
    const DATA: u32 = SECOND + 18;
    // A JPEG segment ends at 64 KiB; a prompt that long loses its tail here.
    const MAX_UNITS: usize = 32_000;
    let mut data = b"UNICODE\0".to_vec();
    data.extend(comment.encode_utf16().take(MAX_UNITS).flat_map(u16::to_be_bytes));

    let mut block = b"MM\0\x2a".to_vec();
    block.extend(FIRST.to_be_bytes());
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let entries = [(EXIF_DIRECTORY, LONG, 1, SECOND), (USER_COMMENT, UNDEFINED, length, DATA)];
    for (tag, kind, count, value) in entries {
        block.extend(1_u16.to_be_bytes());
        block.extend(tag.to_be_bytes());
        block.extend(kind.to_be_bytes());
        block.extend(count.to_be_bytes());
        block.extend(value.to_be_bytes());
        block.extend(0_u32.to_be_bytes());
    }
    block.extend(data);
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_blurred_is_gone() {
        for (width, height) in [(64, 64), (8, 24), (131, 70), (1024, 8), (1, 3)] {
            // Lines two pixels wide on the left, the same in the mean on the right.
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
