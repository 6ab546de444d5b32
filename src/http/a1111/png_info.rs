//! The generation parameters in an image file.

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::admission::Admitted;
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::image;
use crate::request::{ImageFile, Object, ValidationError};

/// A request for the parameters of an image.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct PngInfo {
    /// The image file, in base64 or as a data URL.
    #[schemars(required)]
    image: Option<ImageFile>,
}

/// `POST /sdapi/v1/png-info`: the generation parameters in an image file, as text and parsed.
pub(crate) async fn png_info(
    State(state): State<AppState>,
    mut admitted: Admitted,
) -> Result<Json<Value>> {
    let mut fields = admitted.json(&state).await?;
    let PngInfo { image } = fields.read(&state.settings.limits)?;
    let image = image.ok_or_else(|| ValidationError::malformed("image", "is required"))?;
    let text = move || {
        let text = image::find(&image.bytes("image")?);
        let text = text.map_err(|reason| ValidationError::malformed("image", reason))?;
        let text = text.unwrap_or_default();
        let parameters = image::parse(&text);
        Ok((text, parameters))
    };
    let (text, parameters) = state.reader.run(admitted.slot.deadline, admitted.slot, text).await?;
    let parameters: Object =
        parameters.into_iter().map(|(name, value)| (name, value.into())).collect();
    Ok(Json(json!({ "info": text, "items": { "parameters": text }, "parameters": parameters })))
}
