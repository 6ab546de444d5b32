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

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The files: path, media type and text.
const FILES: [(&str, &str, &str); 16] = [
    ("/", HTML, include_str!("index.html")),
    ("/page.css", CSS, include_str!("page.css")),
    ("/page.js", SCRIPT, include_str!("page.js")),
    ("/page/controls.js", SCRIPT, include_str!("controls.js")),
    ("/page/elements.js", SCRIPT, include_str!("elements.js")),
    ("/page/form.js", SCRIPT, include_str!("form.js")),
    ("/page/history.js", SCRIPT, include_str!("history.js")),
    ("/page/infotext.js", SCRIPT, include_str!("infotext.js")),
    ("/page/input.js", SCRIPT, include_str!("input.js")),
    ("/page/loras.js", SCRIPT, include_str!("loras.js")),
    ("/page/mask.js", SCRIPT, include_str!("mask.js")),
    ("/page/queue.js", SCRIPT, include_str!("queue.js")),
    ("/page/server.js", SCRIPT, include_str!("server.js")),
    ("/page/stage.js", SCRIPT, include_str!("stage.js")),
    ("/docs", HTML, include_str!("docs.html")),
    ("/docs.js", SCRIPT, include_str!("docs.js")),
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
