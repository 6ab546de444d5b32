//! A request in any of the dialects of `/invocations`, and how its answer is worded.

use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_models::Spec;
use serde_json::{Value, json};

use super::accept::{self, ReplyPreferences};
use super::body::BodyKind;
use crate::engine::GeneratedImage;
use crate::http::admission::RequestSlot;
use crate::http::drawing::{Drawing, ReplyFormat};
use crate::http::error::Result;
use crate::http::headers::{ATTRIBUTES, NSFW, SEED};
use crate::http::state::AppState;
use crate::image::Format;
use crate::request::DrawRequest;

/// How an answer is worded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dialect {
    /// The format of pictures in JSON, unless the request names one.
    pub(crate) format: Format,
    /// The JSON.
    pub(crate) render: fn(&RenderInput<'_>) -> String,
}

/// What there is to tell.
#[derive(Debug)]
pub(crate) struct RenderInput<'a> {
    pub(crate) specs: &'a [Spec],
    pub(crate) drawn: &'a [GeneratedImage],
    pub(crate) files: &'a [Vec<u8>],
    pub(crate) format: Format,
}

impl RenderInput<'_> {
    /// The files in base64.
    pub(crate) fn base64(&self) -> impl Iterator<Item = String> {
        self.files.iter().map(|file| BASE64_STANDARD.encode(file))
    }

    /// The files in base64, with what was asked and what came of it.
    pub(crate) fn each(&self) -> impl Iterator<Item = (&Spec, &GeneratedImage, String)> {
        let drawn = self.specs.iter().zip(self.drawn).zip(self.base64());
        drawn.map(|((spec, drawn), data)| (spec, drawn, data))
    }

    /// The warnings of all pictures, each once.
    pub(crate) fn warnings(&self) -> Vec<&str> {
        let mut warnings: Vec<&str> = Vec::new();
        for warning in self.drawn.iter().flat_map(|picture| &picture.warnings) {
            if !warnings.contains(&warning.as_str()) {
                warnings.push(warning);
            }
        }
        warnings
    }

    /// The prompt of the first picture.
    pub(crate) fn prompt(&self) -> &str {
        self.specs.first().map_or("", |spec| &spec.prompt)
    }
}

/// A request of any dialect in native fields.
#[derive(Debug)]
pub(crate) struct ParsedRequest {
    /// One for each prompt.
    pub(crate) requests: Vec<DrawRequest>,
    pub(crate) kind: BodyKind,
    pub(crate) dialect: Dialect,
}

impl ParsedRequest {
    /// A request that is native already.
    pub(crate) fn native(request: DrawRequest, kind: BodyKind) -> Self {
        Self { requests: vec![request], kind, dialect: NATIVE }
    }
}

/// A valid request with its dialect.
#[derive(Debug)]
pub(crate) struct Invocation {
    pub(crate) drawing: Drawing,
    dialect: Dialect,
}

impl Invocation {
    /// Reads what was heard; `headers` say how to answer.
    pub(crate) async fn read(
        state: &AppState,
        slot: &RequestSlot,
        parsed: ParsedRequest,
        headers: &HeaderMap,
    ) -> Result<Self> {
        let ParsedRequest { requests, kind, dialect } = parsed;
        let drawing = Drawing::prepare(state, slot, requests, |draw, count| {
            let (usual, format) = (dialect.format, draw.format()?);
            let stream = draw.stream == Some(true);
            accept::choose(headers, ReplyPreferences { kind, usual, format, count, stream })
        });
        Ok(Self { drawing: drawing.await?, dialect })
    }

    /// The answer, whole, so that it can be kept.
    pub(crate) async fn answer(self, pictures: Vec<GeneratedImage>) -> Result<Response<Bytes>> {
        let Self { drawing, dialect } = self;
        let answer = move |drawing: &Drawing, drawn: &[GeneratedImage], files| {
            answer(drawing, dialect, drawn, files)
        };
        drawing.encode(pictures, answer).await
    }
}

fn answer(
    drawing: &Drawing,
    dialect: Dialect,
    drawn: &[GeneratedImage],
    mut files: Vec<Vec<u8>>,
) -> Response<Bytes> {
    let (specs, format) = (&drawing.specs, drawing.reply.format());
    let (media_type, body) = match drawing.reply {
        ReplyFormat::Bytes(_) => (format.media_type(), files.pop().unwrap_or_default()),
        ReplyFormat::Json(_) | ReplyFormat::Events(_) => {
            let json = (dialect.render)(&RenderInput { specs, drawn, files: &files, format });
            ("application/json", json.into())
        }
    };
    let mut answer = Response::new(Bytes::from(body));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    let seed = specs.first().map_or(0, |spec| spec.seed);
    headers.insert(SEED, HeaderValue::from(seed));
    let nsfw = drawn.iter().filter_map(|picture| picture.nsfw).reduce(|a, b| a | b);
    let objection = if nsfw == Some(true) { ";nsfw=true" } else { "" };
    if let Ok(value) = HeaderValue::try_from(format!("seed={seed}{objection}")) {
        headers.insert(ATTRIBUTES, value);
    }
    if let Some(nsfw) = nsfw {
        headers.insert(NSFW, HeaderValue::from_static(if nsfw { "true" } else { "false" }));
    }
    answer
}

const NATIVE: Dialect = Dialect { format: Format::Jpeg, render: native };

/// `data` and `seed` for one picture, `images` for several.
fn native(pictures: &RenderInput<'_>) -> String {
    let image = |(spec, drawn, data): (&Spec, &GeneratedImage, String)| {
        let mut image = json!({ "seed": spec.seed, "data": data });
        if let Some(nsfw) = drawn.nsfw {
            image["nsfw"] = nsfw.into();
        }
        image
    };
    let mut images: Vec<Value> = pictures.each().map(image).collect();
    let mut reply = match &mut images[..] {
        [one] => one.take(),
        _ => json!({ "images": images }),
    };
    reply["prompt"] = pictures.prompt().into();
    reply["content_type"] = pictures.format.media_type().into();
    let warnings = pictures.warnings();
    if !warnings.is_empty() {
        reply["warnings"] = warnings.into();
    }
    reply.to_string()
}
