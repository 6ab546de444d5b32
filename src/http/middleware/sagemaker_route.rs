//! Other dialects through SageMaker's one door: `X-Amzn-SageMaker-Custom-Attributes:
//! route=/v1/images/generations` on `/invocations` takes the request to that route. AWS's own
//! containers route so.

use axum::Router;
use axum::extract::Request;
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, Method, Uri};
use tower::{ServiceExt as _, service_fn};

use crate::http::headers::ATTRIBUTES;

/// What can be reached: the dialects of pictures, and nothing that governs the server.
const OPEN: [&str; 2] = ["/v1/", "/sdapi/"];

/// A request that came in through SageMaker's door, whatever its path says now.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ViaSageMaker;

/// The routes, reached by the attribute too. It must be read before a route is chosen, so this
/// stands before the router, not inside.
pub(crate) fn by_attribute(router: Router) -> Router {
    let rewrite = move |mut request: Request| {
        let router = router.clone();
        async move {
            let here = request.method() == Method::POST && request.uri().path() == "/invocations";
            if let Some(uri) = here.then(|| target(request.headers())).flatten() {
                *request.uri_mut() = uri;
                request.extensions_mut().insert(ViaSageMaker);
            }
            router.oneshot(request).await
        }
    };
    Router::new().fallback_service(service_fn(rewrite))
}

/// The open route that the attributes name.
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
    fn only_dialects_of_pictures_can_be_reached() {
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
