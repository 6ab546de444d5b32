//! Requests of web pages, which have the header `Origin`; programs send none. A page that is not
//! allowed may change nothing here, and no page may address this server by an unknown name.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::ORIGIN;
use axum::middleware::Next;
use axum::response::Response;

use super::forwarded::{host, host_seen};
use crate::http::access::AccessConfig;
use crate::http::error::{ApiError, Result};

/// Rejects requests of pages that are not allowed to send them, whatever the route and the key.
pub(crate) async fn check(
    State(access): State<Arc<AccessConfig>>,
    request: Request,
    next: Next,
) -> Result<Response> {
    check_page(&access, &request)?;
    Ok(next.run(request).await)
}

fn check_page(access: &AccessConfig, request: &Request) -> Result<()> {
    let (uri, headers) = (request.uri(), request.headers());
    let origins = || headers.get_all(ORIGIN).iter();
    if origins().next().is_none() {
        return Ok(());
    }
    // A name that a web site has pointed to this address is as good as its own to a browser.
    let host = host(uri, headers);
    if !host.as_ref().is_some_and(|host| access.knows(host.host())) {
        return Err(ApiError::UnknownHost);
    }
    // What only reads is protected by browsers, which show no response to other origins.
    let own: Vec<_> = host.into_iter().chain(host_seen(uri, headers)).collect();
    if request.method().is_safe() || origins().all(|origin| access.allows(origin, &own)) {
        return Ok(());
    }
    Err(ApiError::ForeignOrigin)
}
