//! Text-to-image and image-to-image.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use super::info::info;
use super::options::check;
use super::request::{Common, HiresPass, InitImage};
use crate::engine::GeneratedImage;
use crate::http::admission::Admitted;
use crate::http::drawing::{Drawing, ReplyFormat};
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::http::store::InFlightRequest;
use crate::image::Format;
use crate::request::{DrawRequest, ValidationError};

/// `POST /sdapi/v1/txt2img`.
pub(crate) async fn txt2img(State(state): State<AppState>, admitted: Admitted) -> Result<Response> {
    draw(state, admitted, false).await
}

/// `POST /sdapi/v1/img2img`.
pub(crate) async fn img2img(State(state): State<AppState>, admitted: Admitted) -> Result<Response> {
    draw(state, admitted, true).await
}

/// Generates images and responds as AUTOMATIC1111 does.
async fn draw(state: AppState, admitted: Admitted, from_picture: bool) -> Result<Response> {
    let mut fields = admitted.json()?;
    let Admitted { client, deadline, slot, .. } = admitted;
    let mut parameters = fields.object();
    let limits = &state.settings.limits;
    let mut common = Common::read(&mut fields, limits)?;
    let options = common.override_settings.as_mut();
    let model = options.and_then(|options| options.sd_model_checkpoint.take());
    let state = match model.filter(|name| !name.is_empty()).or_else(|| state.checkpoint.get()) {
        Some(model) => state.choose(&model).await?,
        None => state.clone(),
    };
    if let Some(options) = &common.override_settings {
        check(&state, &options.others)?;
    }
    let (task, send_images) = (common.force_task_id.take(), common.send_images.unwrap_or(true));
    let has_hires = common.has_hires();
    let mut draw = common.into_draw()?;
    let mut notes = Vec::new();
    if from_picture && has_hires {
        return Err(ValidationError::range("enable_hr", "is supported for txt2img only").into());
    } else if from_picture {
        notes = InitImage::read(&mut fields, limits)?.add_to(&mut draw)?;
        // As there, images do not go back to where they came from.
        parameters.retain(|name, _| !["init_images", "mask"].contains(&name.as_str()));
    } else if has_hires {
        let model = state.engine.model()?;
        HiresPass::read(&mut fields, limits)?.add_to(&mut draw, limits, &model);
    }
    let json = |draw: &DrawRequest, _| Ok(ReplyFormat::Json(draw.format()?.unwrap_or(Format::Png)));
    let mut drawing = Drawing::prepare(&state, &slot, vec![draw], json).await?;
    drawing.preview = true;
    let ticket = drawing.submit(&client, Some(deadline))?;
    let request = InFlightRequest::new(&state.engine, &ticket, client, task, &drawing.specs);
    let _in_flight = state.in_flight.insert(request);
    let pictures = ticket.wait().await?;
    // As there, an interrupted request is answered with what there is, and with 200 if there is
    // nothing: clients take any other status for a failure of the server.
    if pictures.is_empty() {
        notes.push("interrupted before the first step was finished".into());
        drawing.specs.truncate(1);
    } else {
        drawing.specs = pictures.iter().map(|drawn| drawing.specs[drawn.index].clone()).collect();
    }
    let render = move |drawing: &Drawing, pictures: &[GeneratedImage], files: Vec<Vec<u8>>| {
        let images: Vec<String> = files.iter().map(|file| BASE64_STANDARD.encode(file)).collect();
        json!({
            "images": if send_images { images } else { Vec::new() },
            "parameters": parameters,
            "info": info(drawing, pictures, notes).to_string(),
        })
    };
    Ok(Json(drawing.encode(pictures, render).await?).into_response())
}
