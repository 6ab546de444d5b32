//! Encodes images as PNG, JPEG or WebP.

use std::io::Cursor;

use anyhow::Context as _;
use exif::experimental::Writer;
use exif::{Field, In, Tag, Value};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder};
use sd_models::Rgb;

/// Quality of JPEG: visually lossless at a quarter of PNG's size.
const JPEG_QUALITY: u8 = 92;

/// An image file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lossless.
    Png,
    /// Lossy and small.
    Jpeg,
    /// Lossless unless a quality is asked for.
    Webp,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 3] = [Self::Png, Self::Jpeg, Self::Webp];

    /// The name in requests, and the file extension.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::Webp => "webp",
        }
    }

    /// Maximum side of an image, in pixels: 31 bits in PNG, 16 in JPEG, and in WebP what libwebp
    /// reads.
    pub fn max_side(self) -> usize {
        match self {
            Self::Png => i32::MAX as usize,
            Self::Jpeg => 65_535,
            Self::Webp => 16_383,
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
            _ => Err(format!("{name:?} is unknown; known are png, jpeg, webp")),
        }
    }
}

/// Encodes an image with its infotext: a text chunk in PNG, EXIF in JPEG and WebP. `quality`, 1 to
/// 100, is for JPEG and WebP; without one that of JPEG is 92 and WebP is lossless.
pub fn encode(
    rgb: &Rgb,
    format: Format,
    quality: Option<u8>,
    infotext: &str,
) -> anyhow::Result<Vec<u8>> {
    let width = u32::try_from(rgb.width).context("width")?;
    let height = u32::try_from(rgb.height).context("height")?;
    let mut file = Cursor::new(Vec::new());
    match (format, quality) {
        (Format::Png, _) => png(&mut file, rgb, (width, height), &[("parameters", infotext)])?,
        (Format::Jpeg, quality) => {
            let quality = quality.unwrap_or(JPEG_QUALITY);
            let mut encoder = JpegEncoder::new_with_quality(&mut file, quality);
            encoder.set_exif_metadata(exif(infotext)?)?;
            encoder.write_image(&rgb.data, width, height, ExtendedColorType::Rgb8)?;
        }
        (Format::Webp, Some(quality)) => {
            let encoder = webp::Encoder::from_rgb(&rgb.data, width, height);
            let encoded = encoder.encode_simple(false, quality.into());
            let encoded = encoded.map_err(|error| anyhow::anyhow!("WebP: {error:?}"))?;
            return with_exif(&encoded, &exif(infotext)?, (width, height));
        }
        (Format::Webp, None) => {
            let mut encoder = WebPEncoder::new_lossless(&mut file);
            encoder.set_exif_metadata(exif(infotext)?)?;
            encoder.write_image(&rgb.data, width, height, ExtendedColorType::Rgb8)?;
        }
    }
    Ok(file.into_inner())
}

/// Encodes an image as PNG with texts by their keywords.
pub(crate) fn encode_png(rgb: &Rgb, texts: &[(&str, &str)]) -> anyhow::Result<Vec<u8>> {
    let width = u32::try_from(rgb.width).context("width")?;
    let height = u32::try_from(rgb.height).context("height")?;
    let mut file = Cursor::new(Vec::new());
    png(&mut file, rgb, (width, height), texts)?;
    Ok(file.into_inner())
}

/// A WebP file with EXIF out of one without. The extended format begins with the sides and with what
/// there is (<https://developers.google.com/speed/webp/docs/riff_container>).
fn with_exif(simple: &[u8], exif: &[u8], (width, height): (u32, u32)) -> anyhow::Result<Vec<u8>> {
    /// Length of `RIFF`, the length of the rest, and `WEBP`.
    const HEADER: usize = 12;
    /// The flag of EXIF.
    const HAS_EXIF: u32 = 1 << 3;
    let picture = simple.get(HEADER..).context("WebP without a header")?;
    let mut file = b"RIFF\0\0\0\0WEBP".to_vec();
    let add = |file: &mut Vec<u8>, name: &[u8; 4], data: &[u8]| {
        file.extend_from_slice(name);
        file.extend((data.len() as u32).to_le_bytes());
        file.extend_from_slice(data);
        // Parts have even lengths.
        file.extend(&[0][..data.len() % 2]);
    };
    let side = |side: u32| side.saturating_sub(1).to_le_bytes();
    let described = [&HAS_EXIF.to_le_bytes()[..], &side(width)[..3], &side(height)[..3]].concat();
    add(&mut file, b"VP8X", &described);
    file.extend_from_slice(picture);
    add(&mut file, b"EXIF", exif);
    let length = (file.len() - 8) as u32;
    file[4..8].copy_from_slice(&length.to_le_bytes());
    Ok(file)
}

/// PNG's plain text chunk (tEXt) holds Latin-1 only; the international one (iTXt) holds the rest.
fn png(
    file: &mut Cursor<Vec<u8>>,
    rgb: &Rgb,
    (width, height): (u32, u32),
    texts: &[(&str, &str)],
) -> anyhow::Result<()> {
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in texts.iter().map(|(keyword, text)| (keyword.to_string(), *text)) {
        if text.chars().all(|c| u32::from(c) < 256) {
            encoder.add_text_chunk(keyword, text.into())?;
        } else {
            encoder.add_itxt_chunk(keyword, text.into())?;
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&rgb.data)?;
    writer.finish()?;
    Ok(())
}

/// The smallest EXIF block with a UserComment, in UTF-16 as AUTOMATIC1111 writes it.
fn exif(comment: &str) -> anyhow::Result<Vec<u8>> {
    // A JPEG segment has at most 64 KiB; a longer infotext is truncated.
    const MAX_UNITS: usize = 32_000;
    let mut text = b"UNICODE\0".to_vec();
    text.extend(comment.encode_utf16().take(MAX_UNITS).flat_map(u16::to_be_bytes));
    let value = Value::Undefined(text, 0);
    let field = Field { tag: Tag::UserComment, ifd_num: In::PRIMARY, value };
    let (mut writer, mut block) = (Writer::new(), Cursor::new(Vec::new()));
    writer.push_field(&field);
    writer.write(&mut block, false)?;
    Ok(block.into_inner())
}
