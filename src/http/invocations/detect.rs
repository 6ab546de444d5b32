//! Which of the dialects of `/invocations` a request speaks. What tells them apart is what they
//! cannot do without: `text_prompts` is Stability's, `inputs` is Hugging Face's, a type or an
//! `Accept` that nobody else has is JumpStart's, and everything else is native.

use axum::http::HeaderMap;

use super::body::BodyKind;
use super::render::ParsedRequest;
use super::{huggingface, jumpstart, stability};
use crate::request::{DrawRequest, Fields, Limits, ValidationError};

/// Reads a request in the dialect that it is in.
pub(crate) fn parse(
    headers: &HeaderMap,
    fields: Fields,
    kind: BodyKind,
    limits: &Limits,
) -> Result<ParsedRequest, ValidationError> {
    if fields.has("text_prompts") {
        return stability::parse(fields, limits);
    }
    if fields.has("inputs") {
        return huggingface::parse(fields, limits);
    }
    match jumpstart::detect(headers) {
        Some(dialect) => jumpstart::parse(fields, dialect, limits),
        None => Ok(ParsedRequest::native(DrawRequest::read(fields, limits)?, kind)),
    }
}
