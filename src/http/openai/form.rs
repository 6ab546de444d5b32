//! Multipart forms.

use axum::body::{Body, Bytes};
use axum::extract::multipart::MultipartError;
use axum::extract::{DefaultBodyLimit, FromRequest as _, Multipart, Request};
use tokio::runtime::Handle;

use crate::http::admission::Admitted;
use crate::http::error::{ApiError, Result};
use crate::http::state::AppState;
use crate::request::{MAX_FIELDS, ValidationError, brief};

/// A form with files in it.
#[derive(Default)]
pub(crate) struct Form {
    pub(crate) texts: Vec<(String, String)>,
    pub(crate) image: Option<Bytes>,
    pub(crate) mask: Option<Bytes>,
}

impl Form {
    /// Takes the body out of the request.
    pub(crate) async fn read(state: &AppState, admitted: &mut Admitted) -> Result<Self> {
        let body = std::mem::take(&mut admitted.body);
        let (headers, runtime) = (admitted.headers.clone(), Handle::current());
        let read = move |body: Vec<u8>| {
            let mut request = Request::new(Body::from(body));
            *request.headers_mut() = headers;
            // Admission has limited the body.
            DefaultBodyLimit::disable().apply(&mut request);
            // The body is here, so nothing is waited for.
            runtime.block_on(Self::parse(request))
        };
        let slot = admitted.slot.clone();
        state.reader.run(slot.deadline, slot, move || read(body)).await
    }

    async fn parse(request: Request) -> Result<Self> {
        let mut parts = Multipart::from_request(request, &())
            .await
            .map_err(|_| ApiError::MediaType("send multipart/form-data with a boundary".into()))?;
        let broken = |error: MultipartError| {
            ValidationError::body(format!("the form is malformed: {}", brief(&error.body_text())))
        };
        let mut form = Self::default();
        while let Some(part) = parts.next_field().await.map_err(broken)? {
            let name = part.name().unwrap_or_default().to_owned();
            let data = part.bytes().await.map_err(broken)?;
            // Browsers send a part for a file that was not chosen.
            if data.is_empty() && ["image", "image[]", "mask"].contains(&name.as_str()) {
                continue;
            }
            match name.as_str() {
                // OpenAI's clients use the second name for a list.
                "image" | "image[]" if form.image.is_none() => form.image = Some(data),
                "image" | "image[]" => {
                    return Err(ValidationError::range("image", "must be a single image").into());
                }
                "mask" if form.mask.is_none() => form.mask = Some(data),
                "mask" => return Err(ValidationError::malformed("mask", "is given twice").into()),
                _ if form.texts.len() == MAX_FIELDS => {
                    let message = format!("the form has more than {MAX_FIELDS} fields");
                    return Err(ValidationError::body(message).into());
                }
                _ => {
                    let text = String::from_utf8(data.into())
                        .map_err(|_| ValidationError::body(format!("{name:?} is not UTF-8")))?;
                    form.texts.push((name, text));
                }
            }
        }
        Ok(form)
    }
}
