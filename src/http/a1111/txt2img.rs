//! Text to picture and picture to picture.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use super::info::info;
use super::options::check;
use super::translate::{InitImage, Object, overrides, translate};
use crate::engine::GeneratedImage;
use crate::http::admission::Admitted;
use crate::http::drawing::{Drawing, ReplyFormat};
use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::http::store::InFlightRequest;
use crate::image::Format;
use crate::request::Draw;

/// `POST /sdapi/v1/txt2img`.
pub(crate) async fn txt2img(
    State(state): State<AppState>,
    admitted: Admitted,
) -> Result<Response, ApiError> {
    draw(state, admitted, false).await
}

/// `POST /sdapi/v1/img2img`.
pub(crate) async fn img2img(
    State(state): State<AppState>,
    admitted: Admitted,
) -> Result<Response, ApiError> {
    draw(state, admitted, true).await
}

/// Draws and answers as AUTOMATIC1111 does.
async fn draw(
    state: AppState,
    admitted: Admitted,
    from_picture: bool,
) -> Result<Response, ApiError> {
    let mut theirs = admitted.json()?;
    let mut echo: Object = serde_json::from_slice(&admitted.body).unwrap_or_default();
    let Admitted { client, deadline, slot, .. } = admitted;
    let send_images = theirs.flag(&["send_images"])?.unwrap_or(true);
    let task = theirs.text(&["force_task_id"], 256)?;
    let mut notes = Vec::new();
    let start = match from_picture {
        true => Some(InitImage::take(&mut theirs, &mut notes)?),
        false => None,
    };
    let (mut settings, model) = overrides(&mut theirs)?;
    let state = match model.or_else(|| state.checkpoint.get()) {
        Some(model) => state.choose(&model).await?,
        None => state,
    };
    let format = settings.remove("samples_format");
    check(&state, &settings)?;
    let mut fields = translate(&state, theirs, from_picture)?;
    if let Some(format) = format {
        fields.add("output_format", "override_settings.samples_format", format);
    }
    if let Some(start) = start {
        // As there, pictures do not go back to where they came from.
        echo.retain(|name, _| !["init_images", "mask"].contains(&name.as_str()));
        start.write_into(&state, &slot, &mut fields).await?;
    }
    let json = |draw: &Draw, _| Ok(ReplyFormat::Json(draw.format.unwrap_or(Format::Png)));
    let mut asked = Drawing::prepare(&state, &slot, vec![fields], json).await?;
    asked.preview = true;
    let ticket = asked.submit(&client, Some(deadline))?;
    let begun = InFlightRequest::new(&state.engine, &ticket, client, task, &asked.specs);
    let _in_flight = state.in_flight.insert(begun);
    let pictures = ticket.wait().await?;
    // As there, an interrupted request is answered with what there is, and with 200 if there is
    // nothing: clients take any other status for a failure of the server.
    if pictures.is_empty() {
        notes.push("interrupted before the first step was finished".into());
        asked.specs.truncate(1);
    } else {
        asked.specs = pictures.iter().map(|drawn| asked.specs[drawn.index].clone()).collect();
    }
    let render = move |asked: &Drawing, pictures: &[GeneratedImage], files: Vec<Vec<u8>>| {
        let images: Vec<String> = files.iter().map(|file| BASE64_STANDARD.encode(file)).collect();
        json!({
            "images": if send_images { images } else { Vec::new() },
            "parameters": echo,
            "info": info(asked, pictures, notes).to_string(),
        })
    };
    Ok(Json(asked.encode(pictures, render).await?).into_response())
}
