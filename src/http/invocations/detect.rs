//! Which of the dialects of `/invocations` a request speaks. What tells them apart is what they
//! cannot do without: `text_prompts` is Stability's, `inputs` is Hugging Face's, a type or an
//! `Accept` that nobody else has is JumpStart's, and everything else is native.

use axum::http::HeaderMap;

use super::body::Speech;
use super::render::Heard;
use super::{huggingface, jumpstart, stability};
use crate::request::{Fields, Invalid};

/// Understands a request for at most so many pictures.
pub(crate) fn hear(
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
