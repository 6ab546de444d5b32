//! The web page and the API reference: files in the binary, plain HTML, CSS and ES modules. Their
//! policy allows requests to this server only.

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::routing::get;

use super::state::AppState;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'";

/// The files: path, media type and text.
const FILES: [(&str, &str, &str); 5] = [
    ("/", "text/html; charset=utf-8", include_str!("index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("page.js")),
    ("/docs", "text/html; charset=utf-8", include_str!("docs.html")),
    ("/docs.js", "text/javascript; charset=utf-8", include_str!("docs.js")),
];

/// The page and the API reference.
pub(crate) fn routes() -> Router<AppState> {
    FILES.into_iter().fold(Router::new(), |routes, (path, media_type, text)| {
        let headers = [
            (CONTENT_TYPE, media_type),
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (REFERRER_POLICY, "no-referrer"),
            // Browsers revalidate: the files are those of this version of the server.
            (CACHE_CONTROL, "no-cache"),
        ];
        routes.route(path, get(async move || (headers, text)))
    })
}
