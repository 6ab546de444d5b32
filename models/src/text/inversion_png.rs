//! Textual inversion embeddings inside PNG pictures, as AUTOMATIC1111 shares them: as JSON in a text
//! chunk, or in the lower halves of the bytes of two stripes beside the picture.
//!
//! Reference: stable-diffusion-webui 1.10 `modules/textual_inversion/image_embedding.py`.

use std::collections::BTreeMap;
use std::io::{BufReader, Read as _};
use std::path::Path;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use flate2::read::ZlibDecoder;
use png::{ColorType, Decoder, Info, Limits, Transformations};
use serde::Deserialize;

use crate::files::not_json;

/// The keyword of the text chunk.
const KEYWORD: &str = "sd-ti-embedding";

/// Maximum bytes of a decoded picture.
const MAX_BYTES: usize = 64 << 20;

/// Maximum bytes of the JSON in it: that of 75 vectors of 1024 numbers is 1.7 MB.
const MAX_JSON_BYTES: usize = 16 << 20;

/// The embedding in a picture.
#[derive(Debug, Deserialize)]
pub(super) struct PngEmbedding {
    /// The placeholder token.
    pub(super) name: Option<String>,
    string_to_param: BTreeMap<String, Vectors>,
}

#[derive(Debug, Deserialize)]
struct Vectors {
    #[serde(rename = "TORCHTENSOR")]
    rows: Vec<Vec<f32>>,
}

impl PngEmbedding {
    /// Its vectors, of which there must be one list.
    pub(super) fn rows(self) -> Result<Vec<Vec<f32>>, String> {
        let mut lists: Vec<_> = self.string_to_param.into_values().collect();
        match (lists.pop(), lists.is_empty()) {
            (Some(Vectors { rows }), true) => Ok(rows),
            (Some(_), false) => Err("holds several embeddings".into()),
            (None, _) => Err("holds no embedding".into()),
        }
    }
}

/// Reads the embedding of a picture; none if the picture is only one.
pub(super) fn read(path: &Path) -> Result<Option<PngEmbedding>, String> {
    let text = |error: png::DecodingError| format!("not a PNG that can be read: {error}");
    let file = crate::files::open(path).map_err(|error| error.to_string())?;
    let limits = Limits { bytes: MAX_BYTES };
    let mut decoder = Decoder::new_with_limits(BufReader::new(file), limits);
    decoder.set_transformations(Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(text)?;
    let size = reader.output_buffer_size().filter(|size| *size <= MAX_BYTES);
    let mut data = vec![0; size.ok_or("the picture is too large")?];
    let frame = reader.next_frame(&mut data).map_err(text)?;
    reader.finish().map_err(text)?;
    if let Some(found) = chunk(reader.info())? {
        let json = BASE64_STANDARD.decode(found.trim());
        let json = json.map_err(|error| format!("{KEYWORD}: not base64: {error}"))?;
        return parse(&json).map(Some);
    }
    let channels = match frame.color_type {
        ColorType::Rgb => 3,
        ColorType::Rgba => 4,
        _ => return Ok(None),
    };
    let (width, row) = (frame.width as usize, frame.line_size);
    let pixels = data.chunks_exact(row.max(1)).map(|row| {
        row.chunks_exact(channels).take(width).map(|pixel| [pixel[0], pixel[1], pixel[2]])
    });
    let pixels: Vec<Vec<[u8; 3]>> = pixels.map(Iterator::collect).collect();
    let Some(bytes) = hidden(&pixels) else { return Ok(None) };
    let mut json = Vec::new();
    // Whatever follows the compressed data fills the stripes up.
    let read = ZlibDecoder::new(&bytes[..]).take(MAX_JSON_BYTES as u64).read_to_end(&mut json);
    // Any picture may have two black columns.
    if read.is_err() { Ok(None) } else { parse(&json).map(Some) }
}

fn parse(json: &[u8]) -> Result<PngEmbedding, String> {
    serde_json::from_slice(json).map_err(|error| match error.is_data() {
        true => format!("{KEYWORD}: holds no embedding"),
        false => format!("{KEYWORD}: {}", not_json(&error)),
    })
}

/// The text of the keyword's chunk.
fn chunk(info: &Info<'_>) -> Result<Option<String>, String> {
    let text = |text: Result<String, png::DecodingError>| {
        let text = text.ok().filter(|text| text.len() <= MAX_JSON_BYTES);
        let reason = "its text is damaged, or longer than";
        text.map(Some).ok_or_else(|| format!("{KEYWORD}: {reason} {MAX_JSON_BYTES} bytes"))
    };
    let plain = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == KEYWORD);
    if let Some(chunk) = plain {
        return text(Ok(chunk.text.clone()));
    }
    let packed = info.compressed_latin1_text.iter().find(|chunk| chunk.keyword == KEYWORD);
    if let Some(mut chunk) = packed.cloned() {
        let read = chunk.decompress_text_with_limit(MAX_JSON_BYTES);
        return text(read.and_then(|()| chunk.get_text()));
    }
    let utf8 = info.utf8_text.iter().find(|chunk| chunk.keyword == KEYWORD);
    let Some(mut chunk) = utf8.cloned() else { return Ok(None) };
    let read = chunk.decompress_text_with_limit(MAX_JSON_BYTES);
    text(read.and_then(|()| chunk.get_text()))
}

/// The bytes hidden in a picture's stripes: left of the first and right of the last column whose
/// lower halves are all zero, inside the picture's black border.
fn hidden(pixels: &[Vec<[u8; 3]>]) -> Option<Vec<u8>> {
    let bright = |pixel: &[u8; 3]| pixel.iter().all(|byte| *byte > 0);
    let width = pixels.first()?.len();
    let in_column = |x: &usize| pixels.iter().any(|row| bright(&row[*x]));
    let rows: Vec<_> = pixels.iter().map(|row| row.iter().any(bright)).collect();
    let (top, bottom) = (rows.iter().position(|row| *row)?, rows.iter().rposition(|row| *row)?);
    let (left, right) = ((0..width).find(in_column)?, (0..width).rfind(in_column)?);
    let inside = &pixels[top..=bottom];
    let dark = |x: &usize| inside.iter().all(|row| row[*x].iter().all(|byte| byte & 15 == 0));
    let (first, last) = ((left..=right).find(dark)?, (left..=right).rfind(dark)?);
    if first == last || first - left != right - last {
        return None;
    }
    let (low, high) = (stripe(inside, left..first), stripe(inside, last + 1..right + 1));
    Some(low.into_iter().zip(high).map(|(low, high)| high << 4 | low).collect())
}

/// The halves of bytes in a stripe, which are disguised by a generator of random numbers.
fn stripe(rows: &[Vec<[u8; 3]>], columns: std::ops::Range<usize>) -> Vec<u8> {
    let mut seed = 0_u32;
    let bytes = rows.iter().flat_map(|row| row[columns.clone()].iter().flatten());
    let half = |byte: &u8| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (byte ^ (seed % 255) as u8) & 15
    };
    bytes.map(half).collect()
}
