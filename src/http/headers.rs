//! Headers of our own and of SageMaker that more than one module reads or writes.

use axum::http::HeaderName;

/// The request's name, which the answer repeats.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// SageMaker's name for a request.
pub(crate) const INFERENCE_ID: HeaderName =
    HeaderName::from_static("x-amzn-sagemaker-inference-id");
/// The seed for those who see every header.
pub(crate) const SEED: HeaderName = HeaderName::from_static("x-sd-seed");
/// Whether the safety checker objects to any picture; absent where there is no checker.
pub(crate) const NSFW: HeaderName = HeaderName::from_static("x-sd-nsfw");
/// Forwarded by SageMaker as the caller wrote it, and passed back to the caller.
pub(crate) const ATTRIBUTES: HeaderName =
    HeaderName::from_static("x-amzn-sagemaker-custom-attributes");
