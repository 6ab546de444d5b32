//! The route table, and the layers around it.

use std::sync::Arc;
use std::time::Duration;

use aide::axum::ApiRouter;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use tokio::time::Instant;
use tower::util::option_layer;

use super::deadline::Timeout;
use super::error::{ApiError, Result};
use super::middleware::cors::cors;
use super::middleware::observe::observe;
use super::middleware::{auth, forwarded, origin, sagemaker_route};
use super::state::{AppState, HttpConfig};
use super::store::JobStore;
use super::{a1111, admin, invocations, openai, page, unsent};
use crate::registry::ModelRegistry;

/// All routes, with the jobs of the data directory; the error says why it cannot be used.
pub fn router(models: ModelRegistry, settings: HttpConfig) -> anyhow::Result<Router> {
    let jobs = settings.open_jobs()?;
    Ok(router_with(models, settings, jobs))
}

/// All routes. Those behind `lock` need a key if any are configured. Unfinished jobs of earlier
/// processes are continued in tasks of their own. Requests of web pages are checked before anything
/// else, so also on routes that do not exist.
pub(crate) fn router_with(models: ModelRegistry, settings: HttpConfig, jobs: JobStore) -> Router {
    let access = Arc::new(settings.access.clone());
    let lock = || from_fn_with_state(Arc::clone(&access), auth::require);
    let cors = option_layer(cors(&access.cors_origins));
    let (log_messages, timeout) = (settings.log_prompts, settings.request_timeout);
    let state = AppState::new(models, settings, jobs);
    tokio::spawn(state.purge());
    tokio::spawn(state.models.unload_unused());
    if state.jobs.is_durable() {
        tokio::spawn(invocations::resume(state.clone()));
    }
    // Schemas that refer to no other are what the page at /docs can show.
    aide::generate::extract_schemas(false);
    let router = ApiRouter::new()
        .merge(page::routes())
        .merge(admin::routes())
        .merge(openai::files())
        .merge(invocations::open_routes());
    let weigh = || from_fn_with_state(state.clone(), unsent::weigh);
    let mut sagemaker = invocations::sagemaker_routes(access.lock_invocations);
    let mut locked = invocations::routes();
    if state.models.multi_model() {
        sagemaker =
            sagemaker.merge(admin::multi_model_routes()).merge(invocations::loaded_model_routes());
    } else {
        locked = locked.merge(invocations::named_model_routes());
    }
    sagemaker = sagemaker.route_layer(weigh());
    if access.lock_invocations {
        sagemaker = sagemaker.route_layer(lock());
    }
    let router = router
        .merge(sagemaker)
        .merge(locked.route_layer(weigh()).route_layer(lock()))
        .merge(openai::routes().route_layer(weigh()).route_layer(lock()))
        .merge(a1111::routes().route_layer(weigh()).route_layer(lock()));
    let router = admin::with_document(router, &state)
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(other_method)
        .layer(from_fn_with_state(timeout, in_time))
        .layer(from_fn_with_state(Arc::clone(&access), origin::check))
        .layer(cors)
        .layer(from_fn(in_format_of_api))
        .layer(from_fn_with_state((state.engine.clone(), log_messages), observe))
        .layer(from_fn_with_state(access, forwarded::resolve));
    sagemaker_route::by_attribute(router.with_state(state))
}

/// Ends requests without a body at their deadline: what they wait for may be a directory or the
/// database on a slow disk. Those with a body have their deadline from admission.
async fn in_time(State(most): State<Duration>, request: Request, next: Next) -> Result<Response> {
    if request.method() == Method::POST {
        return Ok(next.run(request).await);
    }
    let timeout = Timeout::of(request.headers(), "--request-timeout-ms", most)?;
    timeout.after(Instant::now()).wait(next.run(request)).await
}

/// Renders errors in the format of the API that the path belongs to, wherever they come from: there
/// may be no such route, or a layer in front of it may have refused the request.
async fn in_format_of_api(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let is_below = |folder| path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    let is_a1111 = ["/sdapi", "/controlnet", "/internal"].into_iter().any(is_below);
    let errors: fn(Response) -> Response = if is_a1111 {
        a1111::errors
    } else if is_below("/v1") && !invocations::ROUTES.iter().any(|route| path.starts_with(route)) {
        openai::errors
    } else {
        std::convert::identity
    };
    errors(next.run(request).await)
}

/// A method that a route does not support. OPTIONS is no error: the response is the header `Allow`,
/// which SillyTavern uses to find out whether there is a server.
async fn other_method(method: Method) -> Result<StatusCode> {
    if method == Method::OPTIONS { Ok(StatusCode::NO_CONTENT) } else { Err(ApiError::Method) }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use axum::body::{Body, to_bytes};
    use axum::routing::get;
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_request_without_a_body_ends_at_its_deadline() {
        let most = Duration::from_secs(5);
        let app: Router = Router::new()
            .route("/", get(pending::<StatusCode>).delete(pending::<StatusCode>))
            .layer(from_fn_with_state(most, in_time));
        for (method, header, seconds, limit) in [
            (Method::GET, None, 5, "--request-timeout-ms"),
            (Method::DELETE, None, 5, "--request-timeout-ms"),
            (Method::GET, Some("2000"), 2, "x-request-timeout-ms"),
            (Method::GET, Some("9000"), 5, "--request-timeout-ms"),
        ] {
            let mut request = Request::builder().method(method).uri("/");
            if let Some(millis) = header {
                request = request.header("x-request-timeout-ms", millis);
            }
            let (began, request) = (Instant::now(), request.body(Body::empty()).expect("one"));
            let reply = app.clone().oneshot(request).await.expect("a reply");
            assert_eq!(
                (reply.status(), began.elapsed().as_secs()),
                (StatusCode::GATEWAY_TIMEOUT, seconds)
            );
            let text = to_bytes(reply.into_body(), usize::MAX).await.expect("a body");
            assert!(String::from_utf8_lossy(&text).contains(&format!("timeout of {limit}")));
        }
    }
}
