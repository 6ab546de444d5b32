//! Generation parameters as text (infotext), in AUTOMATIC1111's format: writes them, and reads them
//! from files.

use std::io::Cursor;

use anyhow::{Context as _, Result, bail};
use exif::{Exif, In, Tag, Value};
use image::{ImageDecoder as _, ImageFormat, ImageReader};
use sd_models::{Hires, LoraUse, Spec};

/// AUTOMATIC1111's name of the list of LoRAs with their hashes.
pub(crate) const LORA_HASHES: &str = "Lora hashes";

/// Maximum length of a text read from a file, in bytes: a small file can hold a large text.
const MAX_TEXT_BYTES: usize = 1 << 20;

/// Maximum number of parameters read from a text; each takes far more memory than its text.
const MAX_PARAMETERS: usize = 256;

/// The keyword of the text chunk in PNG files.
const PARAMETERS: &str = "parameters";

/// The infotext of an image. `loras` is the result of `Hashes::of`.
pub fn infotext(spec: &Spec, model: &str, loras: &str) -> String {
    // A zero byte would terminate the text inside the file.
    let clean = |text: &str| text.replace('\0', "");
    let mut text = clean(&spec.prompt);
    // So that the prompt can be pasted into AUTOMATIC1111.
    for LoraUse { name, scale, text_encoder_scale } in &spec.loras {
        let text_encoder = match text_encoder_scale {
            same if same == scale => String::new(),
            other => format!("{other}:"),
        };
        text += &clean(&format!(" <lora:{name}:{text_encoder}{scale}>"));
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
        spec.sampler_name().title(),
        spec.guidance_scale,
        spec.seed,
        spec.size,
        strength.unwrap_or_default(),
        env!("CARGO_PKG_VERSION"),
    );
    text
}

/// AUTOMATIC1111's names and values of the hires parameters.
pub(crate) fn hires_parameters(spec: &Spec, hires: &Hires) -> Vec<(&'static str, String)> {
    let (width, height) = (hires.size.width(), hires.size.height());
    let (w, h) = (spec.size.width(), spec.size.height());
    let enlarged = match width * h == height * w {
        true => ("Hires upscale", (width as f64 / w as f64).to_string()),
        false => ("Hires resize", hires.size.to_string()),
    };
    let rest = [
        // The steps that are run, as in AUTOMATIC1111.
        ("Hires steps", (hires.steps - hires.skipped_steps()).to_string()),
        ("Hires upscaler", hires.upscaler.title().to_owned()),
    ];
    std::iter::once(enlarged).chain(rest).collect()
}

/// The infotext of an image file, if it has one.
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
    const TOO_LONG: &str = "holds a text that is too long";
    let limits = png::Limits { bytes: MAX_TEXT_BYTES };
    let mut reader = png::Decoder::new_with_limits(Cursor::new(file), limits).read_info();
    let info = reader.as_mut().map_err(|error| anyhow::anyhow!("cannot be read: {error}"))?.info();
    let latin = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == PARAMETERS);
    if let Some(chunk) = latin {
        return Ok(Some(chunk.text.clone()));
    }
    let international = info.utf8_text.iter().find(|chunk| chunk.keyword == PARAMETERS).cloned();
    if let Some(mut chunk) = international {
        chunk.decompress_text_with_limit(MAX_TEXT_BYTES).context(TOO_LONG)?;
        return Ok(Some(chunk.get_text()?));
    }
    let mut compressed = info.compressed_latin1_text.iter();
    let compressed = compressed.find(|chunk| chunk.keyword == PARAMETERS).cloned();
    let Some(mut chunk) = compressed else { return Ok(None) };
    chunk.decompress_text_with_limit(MAX_TEXT_BYTES).context(TOO_LONG)?;
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

/// Parses an infotext: `Prompt`, `Negative prompt`, and the parameters of the last line by name.
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
    while pairs.len() < MAX_PARAMETERS
        && let Some((name, after)) = rest.split_once(':')
    {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sd_models::{PromptSyntax, Sampler, SigmaSchedule, Size};

    use super::*;

    fn spec(prompt: &str, negative_prompt: &str, seed: u64, steps: usize, scale: f64) -> Spec {
        Spec {
            prompt: prompt.into(),
            prompt_syntax: PromptSyntax::Plain,
            loras: Vec::new(),
            negative_prompt: negative_prompt.into(),
            size: Size::new(64, 128).expect("multiples of 8"),
            steps,
            guidance_scale: scale,
            seed,
            sampler: Sampler::Euler,
            schedule: SigmaSchedule::Model,
            img2img: None,
            hires: None,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(500)
        })]

        #[test]
        fn what_is_written_is_read_back(
            prompt in "[^\0]{0,80}",
            negative in "[^\0]{0,80}",
            seed in any::<u64>(),
            steps in 1..1000_usize,
            scale in 0.0..100.0_f64,
        ) {
            // The format marks the negative prompt by these words alone.
            prop_assume!(!prompt.contains("Negative prompt:"));
            let spec = spec(&prompt, &negative, seed, steps, scale);
            let read = parse(&infotext(&spec, "model", "style: 0123456789ab"));
            let value = |name: &str| {
                let mut found = read.iter().filter(|(known, _)| known == name);
                found.next().map(|(_, value)| value.as_str()).unwrap_or_default().to_owned()
            };
            prop_assert_eq!(value("Prompt"), prompt.trim());
            prop_assert_eq!(value("Negative prompt"), negative.trim());
            prop_assert_eq!(value("Seed"), seed.to_string());
            prop_assert_eq!(value("Steps"), steps.to_string());
            prop_assert_eq!(value("CFG scale"), scale.to_string());
            prop_assert_eq!(value("Size"), "64x128");
            prop_assert_eq!(value("Sampler"), "Euler");
            prop_assert_eq!(value("Model"), "model");
            prop_assert_eq!(value(LORA_HASHES), "style: 0123456789ab");
        }

        #[test]
        fn any_text_is_read(text in ".{0,200}") {
            let read = parse(&text);
            prop_assert!(read.len() >= 2);
            prop_assert!(read.iter().map(|(_, value)| value.len()).sum::<usize>() <= text.len());
        }
    }
}
