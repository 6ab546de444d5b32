//! The JSON of responses and events.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::usage::Usage;
use crate::engine::{Client, GeneratedImage};
use crate::http::drawing::{Drawing, base64};
use crate::http::error::{ApiError, Result};
use crate::http::state::AppState;

/// The URLs of a response's images.
#[derive(Debug, Clone)]
pub(crate) struct ImageUrls {
    /// What is before their paths.
    pub(crate) base: String,
    /// Whose images they are.
    pub(crate) client: Client,
}

/// The options of a response.
#[derive(Debug, Clone)]
pub(crate) struct ReplyOptions {
    /// `image_generation` or `image_edit`: the prefix of the names of events.
    pub(crate) kind: &'static str,
    /// If the response holds URLs instead of images.
    pub(crate) urls: Option<ImageUrls>,
    /// The quality that was asked for, by which images are counted.
    pub(crate) quality: Option<String>,
}

/// The fields of every response and event.
pub(crate) fn common(drawing: &Drawing, quality: Option<&str>) -> Value {
    let size = drawing.specs.first().map(|spec| spec.final_size().to_string());
    let (format, quality) = (drawing.reply.format().name(), quality.unwrap_or("auto"));
    json!({ "size": size, "output_format": format, "background": "opaque", "quality": quality })
}

/// An object for each image: its seed, and its file in base64 or its URL; and the tokens.
pub(crate) async fn data(
    state: &AppState,
    drawing: Drawing,
    images: Vec<GeneratedImage>,
    options: ReplyOptions,
) -> Result<(Vec<Value>, Usage)> {
    let state = state.clone();
    let ReplyOptions { urls, quality, .. } = options;
    let data = move |drawing: &Drawing, images: &[GeneratedImage], files: Vec<Vec<u8>>| {
        let (field, values) = match urls {
            Some(ImageUrls { base, client }) => {
                let names = state.urls.insert(&client, files, drawing.reply.format())?;
                let url = |name| format!("{base}/files/{name}");
                ("url", names.iter().map(url).collect::<Vec<_>>())
            }
            None => ("b64_json", base64(&files)),
        };
        let first = drawing.specs.first().zip(images.first()).ok_or(ApiError::Encode)?;
        let usage = Usage::of(first.0, first.1, quality.as_deref());
        let each = drawing.specs.iter().zip(images).zip(values);
        let object = each.map(|((spec, image), value)| {
            let mut object = json!({ "seed": spec.seed, field: value });
            if let Some(variation) = spec.variation {
                object["variation_seed"] = variation.seed.into();
            }
            if let Some(nsfw) = image.nsfw {
                object["nsfw"] = nsfw.into();
            }
            if !image.warnings.is_empty() {
                object["warnings"] = image.warnings.clone().into();
            }
            object
        });
        Ok((object.collect(), usage))
    };
    drawing.encode(images, data).await?
}

/// Unix time in seconds.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
