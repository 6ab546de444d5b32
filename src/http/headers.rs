//! Header names that several modules use.

use axum::http::HeaderName;

/// Name of the request, which the response repeats.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// SageMaker's name of the request.
pub(crate) const INFERENCE_ID: HeaderName =
    HeaderName::from_static("x-amzn-sagemaker-inference-id");
/// Seed of the first image.
pub(crate) const SEED: HeaderName = HeaderName::from_static("x-sd-seed");
/// Whether the safety checker flags any image; absent if the model has no checker.
pub(crate) const NSFW: HeaderName = HeaderName::from_static("x-sd-nsfw");
/// The warnings of an image that is the whole body, separated by semicolons.
pub(crate) const WARNINGS: HeaderName = HeaderName::from_static("x-sd-warnings");
/// Forwarded by SageMaker in both directions.
pub(crate) const ATTRIBUTES: HeaderName =
    HeaderName::from_static("x-amzn-sagemaker-custom-attributes");
