//! The bodies of requests: JSON if the body begins like an object, a form if it has a `prompt` key,
//! otherwise a bare prompt, as `curl -d 'a cat'` sends it.

use std::borrow::Cow;

use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;

use crate::http::admission::text;
use crate::http::error::{ApiError, Result};
use crate::request::{Fields, ValidationError};

/// The type of a bare prompt of SageMaker JumpStart.
pub(crate) const JUMPSTART_TEXT: &str = "application/x-text";

/// The kind of a body, which decides the response format if the client accepts any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyKind {
    Json,
    Text,
}

/// The kinds of body that the declared type allows.
enum Declared {
    Json,
    Form,
    /// `application/x-text` of SageMaker JumpStart may be a JSON string.
    Text {
        quoted: bool,
    },
}

/// Reads the fields out of a body.
pub(crate) fn read(headers: &HeaderMap, body: &[u8]) -> Result<(Fields, BodyKind)> {
    let declared = declared(headers);
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let text = text(body)?;
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Err(ValidationError::body("the body is empty; send a prompt").into());
    }
    if trimmed.starts_with('{') {
        return Ok((Fields::json(text)?, BodyKind::Json));
    }
    match declared? {
        Declared::Json => Err(ValidationError::body("the body is not a JSON object").into()),
        Declared::Form => Ok((form(trimmed)?, BodyKind::Text)),
        Declared::Text { quoted } => {
            let unquoted = quoted.then(|| serde_json::from_str::<String>(trimmed).ok()).flatten();
            Ok((Fields::prompt(unquoted.unwrap_or_else(|| trimmed.into())), BodyKind::Text))
        }
    }
}

/// The declared kind. Used only if the body is not a JSON object, so JSON may have a wrong type.
fn declared(headers: &HeaderMap) -> Result<Declared> {
    let Some(essence) = essence(headers) else {
        return Ok(Declared::Text { quoted: false });
    };
    match essence.as_str() {
        "application/json" => Ok(Declared::Json),
        "application/x-www-form-urlencoded" => Ok(Declared::Form),
        JUMPSTART_TEXT => Ok(Declared::Text { quoted: true }),
        "text/plain" => Ok(Declared::Text { quoted: false }),
        _ => Err(ApiError::MediaType(format!(
            "the type {essence:?} is not supported; send application/json or text/plain"
        ))),
    }
}

/// The declared type without its parameters, in lower case.
pub(crate) fn essence(headers: &HeaderMap) -> Option<String> {
    let value = String::from_utf8_lossy(headers.get(CONTENT_TYPE)?.as_bytes());
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

/// A form with a `prompt` key, or else a bare prompt under the type that curl gives it.
fn form(text: &str) -> Result<Fields, ValidationError> {
    let pairs = || form_urlencoded::parse(text.as_bytes());
    if !pairs().any(|(name, _)| name == "prompt") {
        return Ok(Fields::prompt(bare(text)));
    }
    let broken = |(name, value): (Cow<'_, str>, Cow<'_, str>)| {
        (name.contains('\u{fffd}') || value.contains('\u{fffd}')) && !text.contains('\u{fffd}')
    };
    let fields = Fields::form(pairs().into_owned())?;
    if pairs().any(broken) {
        return Err(ValidationError::body("the form holds escapes that are not UTF-8"));
    }
    Ok(fields)
}

/// A bare prompt, decoded if it was encoded. `curl --data-urlencode 'a cat'` sends `a%20cat`; a body
/// with spaces in it was not encoded.
fn bare(text: &str) -> String {
    if text.contains(char::is_whitespace) || !text.contains('%') {
        return text.into();
    }
    let (decoded, rest) = form_urlencoded::parse(text.as_bytes()).next().unwrap_or_default();
    let whole = rest.is_empty() && !text.contains(['=', '&']);
    if whole { Cow::into_owned(decoded) } else { text.into() }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn prompt(declared: &'static str, body: &str) -> String {
        let mut headers = HeaderMap::new();
        if !declared.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(declared));
        }
        let (mut fields, kind) = read(&headers, body.as_bytes()).expect("a good body");
        assert_eq!(kind, BodyKind::Text);
        let (_, prompt) = fields.take(&["prompt"]).expect("one").expect("a prompt");
        prompt.as_str().expect("text").to_owned()
    }

    #[test]
    fn a_body_that_is_no_object_is_a_prompt() {
        let form = "application/x-www-form-urlencoded";
        let table = [
            ("", "a red house", "a red house"),
            ("text/plain", "a red house\r\n", "a red house"),
            ("text/plain", "\"quoted\"", "\"quoted\""),
            ("Text/Plain; charset=UTF-8", "caf\u{e9}", "caf\u{e9}"),
            ("application/x-text", "plain", "plain"),
            ("application/x-text", "\"a \\\"red\\\" house\"", "a \"red\" house"),
            ("application/x-text", "\"unfinished", "\"unfinished"),
            (form, "a cat", "a cat"),
            (form, "a%20cat", "a cat"),
            (form, "100% cat & dog = friends", "100% cat & dog = friends"),
            (form, "e%3Dmc2", "e=mc2"),
            (form, "prompt=a cat", "a cat"),
            (form, "steps=3&prompt=a+cat", "a cat"),
        ];
        for (declared, body, expected) in table {
            assert_eq!(prompt(declared, body), expected, "{declared:?} {body:?}");
        }
    }
}
