//! The web page and that of the routes: files in the binary, plain HTML, CSS and ES modules. They
//! ask nobody but this server, and their policy tells the browser to see to that.

use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::IntoResponse;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'";

/// `GET /`.
pub(super) async fn index() -> impl IntoResponse {
    file("text/html; charset=utf-8", include_str!("page/index.html"))
}

/// `GET /page.css`.
pub(super) async fn style() -> impl IntoResponse {
    file("text/css; charset=utf-8", include_str!("page/page.css"))
}

/// `GET /page.js`.
pub(super) async fn script() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", include_str!("page/page.js"))
}

/// `GET /docs`: `/openapi.json` for people.
pub(super) async fn docs() -> impl IntoResponse {
    file("text/html; charset=utf-8", include_str!("page/docs.html"))
}

/// `GET /docs.js`.
pub(super) async fn docs_script() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", include_str!("page/docs.js"))
}

/// A file that goes with this version of the server, so that no browser may keep it unasked.
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
