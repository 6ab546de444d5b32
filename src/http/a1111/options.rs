//! Options. Only the model can be changed.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::nothing::is_noop;
use super::unread;
use crate::http::admission::{Admitted, AdmittedSmall, text};
use crate::http::error::Result;
use crate::http::headers::warnings_header;
use crate::http::state::{AppState, model_of};
use crate::request::{self, Object, ValidationError, brief};

/// The options and their values.
fn options(state: &AppState) -> Result<Object> {
    let model = match state.checkpoint.get() {
        Some(name) => name,
        None => model_of(&state.engine)?.map_or_else(String::new, |model| model.name.clone()),
    };
    let hash = match state
        .models
        .engines()
        .iter()
        .find_map(|e| e.model().ok().filter(|m| m.name == model))
    {
        Some(info) => info.files.checkpoint.as_ref().and_then(|file| state.hashes.known(file)),
        None => None,
    };
    let options = json!({
        "sd_model_checkpoint": model,
        "sd_checkpoint_hash": hash.unwrap_or_default(),
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "randn_source": "CPU",
        "eta_noise_seed_delta": 0,
    });
    Ok(options.as_object().cloned().unwrap_or_default())
}

/// Rejects options that differ from their values, except the model. Returns those that are unknown.
pub(crate) fn check(state: &AppState, mut changes: Object) -> Result<Object> {
    for (name, value) in options(state)? {
        let is_negative = |new: &Value| new.as_f64().is_some_and(|number| number < 0.0);
        let asks = |new: &Value| !is_noop(new) || is_negative(new);
        let Some(new) = changes.remove(&name).filter(asks) else { continue };
        if name == "sd_model_checkpoint" {
            if !new.is_string() {
                let reason =
                    format!("must be the name of a model, not {}", brief(&new.to_string()));
                return Err(ValidationError::malformed(&name, reason).into());
            }
        } else if !is_same(&new, &value) {
            let reason = format!("cannot be set to {}; it is {value}", brief(&new.to_string()));
            return Err(ValidationError::range(&name, reason).into());
        }
    }
    Ok(changes)
}

/// Whether a client's value is that of an option. Clients write 1 as `1.0` and `"1"`, too.
fn is_same(new: &Value, value: &Value) -> bool {
    let number = |value: &Value| match value {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_f64(),
    };
    let text = |value: &Value| value.as_str().map(|text| text.trim().to_ascii_lowercase());
    let is_same_text = text(value).is_some_and(|known| text(new) == Some(known));
    new == value || is_same_text || value.is_number() && number(new) == number(value)
}

/// The name of a model out of one of AUTOMATIC1111's titles, `file.safetensors [0123456789]`.
pub(crate) async fn model_of_title(state: &AppState, title: String) -> Result<String> {
    if state.model_names().await?.contains(&title) {
        return Ok(title);
    }
    let bare = title.trim_end().strip_suffix(']').and_then(|text| text.rsplit_once(" ["));
    let bare = bare.map_or(title.as_str(), |(name, _)| name).trim();
    let endings = [".safetensors", ".ckpt", ".gguf"];
    let stem = endings.iter().find_map(|ending| bare.strip_suffix(ending));
    Ok(stem.unwrap_or(bare).to_owned())
}

/// `GET /sdapi/v1/options`.
pub(crate) async fn get_options(State(state): State<AppState>) -> Result<Json<Value>> {
    Ok(Json(options(&state)?.into()))
}

/// `POST /sdapi/v1/options`: clients return all options, one of them changed. The model is loaded
/// before the response, and becomes that of all requests of this API that name none. A header names
/// the options that are set and are none here.
pub(crate) async fn set_options(
    State(state): State<AppState>,
    AdmittedSmall(Admitted { body, slot, .. }): AdmittedSmall,
) -> Result<Response> {
    let deadline = slot.deadline;
    let changes = |body: &[u8]| Ok(request::object(text(body)?)?);
    let changes: Object = state.reader.parse(deadline, slot, body, changes).await?;
    let name = changes.get("sd_model_checkpoint").and_then(Value::as_str).map(str::to_owned);
    let unread = unread::of_options(&check(&state, changes)?);
    if let Some(title) = name.filter(|name| !name.is_empty()) {
        let name = model_of_title(&state, title).await?;
        if options(&state)?["sd_model_checkpoint"] != *name {
            state.choose(&name, deadline).await?;
            state.checkpoint.set(&name);
        }
    }
    Ok((warnings_header(&unread), Json(Value::Null)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_the_same_however_it_is_written() {
        for new in [json!(1), json!(1.0), json!("1"), json!(" 1.0 ")] {
            assert!(is_same(&new, &json!(1)), "{new}");
        }
        for (new, value) in [(json!(2), json!(1)), (json!(true), json!(1)), (json!(1), json!("1"))]
        {
            assert!(!is_same(&new, &value), "{new}");
        }
    }
}
