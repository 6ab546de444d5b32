//! The format of a request to `/invocations`: `text_prompts` is Stability's, `inputs` is Hugging
//! Face's, JumpStart has a media type and an `Accept` of its own, and everything else is native.

use axum::http::HeaderMap;
use schemars::JsonSchema;
use serde::Deserialize;

use super::accept::{self, ReplyPreferences};
use super::body::BodyKind;
use super::render::{Dialect, Invocation, NATIVE};
use super::stability::{self, STABILITY};
use super::{huggingface, jumpstart};
use crate::http::admission::RequestSlot;
use crate::http::drawing::{Drawing, ReplyFormat};
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::request::{DrawRequest, Fields, Limits, ValidationError};

/// Reads the fields of a body.
pub(crate) type ReadFields = fn(&HeaderMap, &[u8]) -> Result<(Fields, BodyKind)>;

/// The field beside those of the formats.
#[derive(Deserialize, JsonSchema)]
pub(super) struct Model {
    /// Model of the server's directory of models. Default: the server's model.
    #[schemars(extend("maxLength" = 256))]
    model: Option<String>,
}

/// A request with native fields, for its description.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(super) struct Native {
    #[schemars(flatten)]
    draw: DrawRequest,
    #[schemars(flatten)]
    model: Model,
}

/// The requests of a body in any of the formats, one for each prompt.
struct Requests {
    model: Option<String>,
    draws: Vec<DrawRequest>,
    dialect: Dialect,
    kind: BodyKind,
}

/// Reads and validates a request in any of the formats. `headers` select that of the response.
pub(crate) async fn read(
    state: &AppState,
    slot: &mut RequestSlot,
    headers: &HeaderMap,
    body: impl AsRef<[u8]> + Send + 'static,
    fields: ReadFields,
) -> Result<Invocation> {
    let fields = move |headers: &HeaderMap, body: &[u8]| Ok((fields(headers, body)?, ()));
    Ok(read_with(state, slot, headers, body, fields).await?.0)
}

/// The same, with what `fields` reads besides.
pub(crate) async fn read_with<T: Send + 'static>(
    state: &AppState,
    slot: &mut RequestSlot,
    headers: &HeaderMap,
    body: impl AsRef<[u8]> + Send + 'static,
    fields: impl FnOnce(&HeaderMap, &[u8]) -> Result<((Fields, BodyKind), T)> + Send + 'static,
) -> Result<(Invocation, T)> {
    let (own, limits) = (headers.clone(), state.settings.limits);
    let requests = move |body: &[u8]| {
        let (fields, rest) = fields(&own, body)?;
        Ok((requests(&own, fields, &limits)?, rest))
    };
    let (Requests { model, draws, dialect, kind }, rest) =
        state.reader.parse(slot.deadline, slot.clone(), body, requests).await?;
    let chosen = choose(state, model, slot).await?;
    let drawing = Drawing::prepare(&chosen, slot, draws, |draw, count| {
        let (usual, format) = (dialect.format, draw.format()?);
        let stream = draw.stream == Some(true);
        let preferences = ReplyPreferences { kind, usual, format, count, stream };
        let reply = accept::choose(headers, preferences)?;
        match reply {
            ReplyFormat::Events(_) => Ok(reply),
            _ if draw.preview == Some(true) => {
                let reason = "requires stream: only a stream of events has live previews";
                Err(ValidationError::malformed("preview", reason).into())
            }
            _ => Ok(reply),
        }
    });
    Ok((Invocation { drawing: drawing.await?, dialect }, rest))
}

/// The state for the model of a body. One that the path names has been chosen before.
async fn choose(state: &AppState, model: Option<String>, slot: &RequestSlot) -> Result<AppState> {
    let Some(name) = model else { return Ok(state.clone()) };
    if !slot.may_choose() {
        let reason = "needs an API key: send the request to /v1/invocations";
        return Err(ValidationError::range("model", reason).into());
    }
    let of_path = state.lease.is_some().then(|| state.engine.model()).transpose()?;
    match of_path {
        Some(chosen) if chosen.name == name => Ok(state.clone()),
        Some(_) => {
            Err(ValidationError::malformed("model", "is another than that of the path").into())
        }
        None => state.choose(&name, slot.deadline).await,
    }
}

/// Tells the formats apart.
fn requests(
    headers: &HeaderMap,
    (mut fields, kind): (Fields, BodyKind),
    limits: &Limits,
) -> Result<Requests, ValidationError> {
    let Model { model } = fields.read(limits)?;
    let (draws, dialect, kind) = if fields.get("text_prompts").is_some() {
        (vec![stability::parse(fields, limits)?], STABILITY, BodyKind::Json)
    } else if fields.get("inputs").is_some() {
        let (request, dialect) = huggingface::parse(fields, limits)?;
        (vec![request], dialect, BodyKind::Json)
    } else if let Some(dialect) = jumpstart::detect(headers) {
        (jumpstart::parse(fields, limits)?, dialect, BodyKind::Json)
    } else {
        (vec![DrawRequest::read(fields, limits)?], NATIVE, kind)
    };
    Ok(Requests { model, draws, dialect, kind })
}
