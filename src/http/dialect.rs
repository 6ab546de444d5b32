//! Which of the dialects of `/invocations` a request speaks. What tells them apart is what they
//! cannot do without: `text_prompts` is Stability's, `inputs` is Hugging Face's, a type or an
//! `Accept` that nobody else has is JumpStart's, and everything else is native.

use axum::http::HeaderMap;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_models::Spec;
use serde_json::{Value, json};

use super::body::Speech;
use super::{huggingface, jumpstart, stability};
use crate::api::{Fields, Invalid};
use crate::engine::Drawn;
use crate::image::Format;

/// How an answer is worded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dialect {
    /// The format of pictures in JSON, unless the request names one.
    pub(super) format: Format,
    /// The JSON.
    pub(super) word: fn(&Pictures<'_>) -> String,
}

/// What there is to tell.
#[derive(Debug)]
pub(super) struct Pictures<'a> {
    pub(super) specs: &'a [Spec],
    pub(super) drawn: &'a [Drawn],
    pub(super) files: &'a [Vec<u8>],
    pub(super) format: Format,
}

impl Pictures<'_> {
    /// The files in base64.
    pub(super) fn base64(&self) -> impl Iterator<Item = String> {
        self.files.iter().map(|file| BASE64_STANDARD.encode(file))
    }

    /// The files in base64, with what was asked and what came of it.
    pub(super) fn each(&self) -> impl Iterator<Item = (&Spec, &Drawn, String)> {
        let drawn = self.specs.iter().zip(self.drawn).zip(self.base64());
        drawn.map(|((spec, drawn), data)| (spec, drawn, data))
    }

    /// The warnings of all pictures, each once.
    pub(super) fn warnings(&self) -> Vec<&str> {
        let mut warnings: Vec<&str> = Vec::new();
        for warning in self.drawn.iter().flat_map(|picture| &picture.warnings) {
            if !warnings.contains(&warning.as_str()) {
                warnings.push(warning);
            }
        }
        warnings
    }

    /// The prompt of the first picture.
    pub(super) fn prompt(&self) -> &str {
        self.specs.first().map_or("", |spec| &spec.prompt)
    }
}

/// A request in native fields.
#[derive(Debug)]
pub(super) struct Heard {
    /// One for each prompt.
    pub(super) requests: Vec<Fields>,
    pub(super) speech: Speech,
    pub(super) dialect: Dialect,
}

impl Heard {
    /// A request that is native already.
    pub(super) fn native(fields: Fields, speech: Speech) -> Self {
        Self { requests: vec![fields], speech, dialect: NATIVE }
    }
}

/// Understands a request for at most so many pictures.
pub(super) fn hear(
    headers: &HeaderMap,
    fields: Fields,
    speech: Speech,
    max_images: usize,
) -> Result<Heard, Invalid> {
    if fields.has("text_prompts") {
        return stability::hear(fields);
    }
    if fields.has("inputs") {
        return huggingface::hear(fields);
    }
    match jumpstart::spoken(headers) {
        Some(dialect) => jumpstart::hear(fields, dialect, max_images),
        None => Ok(Heard::native(fields, speech)),
    }
}

const NATIVE: Dialect = Dialect { format: Format::Jpeg, word: native };

/// `data` and `seed` for one picture, `images` for several.
fn native(pictures: &Pictures<'_>) -> String {
    let image = |(spec, drawn, data): (&Spec, &Drawn, String)| {
        let mut image = json!({ "seed": spec.seed, "data": data });
        if let Some(nsfw) = drawn.nsfw {
            image["nsfw"] = nsfw.into();
        }
        image
    };
    let mut images: Vec<Value> = pictures.each().map(image).collect();
    let mut reply = match &mut images[..] {
        [one] => one.take(),
        _ => json!({ "images": images }),
    };
    reply["prompt"] = pictures.prompt().into();
    reply["content_type"] = pictures.format.media_type().into();
    let warnings = pictures.warnings();
    if !warnings.is_empty() {
        reply["warnings"] = warnings.into();
    }
    reply.to_string()
}
