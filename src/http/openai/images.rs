//! Generations and edits.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};

use super::form::Form;
use super::models::chosen;
use super::render::{ImageUrls, ReplyOptions, common, data, now};
use super::request::{self, OpenAiOptions, ResponseFormat};
use super::stream::stream;
use crate::engine::Previews;
use crate::http::admission::Admitted;
use crate::http::drawing::{Drawing, ReplyFormat};
use crate::http::error::Result;
use crate::http::links::Links;
use crate::http::state::AppState;
use crate::image::Format;
use crate::request::{DrawRequest, ImageFile, MaskArea, ValidationError};

/// `POST /v1/images/generations`.
pub(crate) async fn generations(
    State(state): State<AppState>,
    links: Links,
    mut admitted: Admitted,
) -> Result<Response> {
    let (options, draw) = request::read(admitted.json(&state).await?, &state.settings.limits)?;
    generate(state, links, admitted, options, draw, "image_generation").await
}

/// `POST /v1/images/edits`: a form or JSON with an image and a mask. Transparent areas of the mask, or else
/// of the image, are inpainted. If there are none, the request is image-to-image.
pub(crate) async fn edits(
    State(state): State<AppState>,
    links: Links,
    mut admitted: Admitted,
) -> Result<Response> {
    let (options, mut draw, mask) = read_form(&state, &mut admitted).await?;
    if mask.is_some() && draw.mask.is_some() {
        return Err(ValidationError::malformed(draw.names.of("mask"), "is given twice").into());
    }
    // The native `mask_image` keeps its meaning: white areas are inpainted.
    if draw.mask.is_none() {
        draw.mask = mask;
        draw.mask_area = MaskArea::Transparent;
    }
    generate(state, links, admitted, options, draw, "image_edit").await
}

/// `POST /v1/images/variations`: a form with an image, from which image-to-image starts without a
/// prompt, unless one is given.
pub(crate) async fn variations(
    State(state): State<AppState>,
    links: Links,
    mut admitted: Admitted,
) -> Result<Response> {
    let (options, mut draw, mask) = read_form(&state, &mut admitted).await?;
    if mask.is_some() {
        return Err(ValidationError::malformed("mask", "is for edits only").into());
    }
    draw.prompt.get_or_insert_default();
    generate(state, links, admitted, options, draw, "image_variation").await
}

/// Reads a request with an image: its fields, which hold the image, and the mask.
async fn read_form(
    state: &AppState,
    admitted: &mut Admitted,
) -> Result<(OpenAiOptions, DrawRequest, Option<ImageFile>)> {
    let Form { fields, image, mask } = Form::read(state, admitted).await?;
    let image = image.ok_or_else(|| ValidationError::malformed("image", "is required"))?;
    let (options, mut draw) = request::read(fields, &state.settings.limits)?;
    if draw.image.is_some() {
        return Err(ValidationError::malformed(draw.names.of("image"), "is given twice").into());
    }
    draw.image = Some(image);
    Ok((options, draw, mask))
}

/// Generates the images and responds.
async fn generate(
    state: AppState,
    links: Links,
    admitted: Admitted,
    options: OpenAiOptions,
    draw: DrawRequest,
    kind: &'static str,
) -> Result<Response> {
    let Admitted { client, stream_deadline, mut slot, .. } = admitted;
    let state = chosen(state, options.model, &slot).await?;
    let is_url = options.response_format == Some(ResponseFormat::Url);
    let urls = is_url.then(|| ImageUrls { base: links.base(), client: client.clone() });
    let (compression, parts) = (options.output_compression, options.partial_images.unwrap_or(0));
    let options = ReplyOptions { kind, urls, quality: options.quality };
    let drawing = Drawing::prepare(&state, &mut slot, vec![draw], |draw, _| {
        let format = draw.format()?.unwrap_or(Format::Png);
        Ok(match draw.stream {
            Some(true) => ReplyFormat::Events(format),
            _ => ReplyFormat::Json(format),
        })
    });
    let mut drawing = drawing.await?;
    drawing.quality = quality(compression, drawing.reply.format())?;
    let mut response = common(&drawing, options.quality.as_deref());
    if let ReplyFormat::Events(_) = drawing.reply {
        drawing.previews = if parts > 0 { Previews::Parts(parts) } else { Previews::None };
        let ticket = drawing.submit(&client, stream_deadline)?;
        return Ok(stream(state, drawing, ticket, options, response, (stream_deadline, slot)));
    }
    let images = drawing.submit(&client, slot.deadline)?.wait().await;
    let images = images.map_err(|error| drawing.failed(error, slot.deadline))?;
    let (data, usage) = data(&state, drawing, images, options).await?;
    response["created"] = now().into();
    response["usage"] = usage.json(data.len());
    response["data"] = data.into();
    Ok(Json(response).into_response())
}

/// The quality of an `output_compression`. As there, PNG has none. WebP of 100 is lossless.
fn quality(compression: Option<u8>, format: Format) -> Result<Option<u8>, ValidationError> {
    match (compression, format) {
        (None, _) | (Some(100), Format::Png | Format::Webp) => Ok(None),
        (Some(percent), Format::Jpeg | Format::Webp) => Ok(Some(percent.max(1))),
        (Some(_), Format::Png) => {
            let reason = "is for jpeg and webp: png is lossless";
            Err(ValidationError::range("output_compression", reason))
        }
    }
}
