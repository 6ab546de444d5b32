//! Requests to `/invocations` in any of its formats, and their responses.

use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Response};
use sd_models::Spec;
use serde_json::{Value, json};

use crate::engine::GeneratedImage;
use crate::http::drawing::{Drawing, ReplyFormat, base64, warnings};
use crate::http::error::Result;
use crate::http::headers::{ATTRIBUTES, NSFW, SEED, warnings_header};
use crate::image::Format;

/// One of the formats of `/invocations`, for responses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dialect {
    /// The format of image files in JSON, unless the request names one.
    pub(crate) format: Format,
    /// Renders the JSON.
    pub(crate) render: fn(&RenderInput<'_>) -> String,
}

/// The images of a response.
#[derive(Debug)]
pub(crate) struct RenderInput<'a> {
    pub(crate) specs: &'a [Spec],
    pub(crate) images: &'a [GeneratedImage],
    pub(crate) files: &'a [Vec<u8>],
    pub(crate) format: Format,
}

impl RenderInput<'_> {
    /// The files in base64.
    pub(crate) fn base64(&self) -> Vec<String> {
        base64(self.files)
    }

    /// Each image: its spec, its results and its file in base64.
    pub(crate) fn each(&self) -> impl Iterator<Item = (&Spec, &GeneratedImage, String)> {
        let each = self.specs.iter().zip(self.images).zip(self.base64());
        each.map(|((spec, image), data)| (spec, image, data))
    }
}

/// A valid request and its format.
#[derive(Debug)]
pub(crate) struct Invocation {
    pub(crate) drawing: Drawing,
    pub(crate) dialect: Dialect,
}

impl Invocation {
    /// Encodes the images and renders the whole response, so that a job can retain it.
    pub(crate) async fn respond(self, images: Vec<GeneratedImage>) -> Result<Response<Bytes>> {
        let Self { drawing, dialect } = self;
        let render = move |drawing: &_, images: &_, files| render(drawing, dialect, images, files);
        drawing.encode(images, render).await
    }
}

fn render(
    drawing: &Drawing,
    dialect: Dialect,
    images: &[GeneratedImage],
    mut files: Vec<Vec<u8>>,
) -> Response<Bytes> {
    let (specs, format) = (&drawing.specs, drawing.reply.format());
    let (media_type, body) = match drawing.reply {
        ReplyFormat::Bytes(_) => (format.media_type(), files.pop().unwrap_or_default()),
        ReplyFormat::Json(_) | ReplyFormat::Events(_) => {
            let json = (dialect.render)(&RenderInput { specs, images, files: &files, format });
            ("application/json", json.into())
        }
    };
    let mut response = Response::new(Bytes::from(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    let seed = specs.first().map_or(0, |spec| spec.seed);
    headers.insert(SEED, HeaderValue::from(seed));
    let nsfw = images.iter().filter_map(|image| image.nsfw).reduce(|a, b| a | b);
    let flagged = if nsfw == Some(true) { ";nsfw=true" } else { "" };
    if let Ok(value) = HeaderValue::try_from(format!("seed={seed}{flagged}")) {
        headers.insert(ATTRIBUTES, value);
    }
    if let Some(nsfw) = nsfw {
        headers.insert(NSFW, HeaderValue::from_static(if nsfw { "true" } else { "false" }));
    }
    headers.extend(warnings_header(&warnings(images)));
    response
}

/// The native format.
pub(crate) const NATIVE: Dialect = Dialect { format: Format::Jpeg, render: native };

/// `data` and `seed` for one image, `images` for several.
fn native(input: &RenderInput<'_>) -> String {
    let image = |(spec, generated, data): (&Spec, &GeneratedImage, String)| {
        let mut image = json!({ "seed": spec.seed, "data": data });
        if let Some(variation) = spec.variation {
            image["variation_seed"] = variation.seed.into();
        }
        if let Some(nsfw) = generated.nsfw {
            image["nsfw"] = nsfw.into();
        }
        image
    };
    let mut images: Vec<Value> = input.each().map(image).collect();
    let mut reply = match &mut images[..] {
        [one] => one.take(),
        _ => json!({ "images": images }),
    };
    reply["prompt"] = input.specs.first().map_or("", |spec| &spec.prompt).into();
    reply["content_type"] = input.format.media_type().into();
    let warnings = warnings(input.images);
    if !warnings.is_empty() {
        reply["warnings"] = warnings.into();
    }
    reply.to_string()
}
