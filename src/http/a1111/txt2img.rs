//! Text-to-image and image-to-image.

use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use sd_models::ModelInfo;
use serde_json::{Value, json};

use super::hires::HiresPass;
use super::info::{Batches, info};
use super::init_image::InitImage;
use super::options::{check, model_of_title};
use super::request::{Common, check_clip_skip};
use super::sampler::take_euler;
use super::scripts::{self, Units};
use super::{infotext, unread};
use crate::engine::{GeneratedImage, Previews};
use crate::http::admission::Admitted;
use crate::http::deadline::Deadline;
use crate::http::drawing::{Drawing, ReplyFormat, base64};
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::http::store::InFlightRequest;
use crate::image::Format;
use crate::request::{DrawRequest, Fields, Object, OneOrMany, Transparency, ValidationError};

/// `POST /sdapi/v1/txt2img`.
pub(crate) async fn txt2img(State(state): State<AppState>, admitted: Admitted) -> Result<Response> {
    draw(state, admitted, false).await
}

/// `POST /sdapi/v1/img2img`.
pub(crate) async fn img2img(State(state): State<AppState>, admitted: Admitted) -> Result<Response> {
    draw(state, admitted, true).await
}

/// Generates images and responds as AUTOMATIC1111 does.
/// The model of this title, or else that of the options.
async fn chosen(state: &AppState, title: Option<String>, deadline: Deadline) -> Result<AppState> {
    let model = match title.filter(|title| !title.trim().is_empty()) {
        Some(title) => Some(model_of_title(state, title).await?),
        None => state.checkpoint.get(),
    };
    match model {
        Some(model) => state.choose(&model, deadline).await,
        None => Ok(state.clone()),
    }
}

/// Takes the checkpoint of the hires pass out of the fields if it is the model itself.
async fn take_own_checkpoint(
    state: &AppState,
    fields: &mut Fields,
    parameters: &Object,
    model: &ModelInfo,
) -> Result<()> {
    let title = parameters.get("hr_checkpoint_name").and_then(Value::as_str);
    if let Some(title) = title
        && model_of_title(state, title.to_owned()).await? == model.name
    {
        fields.take(&["hr_checkpoint_name"])?;
    }
    Ok(())
}

async fn draw(state: AppState, mut admitted: Admitted, is_img2img: bool) -> Result<Response> {
    let began = SystemTime::now();
    let mut fields = admitted.json(&state).await?;
    let Admitted { client, mut slot, .. } = admitted;
    let unread_of_infotext = infotext::apply(&mut fields, is_img2img)?;
    let mut parameters = fields.object();
    let limits = &state.settings.limits;
    let Units { nets, adapters } = scripts::read(&mut fields, limits)?;
    let mut common = Common::read(&mut fields, limits)?;
    let (size, count) = (common.batch_size.unwrap_or(1), common.n_iter.unwrap_or(1));
    let batches = Batches { size, count, began };
    let options = common.override_settings.as_mut();
    let model = options.and_then(|options| options.sd_model_checkpoint.take());
    let state = chosen(&state, model, slot.deadline).await?;
    let options = common.override_settings.as_mut();
    let options = options.map(|options| std::mem::take(&mut options.others));
    let options = options.map(|options| check(&state, options)).transpose()?;
    if let Some(title) = common.refiner_checkpoint.take() {
        common.refiner_checkpoint = Some(model_of_title(&state, title).await?);
    }
    let (task, send_images) = (common.force_task_id.take(), common.send_images.unwrap_or(true));
    let (has_hires, sampler) = (common.has_hires(), common.sampler());
    let mut draw = common.into_draw()?;
    draw.controlnets = Some(nets).filter(|nets| !nets.is_empty());
    draw.ip_adapter = Some(OneOrMany::Many(adapters)).filter(|own| !own.all().is_empty());
    // Of control pictures; those of img2img follow.
    draw.transparency = Transparency::White;
    if is_img2img && has_hires {
        return Err(ValidationError::range("enable_hr", "is supported for txt2img only").into());
    } else if is_img2img {
        InitImage::read(&mut fields, limits)?.add_to(&mut draw)?;
        // As there, input images are not returned.
        parameters.retain(|name, _| !["init_images", "mask"].contains(&name.as_str()));
    } else if has_hires {
        let model = state.engine.model()?;
        take_own_checkpoint(&state, &mut fields, &parameters, &model).await?;
        HiresPass::read(&mut fields, &parameters, limits)?.add_to(&mut draw, &sampler, &model)?;
    }
    if draw.scheduler.is_none() && draw.schedule.is_some() {
        take_euler(&mut draw, &*state.engine.model()?);
    }
    if draw.clip_skip.is_some() {
        check_clip_skip(&mut draw, &*state.engine.model()?)?;
    }
    draw.warnings.extend(unread_of_infotext);
    draw.warnings.extend(unread::warnings(&fields, options.as_ref(), has_hires));
    // What is unknown may be large.
    drop(fields);
    let json = |draw: &DrawRequest, _| Ok(ReplyFormat::Json(draw.format()?.unwrap_or(Format::Png)));
    let mut drawing = Drawing::prepare(&state, &mut slot, vec![draw], json).await?;
    drawing.previews = Previews::Live;
    let ticket = drawing.submit(&client, slot.deadline)?;
    let known = (began, batches.count);
    let request = InFlightRequest::new(&state.engine, &ticket, client, task, known, &drawing.specs);
    let _in_flight = state.in_flight.insert(request);
    let images = ticket.wait().await;
    let images = images.map_err(|error| drawing.failed(error, slot.deadline))?;
    keep_drawn(&mut drawing, &images);
    let response = drawing.encode(images, move |drawing, images, files| -> Result<_> {
        let mut images_of_reply = if send_images { base64(&files) } else { Vec::new() };
        if send_images {
            images_of_reply.extend(base64(&drawing.map_files()?));
        }
        Ok(json!({
            "images": images_of_reply,
            "parameters": parameters,
            "info": info(drawing, images, batches).to_string(),
        }))
    });
    Ok(Json(response.await??).into_response())
}

/// Leaves the specs of the images that were drawn. As there, an interrupted request returns its images,
/// and 200 even if there are none: clients take any other status for a failure of the server.
fn keep_drawn(drawing: &mut Drawing, images: &[GeneratedImage]) {
    if images.is_empty() {
        drawing.warnings.push("interrupted before the first step was finished".into());
        drawing.specs.truncate(1);
    } else {
        drawing.specs = images.iter().map(|image| drawing.specs[image.index].clone()).collect();
    }
}
