//! What answers and events say.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};

use crate::engine::GeneratedImage;
use crate::http::drawing::Drawing;
use crate::http::error::Result;
use crate::http::state::AppState;

/// What every answer and event says of its pictures.
pub(crate) fn common(drawing: &Drawing) -> Map<String, Value> {
    let size = drawing.specs.first().map(|spec| spec.final_size().to_string());
    let format = drawing.reply.format().name();
    let common = json!({ "size": size, "output_format": format, "background": "opaque" });
    common.as_object().cloned().unwrap_or_default()
}

/// One object a picture: its seed, and itself or where it is.
pub(crate) async fn data(
    state: &AppState,
    drawing: Drawing,
    pictures: Vec<GeneratedImage>,
    url: Option<String>,
) -> Result<Vec<Value>> {
    let state = state.clone();
    let data = move |drawing: &Drawing, pictures: &[GeneratedImage], files: Vec<Vec<u8>>| {
        let (field, values): (_, Vec<String>) = match url {
            Some(origin) => {
                let names = state.urls.keep(files, drawing.reply.format())?;
                ("url", names.iter().map(|name| format!("{origin}/files/{name}")).collect())
            }
            None => ("b64_json", files.iter().map(|file| BASE64_STANDARD.encode(file)).collect()),
        };
        let drawn = drawing.specs.iter().zip(pictures).zip(values);
        let object = drawn.map(|((spec, picture), value)| {
            let mut object = json!({ "seed": spec.seed, field: value });
            if let Some(nsfw) = picture.nsfw {
                object["nsfw"] = nsfw.into();
            }
            if !picture.warnings.is_empty() {
                object["warnings"] = picture.warnings.clone().into();
            }
            object
        });
        Ok(object.collect())
    };
    drawing.encode(pictures, data).await?
}

/// Unix time in seconds.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
