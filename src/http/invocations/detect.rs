//! Which of the dialects of `/invocations` a request speaks. What tells them apart is what they
//! cannot do without: `text_prompts` is Stability's, `inputs` is Hugging Face's, a type or an
//! `Accept` that nobody else has is JumpStart's, and everything else is native.

use axum::http::HeaderMap;

use super::body::BodyKind;
use super::render::ParsedRequest;
use super::{huggingface, jumpstart, stability};
use crate::request::{Fields, ValidationError};

/// Understands a request for at most so many pictures.
pub(crate) fn parse(
    headers: &HeaderMap,
    fields: Fields,
    speech: BodyKind,
    max_images: usize,
) -> Result<ParsedRequest, ValidationError> {
    if fields.has("text_prompts") {
        return stability::parse(fields);
    }
    if fields.has("inputs") {
        return huggingface::parse(fields);
    }
    match jumpstart::detect(headers) {
        Some(dialect) => jumpstart::parse(fields, dialect, max_images),
        None => Ok(ParsedRequest::native(fields, speech)),
    }
}
