//! `/openapi.json`: the document that the routers make, with the operator's limits in it.

use std::sync::Arc;

use aide::axum::ApiRouter;
use aide::openapi::OpenApi;
use axum::extract::State;
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde_json::{Map, Value, json};

use crate::http::error::Result;
use crate::http::state::{AppState, model_of};
use crate::request;

/// The routes with one that describes them.
pub(crate) fn with_document(routes: ApiRouter<AppState>, state: &AppState) -> Router<AppState> {
    let mut api = OpenApi::default();
    let routes = routes.finish_api(&mut api);
    let tags = ["native", "OpenAI", "AUTOMATIC1111", "server"].map(|name| json!({ "name": name }));
    let mut document = json!({
        "openapi": "3.1.0",
        "info": { "title": "sd-server", "version": env!("CARGO_PKG_VERSION") },
        "tags": tags,
        "paths": api.paths,
        "components": { "securitySchemes": {
            "bearer": { "type": "http", "scheme": "bearer" },
            "basic": { "type": "http", "scheme": "basic" },
            "key": { "type": "apiKey", "in": "header", "name": "X-Api-Key" },
        } },
    });
    request::publish(&mut document, &state.settings.limits);
    if let Some(paths) = document["paths"].as_object_mut() {
        *paths = std::mem::take(paths).into_iter().map(with_parameter).collect();
    }
    routes.route("/openapi.json", get(describe).layer(Extension(Arc::new(document))))
}

/// A path with its parameter described. OpenAPI has no wildcards.
fn with_parameter((path, mut item): (String, Value)) -> (String, Value) {
    let path = path.replace("{*", "{");
    if let Some(name) = path.split(['{', '}']).nth(1) {
        let schema = json!({ "type": "string", "minLength": 1 });
        for operation in item.as_object_mut().into_iter().flat_map(Map::values_mut) {
            operation["parameters"] =
                json!([{ "name": name, "in": "path", "required": true, "schema": schema }]);
        }
    }
    (path, item)
}

/// `GET /openapi.json`.
async fn describe(
    State(state): State<AppState>,
    Extension(document): Extension<Arc<Value>>,
) -> Result<Json<Value>> {
    let model = model_of(&state.engine)?;
    let model = model.as_ref().map_or("the models that GET /v1/models lists", |model| &model.name);
    let mut document = Value::clone(&document);
    document["info"]["description"] = format!("Image generation with {model}.").into();
    Ok(Json(document))
}
