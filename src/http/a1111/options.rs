//! Options. Only the model can be changed.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::nothing::is_noop;
use crate::http::admission::{Admitted, AdmittedSmall, text};
use crate::http::error::Result;
use crate::http::state::{AppState, model_of};
use crate::request::{self, Object, ValidationError, brief};

/// The options and their values.
fn options(state: &AppState) -> Result<Object> {
    let model = match state.checkpoint.get() {
        Some(name) => name,
        None => model_of(&state.engine)?.map_or_else(String::new, |model| model.name.clone()),
    };
    let options = json!({
        "sd_model_checkpoint": model,
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "randn_source": "CPU",
        "eta_noise_seed_delta": 0,
    });
    Ok(options.as_object().cloned().unwrap_or_default())
}

/// Rejects options that differ from their values, except the model.
pub(crate) fn check(state: &AppState, changes: &Object) -> Result<()> {
    for (name, value) in options(state)? {
        let Some(new) = changes.get(&name).filter(|new| !is_noop(new)) else { continue };
        if *new != value && name != "sd_model_checkpoint" {
            let reason = format!("cannot be set to {}; it is {value}", brief(&new.to_string()));
            return Err(ValidationError::range(&name, reason).into());
        }
    }
    Ok(())
}

/// `GET /sdapi/v1/options`.
pub(crate) async fn get_options(State(state): State<AppState>) -> Result<Json<Value>> {
    Ok(Json(options(&state)?.into()))
}

/// `POST /sdapi/v1/options`: clients return all options, one of them changed. The model is loaded
/// before the response, and becomes that of all requests of this API that name none.
pub(crate) async fn set_options(
    State(state): State<AppState>,
    AdmittedSmall(Admitted { body, slot, .. }): AdmittedSmall,
) -> Result<Json<Value>> {
    let deadline = slot.deadline;
    let changes = |body: &[u8]| Ok(request::object(text(body)?)?);
    let changes: Object = state.reader.parse(deadline, slot, body, changes).await?;
    check(&state, &changes)?;
    let current = &options(&state)?["sd_model_checkpoint"];
    let name = changes.get("sd_model_checkpoint").and_then(Value::as_str);
    if let Some(name) = name.filter(|name| !name.is_empty() && *current != **name) {
        state.choose(name, deadline).await?;
        state.checkpoint.set(name);
    }
    Ok(Json(Value::Null))
}
