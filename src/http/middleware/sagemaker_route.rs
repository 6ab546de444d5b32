//! Routes by attribute: `X-Amzn-SageMaker-Custom-Attributes: route=/v1/images/generations` forwards
//! a request for `/invocations` to that route, as in AWS's own containers. Only routes that generate
//! can be reached: those that select a model, interrupt or create jobs affect other clients.

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, Method, Uri};
use tower::ServiceExt as _;

use crate::http::headers::ATTRIBUTES;

/// The routes that can be reached.
const OPEN: [&str; 4] =
    ["/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"];

/// A path without a route, for all other values.
const NOWHERE: &str = "/no-such-route";

/// Marks a request that was routed by the attribute.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ViaSageMaker;

/// The router with routing by attribute, which must take place before a route is matched, so
/// outside of the router.
pub(crate) fn by_attribute(router: Router) -> Router {
    let rewrite = |mut request: Request| {
        let here = request.method() == Method::POST && request.uri().path() == "/invocations";
        if let Some(uri) = here.then(|| target(request.headers())).flatten() {
            *request.uri_mut() = uri;
            request.extensions_mut().insert(ViaSageMaker);
        }
        request
    };
    Router::new().fallback_service(router.map_request(rewrite))
}

/// The route that the attributes name.
fn target(headers: &HeaderMap) -> Option<Uri> {
    let values = headers.get_all(ATTRIBUTES).iter();
    let mut parts = values.flat_map(|value| value.as_bytes().split(|byte| b",; ".contains(byte)));
    let route = parts.find_map(|part| part.trim_ascii().strip_prefix(b"route="))?;
    let open = OPEN.into_iter().find(|open| open.as_bytes() == route);
    Some(Uri::from_static(open.unwrap_or(NOWHERE)))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_routes_that_generate_can_be_reached() {
        let generations = Some("/v1/images/generations");
        let table: [(&[&[u8]], _); 17] = [
            (&[b"route=/v1/images/generations"], generations),
            (&[b"a=b, route=/v1/images/edits"], Some("/v1/images/edits")),
            (&[b"seed=1;route=/sdapi/v1/txt2img"], Some("/sdapi/v1/txt2img")),
            (&[b"route=/sdapi/v1/img2img ,x=\xff"], Some("/sdapi/v1/img2img")),
            (&[b"x=1", b"route=/v1/images/generations"], generations),
            (&[b"route=/v1/images/generations?x=1"], Some(NOWHERE)),
            (&[b"route=/v1/images/generations/"], Some(NOWHERE)),
            (&[b"route=/v1/images//generations"], Some(NOWHERE)),
            (&[b"route=/v1/images/%67enerations"], Some(NOWHERE)),
            (&[b"route=/V1/images/generations"], Some(NOWHERE)),
            (&[b"route=/sdapi/v1/options"], Some(NOWHERE)),
            (&[b"route=/v1/jobs;route=/v1/images/edits"], Some(NOWHERE)),
            (&[b"route=http://example.com/v1/images/edits"], Some(NOWHERE)),
            (&[b"route=/v1/\xff"], Some(NOWHERE)),
            (&[b"route="], Some(NOWHERE)),
            (&[b"seed=7"], None),
            (&[], None),
        ];
        for (values, path) in table {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(ATTRIBUTES, HeaderValue::from_bytes(value).expect("a header"));
            }
            let uri = target(&headers).map(|uri| uri.to_string());
            assert_eq!(uri.as_deref(), path, "{values:?}");
        }
    }
}
