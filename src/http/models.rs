//! Models by name: SageMaker's multi-model contract below `/models`, and the choice of a model for
//! the dialects that name one.

use std::path::PathBuf;

use axum::Json;
use axum::extract::{Path, Request};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::{State, sagemaker};
use crate::api::Invalid;
use crate::models::{Loaded, Refusal};

/// Of a request to load a model: two short strings.
const MAX_BODY_BYTES: usize = 1 << 16;

/// A request to load a model.
#[derive(Debug, Deserialize)]
struct Load {
    /// Made up by SageMaker.
    model_name: String,
    /// A directory of this container.
    url: PathBuf,
}

/// `POST /models`: 409 when it is loaded, 507 when there is no room, so that SageMaker unloads
/// others and comes back.
pub(super) async fn load(state: State, request: Request) -> Result<StatusCode, ApiError> {
    let body = axum::body::to_bytes(request.into_body(), MAX_BODY_BYTES).await;
    let body = body.map_err(|_| ApiError::TooLarge(MAX_BODY_BYTES))?;
    let load: Load = serde_json::from_slice(&body)
        .map_err(|error| Invalid::body(format!("model_name and url are needed: {error}")))?;
    state.models.load(&load.model_name, load.url).await?;
    Ok(StatusCode::OK)
}

/// `GET /models`. There are few enough for one page.
pub(super) async fn list(state: State) -> Json<Value> {
    let models: Vec<Value> = state.models.loaded().iter().map(describe).collect();
    Json(json!({ "models": models }))
}

/// `GET /models/{name}`.
pub(super) async fn show(state: State, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let loaded = state.models.loaded();
    let model = loaded.iter().find(|model| model.name == name);
    model.map(describe).map(Json).ok_or(ApiError::NoModel(name))
}

/// `DELETE /models/{name}`: the memory is free when this is answered.
pub(super) async fn unload(state: State, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    state.models.unload(&name).await?;
    Ok(StatusCode::OK)
}

/// `POST /models/{name}/invoke`: `/invocations` of that model.
pub(super) async fn invoke(
    state: State,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let chosen = state.models.get(&name)?;
    sagemaker::invocations(state.on(chosen), request).await
}

/// `POST /models/{owner}/{name}`, as Hugging Face's clients call a model that has an address.
pub(super) async fn named(
    state: State,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let state = choose(&state, &name).await?;
    sagemaker::invocations(state, request).await
}

/// The server as a request sees it that names a model, which may have to be loaded first.
pub(super) async fn choose(state: &State, name: &str) -> Result<State, ApiError> {
    state.models.choose(name).await.map(|chosen| state.on(chosen)).map_err(
        |refusal| match refusal {
            Refusal::Unknown(name) => ApiError::NoModel(name),
            other => other.into(),
        },
    )
}

fn describe(model: &Loaded) -> Value {
    json!({ "modelName": model.name, "modelUrl": model.path })
}
