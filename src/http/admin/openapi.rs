//! `/openapi.json`: the document that the routers make, with the operator's limits in it.

use std::sync::{Arc, Mutex, PoisonError};

use aide::axum::ApiRouter;
use aide::openapi::OpenApi;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Extension, Router};
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
    let document = Arc::new(Document { value: document, written: Mutex::default() });
    routes.route("/openapi.json", get(describe).layer(Extension(document)))
}

/// The document, which is not written for each request: that takes milliseconds of an async thread.
struct Document {
    value: Value,
    /// The model that was named last, and the text with its name.
    written: Mutex<Option<(String, Bytes)>>,
}

impl Document {
    fn text(&self, model: &str) -> Bytes {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, text)) = written.as_ref().filter(|(known, _)| known == model) {
            return text.clone();
        }
        let mut document = self.value.clone();
        document["info"]["description"] = format!("Image generation with {model}.").into();
        let text = Bytes::from(document.to_string());
        *written = Some((model.to_owned(), text.clone()));
        text
    }
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
    Extension(document): Extension<Arc<Document>>,
) -> Result<Response> {
    let model = model_of(&state.engine)?;
    let model = model.as_ref().map_or("the models that GET /v1/models lists", |model| &model.name);
    Ok(([(CONTENT_TYPE, "application/json")], document.text(model)).into_response())
}
