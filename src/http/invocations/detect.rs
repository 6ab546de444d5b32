//! The format of a request to `/invocations`: `text_prompts` is Stability's, `inputs` is Hugging
//! Face's, JumpStart has a media type and an `Accept` of its own, and everything else is native.

use axum::http::HeaderMap;

use super::accept::{self, ReplyPreferences};
use super::body::BodyKind;
use super::render::{Invocation, NATIVE, ParsedRequest};
use super::{huggingface, jumpstart, stability};
use crate::http::admission::RequestSlot;
use crate::http::drawing::Drawing;
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::request::{DrawRequest, Fields, Limits, ValidationError};

/// Reads and validates a request in any of the formats. `headers` select that of the response.
pub(crate) async fn read(
    state: &AppState,
    slot: &RequestSlot,
    headers: &HeaderMap,
    (fields, kind): (Fields, BodyKind),
) -> Result<Invocation> {
    let parsed = parse(headers, fields, kind, &state.settings.limits)?;
    let ParsedRequest { requests, kind, dialect } = parsed;
    let drawing = Drawing::prepare(state, slot, requests, |draw, count| {
        let (usual, format) = (dialect.format, draw.format()?);
        let stream = draw.stream == Some(true);
        accept::choose(headers, ReplyPreferences { kind, usual, format, count, stream })
    });
    Ok(Invocation { drawing: drawing.await?, dialect })
}

fn parse(
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
        None => {
            let requests = vec![DrawRequest::read(fields, limits)?];
            Ok(ParsedRequest { requests, kind, dialect: NATIVE })
        }
    }
}
