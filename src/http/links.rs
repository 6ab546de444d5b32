//! Links in responses, as the client can follow them.

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;

use super::access::WebOrigin;
use super::middleware::forwarded::{host_seen, is_secure, path_prefix};
use super::state::AppState;

/// The address of this server as the client of a request sees it: that of `--public-url`, else what
/// a trusted proxy forwards, else the request's own.
#[derive(Debug)]
pub(crate) struct Links {
    /// None if the request names no host: links are then without one.
    origin: Option<WebOrigin>,
    prefix: String,
}

impl FromRequestParts<AppState> for Links {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Infallible> {
        if let Some(base) = &state.settings.access.public_url {
            return Ok(Self { origin: Some(base.origin.clone()), prefix: base.prefix.clone() });
        }
        let (uri, headers) = (&parts.uri, &parts.headers);
        let host = host_seen(uri, headers);
        let origin = host.map(|host| WebOrigin::new(is_secure(headers), host));
        Ok(Self { origin, prefix: path_prefix(headers) })
    }
}

impl Links {
    /// The URL before the paths of this server.
    pub(crate) fn base(&self) -> String {
        let origin = self.origin.as_ref().map(ToString::to_string);
        format!("{}{}", origin.unwrap_or_default(), self.prefix)
    }

    /// The path before the paths of this server: for links to the host that the client used.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }
}
