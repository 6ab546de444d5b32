//! Routes by attribute: `X-Amzn-SageMaker-Custom-Attributes: route=/v1/images/generations` forwards
//! a request for `/invocations` to that route, as in AWS's own containers.

use axum::Router;
use axum::extract::Request;
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, Method, Uri};
use tower::ServiceExt as _;

use crate::http::headers::ATTRIBUTES;

/// Prefixes of the routes that can be reached: the image APIs, no administration.
const OPEN: [&str; 2] = ["/v1/", "/sdapi/"];

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

/// The route that the attributes name, if it can be reached.
fn target(headers: &HeaderMap) -> Option<Uri> {
    let attributes = headers.get(ATTRIBUTES)?.to_str().ok()?;
    let parts = attributes.split([',', ';', ' ']);
    let route = parts.map(str::trim).find_map(|part| part.strip_prefix("route="))?;
    let open = OPEN.iter().any(|prefix| route.starts_with(prefix));
    let route = if open { route } else { "/no-such-route" };
    Some(Uri::from(route.parse::<PathAndQuery>().ok()?))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_image_apis_can_be_reached() {
        let table = [
            ("route=/v1/images/generations", Some("/v1/images/generations")),
            ("a=b, route=/sdapi/v1/txt2img", Some("/sdapi/v1/txt2img")),
            ("seed=1;route=/v1/x?y=1", Some("/v1/x?y=1")),
            ("route=/models", Some("/no-such-route")),
            ("route=/v1", Some("/no-such-route")),
            ("route=http://example.com/v1/", Some("/no-such-route")),
            ("seed=7", None),
            ("", None),
        ];
        for (attributes, path) in table {
            let mut headers = HeaderMap::new();
            headers.insert(ATTRIBUTES, HeaderValue::from_static(attributes));
            let uri = target(&headers).map(|uri| uri.to_string());
            assert_eq!(uri.as_deref(), path, "{attributes}");
        }
    }
}
