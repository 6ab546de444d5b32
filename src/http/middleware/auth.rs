//! Authentication. A key is sent as `Authorization: Bearer KEY` (OpenAI's clients), as the password
//! of `Authorization: Basic` (AUTOMATIC1111's clients) or as `X-Api-Key`. It also identifies the
//! client for fair queueing. SageMaker's routes are public unless `--lock-invocations` is given, since
//! SageMaker authenticates callers itself and forwards no key.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use subtle::ConstantTimeEq as _;

use super::sagemaker_route::ViaSageMaker;
use crate::http::access::{AccessConfig, ApiKey};
use crate::http::error::ApiError;

/// Header of keys that are not in `Authorization`.
const API_KEY: &str = "x-api-key";

/// Requires a key, if any are configured.
pub(crate) async fn require(
    State(access): State<Arc<AccessConfig>>,
    mut request: Request,
    next: Next,
) -> Result<Response, Response> {
    let via_sagemaker = request.extensions().get::<ViaSageMaker>().is_some();
    if access.api_keys.is_empty() || (via_sagemaker && !access.lock_invocations) {
        return Ok(next.run(request).await);
    }
    let given = given(request.headers());
    let Some(place) = given.iter().find_map(|given| find(&access.api_keys, given)) else {
        let mut response = ApiError::Key { given: !given.is_empty() }.response();
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return Err(response);
    };
    request.extensions_mut().insert(access.api_keys[place].client());
    Ok(next.run(request).await)
}

/// The keys in a request. There may be several: a proxy has passwords of its own in `Authorization`.
fn given(headers: &HeaderMap) -> Vec<Vec<u8>> {
    let authorizations = headers.get_all(AUTHORIZATION).iter().filter_map(authorized);
    let keys = headers.get_all(API_KEY).iter().map(|value| value.as_bytes().to_vec());
    authorizations.chain(keys).collect()
}

fn authorized(value: &HeaderValue) -> Option<Vec<u8>> {
    let (scheme, rest) = value.to_str().ok()?.split_once(' ')?;
    let rest = rest.trim();
    match scheme.to_ascii_lowercase().as_str() {
        "bearer" => Some(rest.into()),
        "basic" => {
            let pair = BASE64_STANDARD.decode(rest).ok()?;
            let colon = pair.iter().position(|byte| *byte == b':')?;
            Some(pair[colon + 1..].to_vec())
        }
        _ => None,
    }
}

/// Compares with every key, in a time that depends on lengths only.
fn find(keys: &[ApiKey], given: &[u8]) -> Option<usize> {
    keys.iter().enumerate().fold(None, |found, (place, key)| {
        if key.as_bytes().ct_eq(given).into() { Some(place) } else { found }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_wherever_clients_put_it() {
        let keys: Vec<ApiKey> = ["first", "se:cond"].map(|key| key.parse().expect("a key")).into();
        let basic = |pair: &str| format!("Basic {}", BASE64_STANDARD.encode(pair));
        let table = [
            ("authorization", "Bearer first".to_owned(), Some(0)),
            ("authorization", "bearer  se:cond".to_owned(), Some(1)),
            ("authorization", basic("anyone:se:cond"), Some(1)),
            ("authorization", basic("first"), None),
            ("authorization", "first".to_owned(), None),
            ("authorization", "Bearer firs".to_owned(), None),
            ("authorization", "Bearer ".to_owned(), None),
            ("x-api-key", "first".to_owned(), Some(0)),
            ("x-other", "first".to_owned(), None),
        ];
        for (name, value, place) in table {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::try_from(&value).expect("a header"));
            let found = given(&headers).iter().find_map(|given| find(&keys, given));
            assert_eq!(found, place, "{name}: {value}");
            // What a proxy wants for itself hides no key.
            headers.insert("x-api-key", HeaderValue::from_static("first"));
            assert!(given(&headers).iter().any(|given| find(&keys, given).is_some()));
        }
        assert_eq!(format!("{keys:?}"), "[ApiKey(..), ApiKey(..)]");
        assert!("".parse::<ApiKey>().is_err() && "a b".parse::<ApiKey>().is_err());
    }
}
