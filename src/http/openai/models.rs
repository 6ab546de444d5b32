//! OpenAI's list of models, and the names that mean one.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::http::admission::RequestSlot;
use crate::http::error::{ApiError, Result};
use crate::http::extract::PathName;
use crate::http::state::AppState;

/// Beginnings of OpenAI's own names. They mean the default model.
const OPENAI: [&str; 3] = ["dall-e-", "gpt-image-", "chatgpt-image-"];

/// What gateways put before them.
const PROVIDER: &str = "openai/";

/// `GET /v1/models`: the default model, and those that can be loaded.
pub(crate) async fn models(State(state): State<AppState>) -> Result<Json<Value>> {
    let cards: Vec<Value> = state.model_names().await?.iter().map(|name| card(name)).collect();
    Ok(Json(json!({ "object": "list", "data": cards })))
}

/// `GET /v1/models/{id}`; an id may hold slashes. OpenAI's names are those of the default model,
/// which is the card's `root`.
pub(crate) async fn model(
    State(state): State<AppState>,
    PathName(id): PathName,
) -> Result<Json<Value>> {
    let names = state.model_names().await?;
    if names.contains(&id) {
        return Ok(Json(card(&id)));
    }
    match state.engine.model() {
        Ok(default) if is_openais(&id) => {
            let mut card = card(&id);
            card["root"] = default.name.clone().into();
            Ok(Json(card))
        }
        _ => Err(ApiError::NoModel(id)),
    }
}

/// The state for a request that names this model, or none.
pub(super) async fn chosen(
    state: AppState,
    name: Option<String>,
    slot: &RequestSlot,
) -> Result<AppState> {
    match name {
        None => Ok(state),
        // A model of the directory may have such a name, too.
        Some(name) if is_openais(&name) && !state.model_names().await?.contains(&name) => Ok(state),
        Some(name) => state.choose(&name, slot.deadline).await,
    }
}

/// Whether this is one of OpenAI's own names.
fn is_openais(name: &str) -> bool {
    let name = name.trim().to_ascii_lowercase();
    let name = name.strip_prefix(PROVIDER).unwrap_or(&name);
    OPENAI.iter().any(|prefix| name.starts_with(prefix))
}

fn card(id: &str) -> Value {
    json!({ "id": id, "object": "model", "created": 0, "owned_by": "sd-server" })
}
