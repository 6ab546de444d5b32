//! OpenAI's fields in native words.

use crate::request::{Fields, ValidationError};

/// What OpenAI's words say that ours cannot.
pub(crate) struct OpenAiOptions {
    pub(crate) model: Option<String>,
    pub(crate) compression: Option<u64>,
    pub(crate) url: bool,
    pub(crate) partial_images: usize,
}

/// Puts the fields that are OpenAI's own into native words.
pub(crate) fn translate(fields: &mut Fields) -> Result<OpenAiOptions, ValidationError> {
    let model = fields.text(&["model"], 256)?;
    for silent in ["quality", "style", "moderation", "input_fidelity", "user", "safety_identifier"]
    {
        fields.text(&[silent], 256)?;
    }
    fields.one_of(&["background"], &["auto", "opaque"])?;
    if let Some(size) = fields.text(&["size"], 32)?
        && size != "auto"
    {
        let sides = size.split_once('x').and_then(|(width, height)| {
            Some((width.parse::<u64>().ok()?, height.parse::<u64>().ok()?))
        });
        let (width, height) = sides.ok_or_else(|| {
            ValidationError::malformed(
                "size",
                format!("must be auto or like 512x512, not {size:?}"),
            )
        })?;
        fields.add("width", "size", width);
        fields.add("height", "size", height);
    }
    let compression = fields.whole(&["output_compression"], 0..=100)?;
    let url = fields.one_of(&["response_format"], &["b64_json", "url"])? == Some("url");
    let partial_images = fields.whole(&["partial_images"], 0..=3)?.unwrap_or(0) as usize;
    if partial_images > 0 {
        fields.add("preview", "partial_images", true);
    }
    Ok(OpenAiOptions { model, compression, url, partial_images })
}
