//! Generations and edits.

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::HOST;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::form::Form;
use super::render::{common, data, now};
use super::stream::{ReplyOptions, stream};
use super::translate::{OpenAiOptions, translate};
use crate::http::admission::Admitted;
use crate::http::drawing::{Drawing, ReplyFormat};
use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::image::{self, Format};
use crate::request::{Fields, ValidationError};

/// Names that clients send who know no other server than OpenAI's. They mean whatever is here.
const THEIR_MODELS: [&str; 3] = ["dall-e-", "gpt-image-", "chatgpt-image-"];

/// `POST /v1/images/generations`.
pub(crate) async fn generations(
    State(state): State<AppState>,
    admitted: Admitted,
) -> Result<Response, ApiError> {
    let fields = admitted.json()?;
    draw(state, admitted, fields, "image_generation").await
}

/// `POST /v1/images/edits`: a form with a picture in it, and a mask whose transparent parts are to
/// be painted anew. Without one it is the picture's own transparency that says where, and without
/// that the whole picture is begun from.
pub(crate) async fn edits(
    State(state): State<AppState>,
    mut admitted: Admitted,
) -> Result<Response, ApiError> {
    let Form { texts, image, mask } = Form::read(&mut admitted).await?;
    let image = image.ok_or_else(|| ValidationError::malformed("image", "is required"))?;
    let mut fields = Fields::form(texts);
    let encoded = BASE64_STANDARD.encode(&image);
    let (name, file) = match mask {
        Some(mask) => ("mask", mask),
        None => ("image", image),
    };
    let most = state.settings.limits.max_input_pixels;
    let find = move || image::mask(&file, most, image::transparency_mask);
    let found = admitted.slot.decode(&state, find).await;
    let transparency_mask =
        found.map_err(|_| ValidationError::malformed(name, "cannot be read"))?;
    let transparency_mask =
        transparency_mask.map_err(|reason| ValidationError::range(name, reason))?;
    if transparency_mask.is_none() && name == "mask" {
        let reason = "has no transparent pixels, which mark the area to inpaint";
        return Err(ValidationError::range(name, reason).into());
    }
    if let Some(transparency_mask) = transparency_mask {
        fields.add("mask", name, BASE64_STANDARD.encode(transparency_mask));
        // Nothing is to be seen any more of what was there.
        if !fields.has("strength") {
            fields.add("strength", "strength", "1");
        }
    }
    fields.add("image", "image", encoded);
    draw(state, admitted, fields, "image_edit").await
}

/// Reads OpenAI's fields, draws, and answers.
async fn draw(
    state: AppState,
    admitted: Admitted,
    mut fields: Fields,
    kind: &'static str,
) -> Result<Response, ApiError> {
    let Admitted { headers, client, deadline, stream_deadline, slot, .. } = admitted;
    let OpenAiOptions { model, compression, url, partial_images } = translate(&mut fields)?;
    let state = find(state, model).await?;
    let url = url.then(|| origin(&headers));
    let wish = ReplyOptions { kind, url, partial_images };
    let asked = Drawing::prepare(&state, &slot, vec![fields], |draw, _| {
        let format = draw.format.unwrap_or(Format::Png);
        Ok(if draw.stream { ReplyFormat::Events(format) } else { ReplyFormat::Json(format) })
    });
    let mut asked = asked.await?;
    asked.quality = quality(compression, asked.reply.format())?.unwrap_or(asked.quality);
    let streams = matches!(asked.reply, ReplyFormat::Events(_));
    let ticket = asked.submit(&client, Some(if streams { stream_deadline } else { deadline }))?;
    let common = common(&asked);
    if streams {
        return Ok(stream(state, asked, ticket, wish, common, slot));
    }
    let pictures = ticket.wait().await?;
    let data = data(&state, asked, pictures, wish.url).await?;
    let mut reply = common;
    reply.insert("created".into(), now().into());
    reply.insert("data".into(), data.into());
    Ok(Json(reply).into_response())
}

/// What `output_compression` means for a format: the quality of JPEG. Our PNG and WebP are lossless.
fn quality(compression: Option<u64>, format: Format) -> Result<Option<u8>, ValidationError> {
    match (compression, format) {
        (None | Some(100), Format::Png | Format::Webp) | (None, Format::Jpeg) => Ok(None),
        (Some(percent), Format::Jpeg) => Ok(u8::try_from(percent.max(1)).ok()),
        (Some(_), Format::Png | Format::Webp) => {
            let reason = "is for jpeg only; png and webp are lossless here";
            Err(ValidationError::range("output_compression", reason))
        }
    }
}

/// Scheme and host as the client sees them, also through a proxy that says so.
fn origin(headers: &HeaderMap) -> String {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let scheme = header("x-forwarded-proto").filter(|scheme| *scheme == "https").unwrap_or("http");
    let host = header("x-forwarded-host").or_else(|| header(HOST.as_str()));
    host.map_or(String::new(), |host| format!("{scheme}://{host}"))
}

/// The server as a request sees it that names this model, which may have to be loaded first.
/// OpenAI's names mean the one that is here.
async fn find(state: AppState, name: Option<String>) -> Result<AppState, ApiError> {
    let theirs = |name: &String| THEIR_MODELS.iter().any(|prefix| name.starts_with(prefix));
    let Some(name) = name.filter(|name| !theirs(name)) else { return Ok(state) };
    state.choose(&name).await
}
