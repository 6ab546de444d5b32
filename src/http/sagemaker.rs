//! The native dialect, which is SageMaker's contract: `/ping` and `/invocations`.

use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::StreamExt as _;
use sd_models::Spec;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};
use tracing::{error, info, info_span};

use super::accept::{self, Reply, Wish};
use super::error::ApiError;
use super::{State, body};
use crate::api::{Draw, Invalid};
use crate::engine::{Drawn, Phase};
use crate::image::{self, Format};

/// The seed for those who see every header.
const SEED: HeaderName = HeaderName::from_static("x-sd-seed");
/// The seed for those behind SageMaker, which passes on only this header.
const ATTRIBUTES: HeaderName = HeaderName::from_static("x-amzn-sagemaker-custom-attributes");

/// A body is thrown away up to this many times the limit before the client is cut off.
const OVERSIZE: usize = 4;

/// 200 when pictures can be drawn, else 503. Looks at one flag and waits for nothing.
pub(super) async fn ping(state: State) -> StatusCode {
    match state.engine.phase() {
        Phase::Ready(_) => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Draws what the body asks for. When the client leaves, this future is dropped, and with it the
/// ticket, which withdraws the job.
pub(super) async fn invocations(state: State, request: Request) -> Result<Response, ApiError> {
    let deadline = Instant::now() + state.settings.request_timeout;
    let _permit = state.gate.try_acquire().map_err(|_| ApiError::Crowded)?;
    let model = state.engine.model()?;
    let headers = request.headers().clone();
    let bytes = timeout_at(deadline, receive(state.settings.max_body_bytes, request)).await;
    let bytes = bytes.map_err(|_| ApiError::SlowBody)??;

    let (fields, speech) = body::read(&headers, &bytes)?;
    drop(bytes);
    let draw = Draw::read(fields, &state.settings.limits, &model, random_seed)?;
    let wish = Wish { speech, format: draw.format, count: draw.count() };
    let reply = accept::choose(&headers, wish)?;

    let specs = draw.specs();
    if state.settings.log_prompts {
        info!(prompt = specs[0].prompt, "accepted");
    }
    let pictures = state.engine.submit(specs.clone(), Some(deadline))?.wait().await?;
    let span = info_span!(parent: tracing::Span::current(), "encode");
    let answer = move || span.in_scope(|| answer(reply, &specs, &pictures, &model.name));
    tokio::task::spawn_blocking(answer).await.map_err(|_| ApiError::Encode)?
}

/// The whole body. What is too long is read on for a while and thrown away: many clients do not
/// look for an answer before they have sent everything.
async fn receive(limit: usize, request: Request) -> Result<Vec<u8>, ApiError> {
    let declared = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let declared: usize = declared.and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut parts = request.into_body().into_data_stream();
    let mut body = Vec::new();
    let mut length = 0;
    while let Some(part) = parts.next().await {
        match part {
            Ok(part) if declared.max(length + part.len()) <= limit => {
                body.extend_from_slice(&part);
                length += part.len();
            }
            Ok(part) if length < OVERSIZE * limit => {
                body = Vec::new();
                length += part.len();
            }
            Err(_) if declared <= limit => {
                return Err(Invalid::body("the body ended before its declared length").into());
            }
            _ => break,
        }
    }
    if declared.max(length) > limit { Err(ApiError::TooLarge(limit)) } else { Ok(body) }
}

/// Thirty-two bits, so that a client that reads numbers as doubles can repeat the picture.
fn random_seed() -> u64 {
    getrandom::u32().unwrap_or_default().into()
}

/// Puts the pictures into their files and the files into the reply.
fn answer(
    reply: Reply,
    specs: &[Spec],
    pictures: &[Drawn],
    model: &str,
) -> Result<Response, ApiError> {
    let (Reply::Json(format) | Reply::Bytes(format)) = reply;
    let files = specs.iter().zip(pictures).map(|(spec, picture)| {
        image::encode(&picture.rgb, format, &image::infotext(spec, model)).map_err(|error| {
            error!("{error:#}");
            ApiError::Encode
        })
    });
    let mut files = files.collect::<Result<Vec<_>, _>>()?;
    let mut headers = HeaderMap::new();
    let seed = specs.first().map_or(0, |spec| spec.seed);
    headers.insert(SEED, HeaderValue::from(seed));
    if let Ok(value) = HeaderValue::try_from(format!("seed={seed}")) {
        headers.insert(ATTRIBUTES, value);
    }
    Ok(match reply {
        Reply::Json(_) => {
            (headers, axum::Json(json(specs, pictures, &files, format))).into_response()
        }
        Reply::Bytes(_) => {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(format.media_type()));
            (headers, files.pop().unwrap_or_default()).into_response()
        }
    })
}

/// `data` and `seed` for one picture, `images` for several.
fn json(specs: &[Spec], pictures: &[Drawn], files: &[Vec<u8>], format: Format) -> Value {
    let image = |(spec, file): (&Spec, &Vec<u8>)| {
        let data = BASE64_STANDARD.encode(file);
        json!({ "seed": spec.seed, "data": data })
    };
    let mut images: Vec<Value> = specs.iter().zip(files).map(image).collect();
    let mut reply = match &mut images[..] {
        [one] => one.take(),
        _ => json!({ "images": images }),
    };
    reply["prompt"] = specs.first().map(|spec| spec.prompt.as_str()).into();
    reply["content_type"] = format.media_type().into();
    if let Some(first) = pictures.first().filter(|picture| !picture.warnings.is_empty()) {
        reply["warnings"] = first.warnings.clone().into();
    }
    reply
}
