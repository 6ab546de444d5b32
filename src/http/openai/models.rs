//! OpenAI's list of models.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::http::error::{ApiError, Result};
use crate::http::extract::PathName;
use crate::http::state::AppState;

/// `GET /v1/models`: the default model, and those that can be loaded.
pub(crate) async fn models(State(state): State<AppState>) -> Result<Json<Value>> {
    let cards: Vec<Value> = state.model_names().await?.iter().map(|name| card(name)).collect();
    Ok(Json(json!({ "object": "list", "data": cards })))
}

/// `GET /v1/models/{id}`; an id may hold slashes.
pub(crate) async fn model(
    State(state): State<AppState>,
    PathName(id): PathName,
) -> Result<Json<Value>> {
    if state.model_names().await?.contains(&id) {
        Ok(Json(card(&id)))
    } else {
        Err(ApiError::NoModel(id))
    }
}

fn card(id: &str) -> Value {
    json!({ "id": id, "object": "model", "created": 0, "owned_by": "sd-server" })
}
