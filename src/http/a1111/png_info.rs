//! The generation parameters in an image file.

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::admission::Admitted;
use crate::http::error::Result;
use crate::http::state::AppState;
use crate::image::{self, Embedded};
use crate::request::{ImageFile, Object, ValidationError};

/// A request for the parameters of an image.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct PngInfo {
    /// The image file, in base64 or as a data URL.
    #[schemars(required)]
    image: Option<ImageFile>,
}

/// `POST /sdapi/v1/png-info`: the generation parameters in an image file, as text and parsed, and its
/// other texts.
pub(crate) async fn png_info(
    State(state): State<AppState>,
    mut admitted: Admitted,
) -> Result<Json<Value>> {
    let mut fields = admitted.json(&state).await?;
    let PngInfo { image } = fields.read(&state.settings.limits)?;
    let image = image.ok_or_else(|| ValidationError::malformed("image", "is required"))?;
    let read = move || {
        let embedded = Embedded::read(&image.bytes("image")?);
        let embedded = embedded.map_err(|reason| ValidationError::malformed("image", reason))?;
        let parameters = image::parse(embedded.infotext.as_deref().unwrap_or_default());
        Ok((embedded, parameters))
    };
    let deadline = admitted.slot.deadline;
    let (embedded, parameters) = state.reader.run(deadline, admitted.slot, read).await?;
    let Embedded { infotext, items } = embedded;
    let object = |texts: Vec<(String, String)>| -> Object {
        texts.into_iter().map(|(name, text)| (name, text.into())).collect()
    };
    let text = infotext.unwrap_or_default();
    let mut items = object(items);
    // As in its versions before 1.7.
    items.insert("parameters".into(), text.as_str().into());
    Ok(Json(json!({ "info": text, "items": items, "parameters": object(parameters) })))
}
