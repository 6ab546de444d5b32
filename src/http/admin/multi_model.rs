//! SageMaker's multi-model contract below `/models`.

use std::path::{Component, PathBuf};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::Instrument as _;

use crate::http::admission::AdmittedSmall;
use crate::http::error::{ApiError, Result};
use crate::http::extract::PathName;
use crate::http::state::AppState;
use crate::registry::{LoadedModel, RegistryError};
use crate::request::ValidationError;

/// Maximum length of a model's name. SageMaker's own are hexadecimal hashes.
const MAX_NAME_CHARS: usize = 256;

/// A request to load a model.
#[derive(Debug, Deserialize, JsonSchema)]
struct LoadModelBody {
    /// The name, assigned by SageMaker: 1 to 256 visible ASCII characters without `/`.
    model_name: Option<String>,
    /// A directory or file in the container, below `--multi-model-root`.
    url: Option<PathBuf>,
}

/// `POST /models`: 409 if it is loaded already, 507 if there is no room, after which SageMaker
/// unloads others and retries. At the deadline of the request, 504; loading goes on.
pub(crate) async fn load(
    State(state): State<AppState>,
    AdmittedSmall(mut admitted): AdmittedSmall,
) -> Result<StatusCode> {
    let load: LoadModelBody = admitted.json(&state).await?.read(&state.settings.limits)?;
    let missing = |name: &'static str| move || ValidationError::malformed(name, "is required");
    let name = load.model_name.ok_or_else(missing("model_name"))?;
    if !is_name(&name) {
        let reason = format!("must have 1 to {MAX_NAME_CHARS} visible ASCII characters without /");
        return Err(ValidationError::malformed("model_name", reason).into());
    }
    let url = load.url.ok_or_else(missing("url"))?;
    let root = state.models.multi_model_root();
    let climbs = url.components().any(|part| part == Component::ParentDir);
    if climbs || !url.starts_with(root) || url == root {
        let reason = format!("must be a path below {}; see --multi-model-root", root.display());
        return Err(ValidationError::malformed("url", reason).into());
    }
    let models = state.models.clone();
    let load = async move { models.load(&name, url).await };
    let load = tokio::spawn(load.in_current_span());
    let deadline = admitted.slot.deadline;
    let loaded = deadline.wait(load).await;
    let loaded = loaded.map_err(|_| ApiError::StillLoading(deadline.limit))?;
    // It ends otherwise only with the process.
    loaded.unwrap_or(Err(RegistryError::Stopping))?;
    Ok(StatusCode::OK)
}

/// Whether it fits a path of one segment, a list and a line of the log.
fn is_name(name: &str) -> bool {
    let fits = |c: u8| c.is_ascii_graphic() && c != b'/';
    (1..=MAX_NAME_CHARS).contains(&name.len()) && name.bytes().all(fits)
}

/// `GET /models`, in a single page.
pub(crate) async fn list(State(state): State<AppState>) -> Json<Value> {
    let models: Vec<Value> = state.models.loaded().iter().map(describe).collect();
    Json(json!({ "models": models }))
}

/// `GET /models/{name}`.
pub(crate) async fn show(
    State(state): State<AppState>,
    PathName(name): PathName,
) -> Result<Json<Value>> {
    let loaded = state.models.loaded();
    let model = loaded.iter().find(|model| model.name == name);
    model.map(describe).map(Json).ok_or(ApiError::NoModel(name))
}

/// `DELETE /models/{name}`: the memory is free when the response is sent. Unloading completes even
/// if the client disconnects.
pub(crate) async fn unload(
    State(state): State<AppState>,
    PathName(name): PathName,
) -> Result<StatusCode> {
    state.models.unload(&name).await?;
    Ok(StatusCode::OK)
}

fn describe(model: &LoadedModel) -> Value {
    json!({ "modelName": model.name, "modelUrl": model.path })
}
