//! The JSON of responses and events.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::engine::{Client, GeneratedImage};
use crate::http::drawing::{Drawing, base64};
use crate::http::error::Result;
use crate::http::state::AppState;

/// The URLs of a response's images.
#[derive(Debug, Clone)]
pub(crate) struct ImageUrls {
    /// What is before their paths.
    pub(crate) base: String,
    /// Whose images they are.
    pub(crate) client: Client,
}

/// The fields of every response and event.
pub(crate) fn common(drawing: &Drawing) -> Value {
    let size = drawing.specs.first().map(|spec| spec.final_size().to_string());
    let format = drawing.reply.format().name();
    json!({ "size": size, "output_format": format, "background": "opaque" })
}

/// An object for each image: its seed, and its file in base64 or its URL.
pub(crate) async fn data(
    state: &AppState,
    drawing: Drawing,
    images: Vec<GeneratedImage>,
    urls: Option<ImageUrls>,
) -> Result<Vec<Value>> {
    let state = state.clone();
    let data = move |drawing: &Drawing, images: &[GeneratedImage], files: Vec<Vec<u8>>| {
        let (field, values) = match urls {
            Some(ImageUrls { base, client }) => {
                let names = state.urls.insert(&client, files, drawing.reply.format())?;
                let url = |name| format!("{base}/files/{name}");
                ("url", names.iter().map(url).collect::<Vec<_>>())
            }
            None => ("b64_json", base64(&files)),
        };
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
        Ok(object.collect())
    };
    drawing.encode(images, data).await?
}

/// Unix time in seconds.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
