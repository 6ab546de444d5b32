//! The format of a request to `/invocations`: `text_prompts` is Stability's, `inputs` is Hugging
//! Face's, JumpStart has a media type and an `Accept` of its own, and everything else is native.

use axum::http::HeaderMap;

use super::accept::{self, ReplyPreferences};
use super::body::BodyKind;
use super::render::{Invocation, NATIVE};
use super::stability::{self, STABILITY};
use super::{huggingface, jumpstart};
use crate::http::admission::RequestSlot;
use crate::http::drawing::Drawing;
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::request::{DrawRequest, Fields};

/// Reads and validates a request in any of the formats. `headers` select that of the response.
pub(crate) async fn read(
    state: &AppState,
    slot: &RequestSlot,
    headers: &HeaderMap,
    (fields, kind): (Fields, BodyKind),
) -> Result<Invocation> {
    let limits = &state.settings.limits;
    let (requests, dialect, kind) = if fields.get("text_prompts").is_some() {
        (vec![stability::parse(fields, limits)?], STABILITY, BodyKind::Json)
    } else if fields.get("inputs").is_some() {
        let (request, dialect) = huggingface::parse(fields, limits)?;
        (vec![request], dialect, BodyKind::Json)
    } else if let Some(dialect) = jumpstart::detect(headers) {
        (jumpstart::parse(fields, limits)?, dialect, BodyKind::Json)
    } else {
        (vec![DrawRequest::read(fields, limits)?], NATIVE, kind)
    };
    let drawing = Drawing::prepare(state, slot, requests, |draw, count| {
        let (usual, format) = (dialect.format, draw.format()?);
        let stream = draw.stream == Some(true);
        accept::choose(headers, ReplyPreferences { kind, usual, format, count, stream })
    });
    Ok(Invocation { drawing: drawing.await?, dialect })
}
