//! The route table, and the layers around it.

use std::sync::Arc;

use aide::axum::ApiRouter;
use axum::Router;
use axum::http::{Method, StatusCode};
use axum::middleware::{from_fn_with_state, map_response};
use tower::util::option_layer;

use super::error::{ApiError, Result};
use super::middleware::cors::cors;
use super::middleware::observe::observe;
use super::middleware::{auth, sagemaker_route};
use super::state::{ApiKey, AppState, HttpConfig};
use super::{a1111, admin, invocations, openai, page};
use crate::registry::ModelRegistry;

/// All routes. Those behind `lock` need a key if any are configured. The jobs of the data directory
/// are continued in tasks of their own; the error says why it cannot be used.
pub fn router(models: ModelRegistry, settings: HttpConfig) -> anyhow::Result<Router> {
    let keys: Arc<[ApiKey]> = settings.api_keys.as_slice().into();
    let lock = || from_fn_with_state(Arc::clone(&keys), auth::require);
    let cors = option_layer(cors(&settings.cors_origins));
    let state = AppState::new(models, settings)?;
    tokio::spawn(state.purge());
    if state.jobs.is_durable() {
        tokio::spawn(invocations::resume(state.clone()));
    }
    // Schemas that refer to no other are what the page at /docs can show.
    aide::generate::extract_schemas(false);
    let mut router = ApiRouter::new()
        .merge(page::routes())
        .merge(admin::routes())
        .merge(openai::files())
        .merge(invocations::open_routes());
    let mut locked = invocations::routes();
    if state.models.multi_model() {
        router =
            router.merge(admin::multi_model_routes()).merge(invocations::loaded_model_routes());
    } else {
        locked = locked.merge(invocations::named_model_routes());
    }
    let errors = map_response(openai::errors);
    let router = router
        .merge(locked.route_layer(lock()))
        .merge(openai::routes().route_layer(lock()).route_layer(errors))
        .merge(a1111::routes().route_layer(lock()).route_layer(map_response(a1111::errors)));
    let router = admin::with_document(router, &state)
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(other_method)
        .layer(cors)
        .layer(from_fn_with_state(state.engine.clone(), observe));
    Ok(sagemaker_route::by_attribute(router.with_state(state)))
}

/// A method that a route does not support. OPTIONS is no error: the response is the header `Allow`,
/// which SillyTavern uses to find out whether there is a server.
async fn other_method(method: Method) -> Result<StatusCode> {
    if method == Method::OPTIONS { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::Method) }
}
