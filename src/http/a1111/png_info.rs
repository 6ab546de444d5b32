//! The parameters in a picture's file.

use axum::Json;
use serde_json::{Value, json};

use super::translate::Object;
use crate::http::admission::Admitted;
use crate::http::error::ApiError;
use crate::image;
use crate::request::{self, ValidationError};

/// `POST /sdapi/v1/png-info`: the parameters in a picture's file, as text and one by one.
pub(crate) async fn png_info(admitted: Admitted) -> Result<Json<Value>, ApiError> {
    let mut fields = admitted.json()?;
    let image = fields.text(&["image"], usize::MAX)?;
    let image = image.ok_or_else(|| ValidationError::malformed("image", "is required"))?;
    let file = request::file("image", image)?;
    let found = tokio::task::spawn_blocking(move || image::find(&file));
    let found = found.await.map_err(|_| ValidationError::malformed("image", "cannot be read"))?;
    let text =
        found.map_err(|reason| ValidationError::malformed("image", reason))?.unwrap_or_default();
    let parameters: Object =
        image::parse(&text).into_iter().map(|(name, value)| (name, value.into())).collect();
    Ok(Json(json!({ "info": text, "items": { "parameters": text }, "parameters": parameters })))
}
