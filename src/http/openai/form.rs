//! A form with files in it.

use std::convert::Infallible;

use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use futures_util::stream;

use crate::http::error::ApiError;
use crate::request::ValidationError;

/// A form with files in it.
#[derive(Default)]
pub(crate) struct Form {
    pub(crate) texts: Vec<(String, String)>,
    pub(crate) image: Option<Bytes>,
    pub(crate) mask: Option<Bytes>,
}

impl Form {
    pub(crate) async fn read(headers: &HeaderMap, body: Vec<u8>) -> Result<Self, ApiError> {
        let declared = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let boundary = multer::parse_boundary(declared.unwrap_or_default())
            .map_err(|_| ApiError::MediaType("send multipart/form-data with a boundary".into()))?;
        let broken =
            |error: multer::Error| ValidationError::body(format!("the form is malformed: {error}"));
        let body = stream::iter([Ok::<_, Infallible>(Bytes::from(body))]);
        let mut parts = multer::Multipart::new(body, boundary);
        let mut form = Self::default();
        while let Some(part) = parts.next_field().await.map_err(broken)? {
            let name = part.name().unwrap_or_default().to_owned();
            let data = part.bytes().await.map_err(broken)?;
            match name.as_str() {
                // The second name is the client's for a list.
                "image" | "image[]" if form.image.is_none() => form.image = Some(data),
                "image" | "image[]" => {
                    return Err(ValidationError::range("image", "must be a single image").into());
                }
                "mask" if form.mask.is_none() => form.mask = Some(data),
                _ => {
                    let text = String::from_utf8(data.into())
                        .map_err(|_| ValidationError::malformed(&name, "is not UTF-8"))?;
                    form.texts.push((name, text));
                }
            }
        }
        Ok(form)
    }
}
