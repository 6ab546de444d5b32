//! The web page and the API reference: files in the binary, plain HTML, CSS and ES modules. Their
//! policy allows requests to this server only.

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::IntoResponse;
use axum::routing::get;

use super::state::AppState;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'";

/// The page and the API reference.
pub(crate) fn routes() -> Router<AppState> {
    Router::new()
        .route("/", get(index))
        .route("/page.css", get(style))
        .route("/page.js", get(script))
        .route("/docs", get(docs))
        .route("/docs.js", get(docs_script))
}

/// `GET /`.
async fn index() -> impl IntoResponse {
    file("text/html; charset=utf-8", include_str!("index.html"))
}

/// `GET /page.css`.
async fn style() -> impl IntoResponse {
    file("text/css; charset=utf-8", include_str!("page.css"))
}

/// `GET /page.js`.
async fn script() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", include_str!("page.js"))
}

/// `GET /docs`: the API reference, from `/openapi.json`.
async fn docs() -> impl IntoResponse {
    file("text/html; charset=utf-8", include_str!("docs.html"))
}

/// `GET /docs.js`.
async fn docs_script() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", include_str!("docs.js"))
}

/// A file of this version of the server, which browsers must revalidate.
fn file(media_type: &'static str, text: &'static str) -> impl IntoResponse {
    let headers = [
        (CONTENT_TYPE, media_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, text)
}
