//! The texts that image files hold beside the picture, among them the infotext: as AUTOMATIC1111
//! reads them. Not what an infotext says ([`super::infotext`]).
//!
//! Reference: stable-diffusion-webui 1.10 `modules/images.py` `read_info_from_image`, and piexif.

use std::io::Cursor;

use exif::{Context, Exif, In, Tag, Value};
use image::{ImageDecoder as _, ImageFormat, ImageReader};
use sd_models::SamplerName;
use serde::Deserialize;
use serde_json::Number;

use super::decode::{damaged, format, unreadable};

/// Maximum length of all texts read from a file, in bytes: a small file can hold large texts.
pub(super) const MAX_TEXT_BYTES: usize = 1 << 20;

/// The keyword of the infotext in PNG files.
const PARAMETERS: &str = "parameters";

/// The name under which a comment of JPEG or GIF is listed.
const COMMENT: &str = "comment";

const TOO_LONG: &str = "holds a text that is damaged or longer than 1048576 bytes";

/// The texts of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Embedded {
    /// The infotext, if it has one.
    pub(crate) infotext: Option<String>,
    /// Its other texts by their keywords.
    pub(crate) items: Vec<(String, String)>,
}

impl Embedded {
    /// Those of a file that [`super::decode`] reads. The error is the predicate of a sentence whose
    /// subject is the field.
    pub(crate) fn read(file: &[u8]) -> Result<Self, String> {
        let guessed = image::guess_format(file).ok();
        let name = format(file, guessed)?;
        let comment = |text: Option<String>| {
            let items = text.iter().map(|text| (COMMENT.to_owned(), text.clone())).collect();
            Self { infotext: text, items }
        };
        match guessed {
            Some(ImageFormat::Png) => Self::of_png(file),
            Some(ImageFormat::WebP) if is_short(file) => Err(damaged(name)),
            Some(ImageFormat::Jpeg | ImageFormat::WebP) => {
                let reader = ImageReader::new(Cursor::new(file)).with_guessed_format();
                let decoder = reader.map_err(|_| damaged(name))?.into_decoder();
                let mut decoder = decoder.map_err(|error| unreadable(name, &error))?;
                let exif = decoder.exif_metadata().map_err(|error| unreadable(name, &error))?;
                let commented = match guessed {
                    Some(ImageFormat::Jpeg) => comment(jpeg_comment(file)),
                    _ => Self::default(),
                };
                // As there, the comment counts where there is no EXIF.
                Ok(match exif {
                    Some(exif) => Self { infotext: in_exif(exif), ..commented },
                    None => commented,
                })
            }
            Some(ImageFormat::Gif) => Ok(comment(gif_comment(file))),
            _ => Ok(Self::default()),
        }
    }

    /// The texts before the picture, as there. EXIF counts before the text of this keyword.
    fn of_png(file: &[u8]) -> Result<Self, String> {
        let limits = png::Limits { bytes: MAX_TEXT_BYTES };
        let mut reader = png::Decoder::new_with_limits(Cursor::new(file), limits).read_info();
        let info = reader.as_mut().map_err(|error| png_error(error))?.info();
        let (mut items, mut left) = (Vec::<(String, String)>::new(), MAX_TEXT_BYTES);
        let mut add =
            |keyword: &str, read: &dyn Fn(usize) -> Result<String, png::DecodingError>| {
                let text = read(left).map_err(|_| TOO_LONG)?;
                left = left.checked_sub(text.len()).ok_or(TOO_LONG)?;
                // As there, the last of a keyword counts.
                items.retain(|(known, _)| known != keyword);
                // A text may have no zeros, and could not be written again.
                items.push((keyword.to_owned(), text.replace('\0', "")));
                Ok::<_, String>(())
            };
        for chunk in &info.uncompressed_latin1_text {
            add(&chunk.keyword, &|_| Ok(chunk.text.clone()))?;
        }
        for chunk in &info.compressed_latin1_text {
            add(&chunk.keyword, &|left| {
                let mut chunk = chunk.clone();
                chunk.decompress_text_with_limit(left)?;
                chunk.get_text()
            })?;
        }
        for chunk in &info.utf8_text {
            add(&chunk.keyword, &|left| {
                let mut chunk = chunk.clone();
                chunk.decompress_text_with_limit(left)?;
                chunk.get_text()
            })?;
        }
        let place = items.iter().position(|(keyword, _)| keyword == PARAMETERS);
        let own = place.map(|place| items.remove(place).1);
        let exif = info.exif_metadata.as_ref().and_then(|exif| in_exif(exif.to_vec()));
        let of_novelai = of_novelai(&items, (info.width, info.height));
        Ok(Self { infotext: of_novelai.or(exif).or(own), items })
    }
}

fn png_error(error: &png::DecodingError) -> String {
    match error {
        png::DecodingError::LimitsExceeded => TOO_LONG.into(),
        _ => damaged("PNG"),
    }
}

/// Whether a WebP file has less than it says: its EXIF is at the end.
fn is_short(file: &[u8]) -> bool {
    let length = file.get(4..8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
    // An odd last part may lack its filler.
    length.is_none_or(|length| (file.len() as u64) < u64::from(length) + 7)
}

/// The comment of a JPEG file. ITU T.81, B.2.4.5.
fn jpeg_comment(file: &[u8]) -> Option<String> {
    const SCAN: u8 = 0xda;
    const COMMENT: u8 = 0xfe;
    let mut rest = file.get(2..)?;
    loop {
        let (kind, length) = match rest {
            [0xff, 0xff, ..] => {
                rest = &rest[1..];
                continue;
            }
            [0xff, kind, high, low, ..] => (*kind, usize::from(u16::from_be_bytes([*high, *low]))),
            _ => return None,
        };
        let segment = rest.get(4..length + 2)?;
        match kind {
            SCAN => return None,
            COMMENT => return Some(text(segment)),
            _ => rest = &rest[length + 2..],
        }
    }
}

/// The comment before the first picture of a GIF file. GIF89a, 15 to 24.
fn gif_comment(file: &[u8]) -> Option<String> {
    const HEADER: usize = 13;
    const EXTENSION: u8 = 0x21;
    const COMMENT: u8 = 0xfe;
    let flags = *file.get(10)?;
    let colors = if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) };
    let mut rest = file.get(HEADER + colors..)?;
    while let [EXTENSION, kind, blocks @ ..] = rest {
        let (mut data, mut blocks) = (Vec::new(), blocks);
        loop {
            let (length, after) = blocks.split_first()?;
            let (block, after) = after.split_at_checked(usize::from(*length))?;
            blocks = after;
            if block.is_empty() {
                break;
            }
            data.extend_from_slice(block);
        }
        if *kind == COMMENT {
            return Some(text(&data));
        }
        rest = blocks;
    }
    None
}

/// The infotext of EXIF, of which what cannot be read is passed over.
fn in_exif(data: Vec<u8>) -> Option<String> {
    /// What libraries write before it, in files other than JPEG, too.
    const HEADER: &[u8] = b"Exif\0\0";
    /// Where Pillow writes the tag unless it is told otherwise.
    const IN_MAIN: Tag = Tag(Context::Tiff, 0x9286);
    let data = data.strip_prefix(HEADER).map(<[u8]>::to_vec).unwrap_or(data);
    let read = exif::Reader::new().continue_on_error(true).read_raw(data);
    let exif = read.or_else(|error| error.distill_partial_result(|_| ())).ok()?;
    let text = [Tag::UserComment, IN_MAIN].into_iter().find_map(|tag| user_comment(&exif, tag));
    text.filter(|text| !text.is_empty())
}

/// A UserComment: eight bytes that name its encoding, then the text; or the text alone.
fn user_comment(exif: &Exif, tag: Tag) -> Option<String> {
    let bytes = match &exif.get_field(tag, In::PRIMARY)?.value {
        Value::Undefined(bytes, _) | Value::Byte(bytes) => bytes.clone(),
        // Split at its zeros.
        Value::Ascii(parts) => parts.join(&0),
        _ => return None,
    };
    let (encoding, rest) = bytes.split_at_checked(8).unwrap_or((&[], &bytes[..]));
    let read = match encoding {
        b"UNICODE\0" => utf16(rest, exif.little_endian()),
        b"JIS\0\0\0\0\0" => encoding_rs::SHIFT_JIS.decode(rest).0.into_owned(),
        b"ASCII\0\0\0" | [0, 0, 0, 0, 0, 0, 0, 0] => text(rest),
        _ => text(&bytes),
    };
    Some(read.trim_matches('\0').to_owned())
}

/// A text in UTF-16, of which piexif writes the high byte first whatever the order in EXIF, and
/// others in that order; or in UTF-8, which some write there.
fn utf16(bytes: &[u8], little_endian: bool) -> String {
    let (pairs, _) = bytes[..bytes.len().min(MAX_TEXT_BYTES)].as_chunks::<2>();
    // Every infotext has letters of ASCII.
    let [high_first, low_first] = [0, 1].map(|k| pairs.iter().filter(|pair| pair[k] == 0).count());
    if high_first == low_first
        && high_first == 0
        && let Ok(text) = str::from_utf8(bytes)
    {
        return text.to_owned();
    }
    let big = match pairs.first() {
        Some([0xfe, 0xff]) => true,
        Some([0xff, 0xfe]) => false,
        _ if high_first == low_first => !little_endian,
        _ => high_first > low_first,
    };
    let unit =
        |pair: &[u8; 2]| if big { u16::from_be_bytes(*pair) } else { u16::from_le_bytes(*pair) };
    let text = String::from_utf16_lossy(&pairs.iter().map(unit).collect::<Vec<_>>());
    text.trim_start_matches('\u{feff}').to_owned()
}

/// A text in UTF-8 of a bounded length.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_TEXT_BYTES)]).into_owned()
}

/// The settings in a picture of NovelAI.
#[derive(Deserialize)]
struct NovelAi {
    uc: String,
    steps: Number,
    sampler: String,
    scale: Number,
    seed: Number,
}

/// The infotext of a picture of NovelAI, which keeps its settings in texts of its own.
fn of_novelai(items: &[(String, String)], (width, height): (u32, u32)) -> Option<String> {
    let text = |keyword| items.iter().find(|(known, _)| known == keyword).map(|(_, text)| text);
    if text("Software")? != "NovelAI" {
        return None;
    }
    let prompt = text("Description")?;
    let NovelAi { uc, steps, sampler, scale, seed } =
        serde_json::from_str(text("Comment")?).ok()?;
    let sampler: Option<SamplerName> = sampler.parse().ok();
    let sampler = sampler.map_or("Euler a", |name| name.sampler.title());
    // How that service skips layers and seeds its samplers.
    Some(format!(
        "{prompt}\nNegative prompt: {uc}\nSteps: {steps}, Sampler: {sampler}, CFG scale: {scale}, \
         Seed: {seed}, Size: {width}x{height}, Clip skip: 2, ENSD: 31337"
    ))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    fn folder() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pictures/texts"))
    }

    /// Written by Pillow and piexif and read as by AUTOMATIC1111, by `make_texts.py`.
    #[test]
    fn texts_are_read_as_by_automatic1111() {
        let expected = std::fs::read(folder().join("expected.json")).expect("a file");
        let expected: serde_json::Map<String, Value> =
            serde_json::from_slice(&expected).expect("an object");
        assert!(expected.len() > 20);
        for (name, wanted) in expected {
            let file = std::fs::read(folder().join(&name)).expect("a file");
            let Embedded { infotext, items } = Embedded::read(&file).expect("texts");
            assert_eq!(infotext.as_deref(), wanted["info"].as_str(), "{name}");
            let items: serde_json::Map<String, Value> =
                items.into_iter().map(|(keyword, text)| (keyword, text.into())).collect();
            assert_eq!(Value::Object(items), wanted["items"], "{name}");
        }
    }

    #[test]
    fn damaged_files_are_refused_in_a_sentence() {
        for (name, format) in [("tEXt.png", "PNG"), ("ascii.jpg", "JPEG"), ("unicode.webp", "WebP")]
        {
            let file = std::fs::read(folder().join(name)).expect("a file");
            let expected = Err(format!("is a {format} file that is damaged or cut short"));
            assert_eq!(Embedded::read(&file[..20]), expected, "{name}");
            // What is behind the texts may be missing; wherever it is cut, there is an answer.
            for end in 12..file.len() {
                let answer = Embedded::read(&file[..end]);
                assert!(answer.is_ok() || answer == expected, "{name} {end}: {answer:?}");
            }
        }
        let other = "is in no known format; send PNG, JPEG, WebP, GIF or BMP";
        assert_eq!(Embedded::read(b"hello, world, how are you"), Err(other.into()));
    }

    #[test]
    fn texts_that_are_too_long_are_refused() {
        let png = |count: usize, text: &str| {
            let mut file = Vec::new();
            let mut encoder = png::Encoder::new(&mut file, 1, 1);
            for k in 0..count {
                encoder.add_ztxt_chunk(format!("text {k}"), text.into()).expect("a text");
            }
            let mut writer = encoder.write_header().expect("a header");
            writer.write_image_data(&[0]).expect("a pixel");
            drop(writer);
            file
        };
        let text = "a".repeat(MAX_TEXT_BYTES / 4);
        assert_eq!(Embedded::read(&png(4, &text)).map(|read| read.items.len()), Ok(4));
        assert_eq!(Embedded::read(&png(5, &text)), Err(TOO_LONG.into()));
        assert_eq!(Embedded::read(&png(1, &text.repeat(5))), Err(TOO_LONG.into()));
    }
}
