//! Header names that several modules use.

use axum::http::{HeaderMap, HeaderName, HeaderValue};

/// Name of the request, which the response repeats.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// SageMaker's name of the request.
pub(crate) const INFERENCE_ID: HeaderName =
    HeaderName::from_static("x-amzn-sagemaker-inference-id");
/// Seed of the first image.
pub(crate) const SEED: HeaderName = HeaderName::from_static("x-sd-seed");
/// Whether the safety checker flags any image; absent if the model has no checker.
pub(crate) const NSFW: HeaderName = HeaderName::from_static("x-sd-nsfw");
/// The warnings of a response, separated by semicolons: not all bodies have a place for them.
pub(crate) const WARNINGS: HeaderName = HeaderName::from_static("x-sd-warnings");
/// Forwarded by SageMaker in both directions.
pub(crate) const ATTRIBUTES: HeaderName =
    HeaderName::from_static("x-amzn-sagemaker-custom-attributes");

/// Maximum length of the warnings in a header, in characters.
const MAX_WARNINGS: usize = 1024;

/// The header of these warnings, if there are any.
pub(crate) fn warnings_header<T: AsRef<str>>(warnings: &[T]) -> HeaderMap {
    // A header holds visible ASCII.
    let shown = |c: char| if c.is_ascii() && !c.is_ascii_control() { c } else { '?' };
    let text = warnings.iter().map(AsRef::as_ref).collect::<Vec<_>>().join("; ");
    let text: String = text.chars().take(MAX_WARNINGS).map(shown).collect();
    let value = HeaderValue::try_from(text).ok().filter(|value| !value.is_empty());
    value.map(|value| (WARNINGS, value)).into_iter().collect()
}
