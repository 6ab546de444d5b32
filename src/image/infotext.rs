//! Reads the parameters out of a picture's file, whoever wrote them there: AUTOMATIC1111, this
//! server, or another that keeps to their form.

use std::io::Cursor;

use anyhow::{Context as _, Result, bail};
use exif::{Exif, In, Tag, Value};
use image::{ImageDecoder as _, ImageFormat, ImageReader};

/// The longest text that is taken out of a file: a small file may hold a large one.
const MAX_TEXT_BYTES: usize = 1 << 20;

/// The name of the text in PNG files.
const PARAMETERS: &str = "parameters";

/// The text with the parameters of a picture, if its file holds one.
pub(crate) fn find(file: &[u8]) -> Result<Option<String>> {
    let reader = ImageReader::new(Cursor::new(file)).with_guessed_format()?;
    match reader.format() {
        Some(ImageFormat::Png) => in_png(file),
        Some(ImageFormat::Jpeg | ImageFormat::WebP) => {
            let exif = reader.into_decoder()?.exif_metadata()?;
            Ok(exif
                .and_then(|data| exif::Reader::new().read_raw(data).ok())
                .as_ref()
                .and_then(in_exif))
        }
        _ => bail!("is neither a PNG, nor a JPEG, nor a WebP file"),
    }
}

fn in_png(file: &[u8]) -> Result<Option<String>> {
    let limits = png::Limits { bytes: MAX_TEXT_BYTES };
    let mut reader = png::Decoder::new_with_limits(Cursor::new(file), limits).read_info();
    let info = reader.as_mut().map_err(|error| anyhow::anyhow!("cannot be read: {error}"))?.info();
    let latin = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == PARAMETERS);
    if let Some(chunk) = latin {
        return Ok(Some(chunk.text.clone()));
    }
    if let Some(chunk) = info.utf8_text.iter().find(|chunk| chunk.keyword == PARAMETERS) {
        let mut chunk = chunk.clone();
        chunk
            .decompress_text_with_limit(MAX_TEXT_BYTES)
            .context("holds a text that is too long")?;
        return Ok(Some(chunk.get_text()?));
    }
    let Some(chunk) = info.compressed_latin1_text.iter().find(|chunk| chunk.keyword == PARAMETERS)
    else {
        return Ok(None);
    };
    let mut chunk = chunk.clone();
    chunk.decompress_text_with_limit(MAX_TEXT_BYTES).context("holds a text that is too long")?;
    Ok(Some(chunk.get_text()?))
}

/// The UserComment: eight bytes that name its encoding, then the text.
fn in_exif(exif: &Exif) -> Option<String> {
    let Value::Undefined(bytes, _) = &exif.get_field(Tag::UserComment, In::PRIMARY)?.value else {
        return None;
    };
    let (encoding, text) = bytes.split_at_checked(8)?;
    if encoding != b"UNICODE\0" {
        return Some(String::from_utf8_lossy(text).into_owned());
    }
    let (pairs, _) = text.as_chunks::<2>();
    let big = !exif.little_endian() || pairs.first().is_some_and(|pair| pair[0] == 0);
    let unit =
        |pair: &[u8; 2]| if big { u16::from_be_bytes(*pair) } else { u16::from_le_bytes(*pair) };
    Some(String::from_utf16_lossy(&pairs.iter().map(unit).collect::<Vec<_>>()))
}

/// The parameters one by one: `Prompt`, `Negative prompt`, and those of the last line under their
/// own names.
pub(crate) fn parse(text: &str) -> Vec<(String, String)> {
    let (above, last) = match text.rsplit_once('\n') {
        Some((above, last)) if pairs(last).len() >= 3 => (above, last),
        _ if pairs(text).len() >= 3 => ("", text),
        _ => (text, ""),
    };
    let (prompt, negative) = above.split_once("Negative prompt:").unwrap_or((above, ""));
    let mut parameters = vec![
        ("Prompt".to_owned(), prompt.trim().to_owned()),
        ("Negative prompt".to_owned(), negative.trim().to_owned()),
    ];
    parameters.extend(pairs(last));
    parameters
}

/// `Name: value, Name: "value, with commas"`.
fn pairs(line: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut rest = line;
    while let Some((name, after)) = rest.split_once(':') {
        let after = after.trim_start();
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        pairs.push((name.trim().to_owned(), value.trim().to_owned()));
        rest = next.trim_start_matches([',', ' ']);
    }
    pairs
}
