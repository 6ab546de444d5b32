//! Requests with images: multipart forms, or JSON that holds the images.

use axum::body::{Body, Bytes};
use axum::extract::multipart::MultipartError;
use axum::extract::{DefaultBodyLimit, FromRequest as _, Multipart, Request};
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use serde_json::Value;
use tokio::runtime::Handle;

use crate::http::admission::Admitted;
use crate::http::error::{ApiError, Result};
use crate::http::state::AppState;
use crate::request::{Fields, ImageFile, MAX_FIELDS, ValidationError, brief};

/// Names of the input image in JSON.
const IMAGES: [&str; 3] = ["image", "images", "image[]"];

/// A request with images.
pub(crate) struct Form {
    pub(crate) fields: Fields,
    pub(crate) image: Option<ImageFile>,
    pub(crate) mask: Option<ImageFile>,
}

/// The parts of a multipart form.
#[derive(Default)]
struct Parts {
    texts: Vec<(String, String)>,
    image: Option<Bytes>,
    mask: Option<Bytes>,
}

impl Form {
    /// Takes the body out of the request.
    pub(crate) async fn read(state: &AppState, admitted: &mut Admitted) -> Result<Self> {
        let declared = admitted.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
        let is_form =
            declared.is_some_and(|kind| kind.to_ascii_lowercase().starts_with(b"multipart/"));
        if !is_form && admitted.body.trim_ascii_start().starts_with(b"{") {
            return Ok(Self::of_json(admitted.json(state).await?)?);
        }
        let body = std::mem::take(&mut admitted.body);
        let (headers, runtime) = (admitted.headers.clone(), Handle::current());
        let read = move |body: Vec<u8>| {
            let mut request = Request::new(Body::from(body));
            *request.headers_mut() = headers;
            // Admission has limited the body.
            DefaultBodyLimit::disable().apply(&mut request);
            // The body is here, so nothing is waited for.
            let Parts { texts, image, mask } = runtime.block_on(Parts::read(request))?;
            let (image, mask) = (image.map(ImageFile::Bytes), mask.map(ImageFile::Bytes));
            Ok(Self { fields: Fields::form(texts)?, image, mask })
        };
        let slot = admitted.slot.clone();
        state.reader.run(slot.deadline, slot, move || read(body)).await
    }

    /// JSON with the images as base64 or data URLs.
    fn of_json(mut fields: Fields) -> Result<Self, ValidationError> {
        let mut take = |names: &[&str]| match fields.take(names)? {
            Some((name, value)) => image(&name, value),
            None => Ok(None),
        };
        let (image, mask) = (take(&IMAGES)?, take(&["mask"])?);
        Ok(Self { fields, image, mask })
    }
}

/// The image of a JSON value: a text, also as the `image_url` of an object, alone or in a list.
fn image(name: &str, value: Value) -> Result<Option<ImageFile>, ValidationError> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.into())),
        Value::Array(list) if list.len() > 1 => {
            Err(ValidationError::range(name, "must be a single image"))
        }
        Value::Array(mut list) => list.pop().map_or(Ok(None), |value| image(name, value)),
        Value::Object(mut members) => match members.remove("image_url") {
            Some(url) => image(name, url),
            None if members.contains_key("file_id") => {
                let reason =
                    "must be a data URL in image_url: there are no files with a file_id here";
                Err(ValidationError::range(name, reason))
            }
            None => {
                members.remove("url").map_or_else(|| Err(no_image(name)), |url| image(name, url))
            }
        },
        _ => Err(no_image(name)),
    }
}

fn no_image(name: &str) -> ValidationError {
    ValidationError::malformed(name, "must be an image file in base64, bare or as a data URL")
}

/// The name of a part without the brackets of a list, `image[]` or `image[0]`, as clients send it.
fn plain(name: &str) -> &str {
    let listed = name.strip_suffix(']').and_then(|name| name.rsplit_once('['));
    let listed = listed.filter(|(_, index)| index.bytes().all(|byte| byte.is_ascii_digit()));
    listed.map(|(name, _)| name).filter(|name| ["image", "mask"].contains(name)).unwrap_or(name)
}

impl Parts {
    async fn read(request: Request) -> Result<Self> {
        let mut parts = Multipart::from_request(request, &()).await.map_err(|_| {
            ApiError::MediaType("send multipart/form-data with a boundary, or JSON".into())
        })?;
        let broken = |error: MultipartError| {
            ValidationError::body(format!("the form is malformed: {}", brief(&error.body_text())))
        };
        let mut form = Self::default();
        while let Some(part) = parts.next_field().await.map_err(broken)? {
            let name = plain(part.name().unwrap_or_default()).to_owned();
            let is_named = part.file_name().is_some_and(|file| !file.is_empty());
            let data = part.bytes().await.map_err(broken)?;
            if data.is_empty() && ["image", "mask"].contains(&name.as_str()) {
                if is_named {
                    let reason = "is an empty file: the client could not read it";
                    return Err(ValidationError::malformed(&name, reason).into());
                }
                // Browsers send a part for a file that was not chosen.
                continue;
            }
            match name.as_str() {
                "image" if form.image.is_none() => form.image = Some(data),
                "image" => {
                    return Err(ValidationError::range("image", "must be a single image").into());
                }
                "mask" if form.mask.is_none() => form.mask = Some(data),
                "mask" => return Err(ValidationError::malformed("mask", "is given twice").into()),
                _ if form.texts.len() == MAX_FIELDS => {
                    let message = format!("the form has more than {MAX_FIELDS} fields");
                    return Err(ValidationError::body(message).into());
                }
                _ => {
                    let text = String::from_utf8(data.into()).map_err(|_| {
                        let reason = "is no field that takes a file, and is not UTF-8 text";
                        ValidationError::malformed(&name, reason)
                    })?;
                    form.texts.push((name, text));
                }
            }
        }
        Ok(form)
    }
}
