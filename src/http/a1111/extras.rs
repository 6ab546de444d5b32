//! Pictures that are upscaled without drawing ("extras").
//!
//! Reference: AUTOMATIC1111's `modules/postprocessing.py` and `scripts/postprocessing_upscale.py`.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use sd_models::{ModelInfo, Rgb, Spec};
use serde::Deserialize;
use serde_json::{Value, json};

use super::extras_fields::{Extras, client_name, refused};
use super::unread;
use crate::engine::{Client, GeneratedImage, Job, JobError};
use crate::http::admission::{Admitted, RequestSlot};
use crate::http::drawing::{base64, warnings};
use crate::http::error::{ApiError, Result};
use crate::http::state::AppState;
use crate::http::store::InFlightRequest;
use crate::image::{self, Embedded};
use crate::request::{ImageFile, Limits, ValidationError};

/// The keyword of what extras did, in the file.
const DONE: &str = "postprocessing";

/// A request for one picture.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct ExtraSingleImage {
    #[serde(flatten)]
    extras: Extras,
    #[serde(flatten)]
    single: Single,
}

/// A request for several pictures.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct ExtraBatchImages {
    #[serde(flatten)]
    extras: Extras,
    #[serde(flatten)]
    batch: Batch,
}

#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Single {
    /// The image file, in base64 or as a data URL.
    #[schemars(required)]
    image: Option<ImageFile>,
}

#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Batch {
    /// The image files.
    #[serde(rename = "imageList")]
    #[schemars(required, extend("maxItems" = Limits::IMAGES))]
    images: Option<Vec<NamedFile>>,
}

/// An image file of a list.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct NamedFile {
    /// The image file, in base64 or as a data URL.
    data: ImageFile,
    /// Its name, which has no effect.
    #[expect(dead_code, reason = "clients must send it")]
    name: Option<String>,
}

/// `POST /sdapi/v1/extra-single-image`.
pub(crate) async fn single(
    State(state): State<AppState>,
    mut admitted: Admitted,
) -> Result<Json<Value>> {
    let mut fields = admitted.json(&state).await?;
    let extras = Extras::read(&mut fields, &state.settings.limits)?;
    let Single { image } = fields.read(&state.settings.limits)?;
    let image = image.ok_or_else(|| ValidationError::malformed("image", "is required"))?;
    let unread = unread::warnings(&fields, None, true);
    let upscaled = extras.upscale(&state, admitted, vec![("image".into(), image)]).await?;
    let Upscaled { mut files, html_info, warnings } = upscaled;
    let warnings = [unread, warnings].concat();
    // As in txt2img, 200 also if it was interrupted.
    let image = files.pop().unwrap_or_default();
    Ok(reply(json!({ "html_info": html_info, "image": image }), warnings))
}

/// `POST /sdapi/v1/extra-batch-images`.
pub(crate) async fn batch(
    State(state): State<AppState>,
    mut admitted: Admitted,
) -> Result<Json<Value>> {
    let mut fields = admitted.json(&state).await?;
    let extras = Extras::read(&mut fields, &state.settings.limits)?;
    let Batch { images } = fields.read(&state.settings.limits)?;
    let images = images.ok_or_else(|| ValidationError::malformed("imageList", "is required"))?;
    let named = |(i, file): (usize, NamedFile)| (format!("imageList[{i}].data"), file.data);
    let images = images.into_iter().enumerate().map(named).collect();
    let unread = unread::warnings(&fields, None, true);
    let Upscaled { files, html_info, warnings } = extras.upscale(&state, admitted, images).await?;
    let warnings = [unread, warnings].concat();
    Ok(reply(json!({ "html_info": html_info, "images": files }), warnings))
}

/// A reply, with the warnings if there are any.
fn reply(mut reply: Value, warnings: Vec<String>) -> Json<Value> {
    if !warnings.is_empty() {
        reply["warnings"] = warnings.into();
    }
    Json(reply)
}

/// The upscaled pictures in base64, and what is said of them.
struct Upscaled {
    files: Vec<String>,
    html_info: String,
    warnings: Vec<String>,
}

/// What is done with the pictures of a request.
enum Work {
    Nothing(Vec<Picture>),
    /// How each is enlarged, and the texts of its file.
    Enlarge(Vec<Spec>, Vec<Texts>),
}

/// Texts of a file by their keywords.
type Texts = Vec<(String, String)>;

/// A decoded picture, and the texts of its file.
struct Picture {
    rgb: Rgb,
    texts: Texts,
}

impl Extras {
    async fn upscale(
        self,
        state: &AppState,
        admitted: Admitted,
        images: Vec<(String, ImageFile)>,
    ) -> Result<Upscaled> {
        let state = match state.checkpoint.get() {
            Some(model) => state.choose(&model, admitted.slot.deadline).await?,
            None => state.clone(),
        };
        let Admitted { client, mut slot, .. } = admitted;
        let model = state.engine.model()?;
        let most = state.settings.limits.max_images;
        if images.len() > most {
            let reason = format!("holds {} images; the maximum is {most}", images.len());
            return Err(ValidationError::range("imageList", reason).into());
        }
        let mut warnings = self.without_effect();
        let info = self.info();
        let (images, bytes) = weighed(&state, &slot, images).await?;
        // A single image is always let in. All of a list are held at once.
        let most = state.inputs.most_of_client();
        if images.len() > 1 && bytes > most {
            let reason = format!(
                "takes {bytes} bytes when decoded; the maximum is {most}, half of --max-decoded-bytes"
            );
            return Err(ValidationError::range("imageList", reason).into());
        }
        let room = slot.hold_inputs(&state, bytes).await?;
        let (work, found) = self.prepare(&state, &mut slot, &model, images).await?;
        warnings.extend(found);
        warnings.extend(slot.unread().iter().cloned());
        let pictures = match work {
            Work::Nothing(pictures) => pictures,
            Work::Enlarge(specs, texts) => {
                let asked = specs.len();
                let upscaled = submit(&state, &slot, client, specs).await?;
                warnings.extend(of_images(&upscaled, asked));
                let pair = |image: GeneratedImage| {
                    let texts = texts.get(image.index).cloned().unwrap_or_default();
                    Picture { rgb: image.rgb, texts }
                };
                upscaled.into_iter().map(pair).collect()
            }
        };
        let postprocessing = info.clone();
        // They are held until the images are encoded, even if the client has disconnected.
        let held = (slot.accept(), slot, room);
        let encode = move || {
            let _held = held;
            let file = |picture: &Picture| {
                let done = (!postprocessing.is_empty()).then_some((DONE, &*postprocessing));
                let own = picture.texts.iter().map(|(keyword, text)| (&**keyword, &**text));
                // What was done before is replaced, as there.
                let own = own.filter(|(keyword, _)| *keyword != DONE || done.is_none());
                let texts: Vec<_> = own.chain(done).collect();
                let file = image::encode_png(&picture.rgb, &texts);
                file.map(|file| base64(&[file])).map_err(|_| ApiError::Encode)
            };
            let files = pictures.iter().map(file).collect::<Result<Vec<_>>>()?;
            Ok::<_, ApiError>(files.concat())
        };
        let files = tokio::task::spawn_blocking(encode).await.map_err(|_| ApiError::Encode)??;
        let html_info = format!("<p>{}</p>", escaped(&info));
        Ok(Upscaled { files, html_info, warnings })
    }

    /// Decodes the pictures, and says what is done with them, with warnings.
    async fn prepare(
        self,
        state: &AppState,
        slot: &mut RequestSlot,
        model: &Arc<ModelInfo>,
        images: Vec<(String, ImageFile)>,
    ) -> Result<(Work, Vec<String>)> {
        let (limits, own, reader) =
            (state.settings.limits, Arc::clone(model), state.reader.clone());
        let (deadline, mut images) = (slot.deadline, images);
        let read = move || {
            let (mut pictures, mut warnings) = (Vec::new(), Vec::new());
            let (mut specs, mut texts) = (Vec::new(), Vec::new());
            for (name, image) in &mut images {
                let _weighed = reader.weigh(deadline, image.weigh(limits.max_input_pixels))?;
                let (picture, warning) = Picture::read(name, image, &limits)?;
                warnings.extend(warning);
                let Some(upscaler) = self.first() else {
                    pictures.push(picture);
                    continue;
                };
                specs.push(self.spec(picture.rgb, upscaler, &limits, &own)?);
                texts.push(picture.texts);
            }
            let work = match self.first() {
                None => Work::Nothing(pictures),
                Some(_) => Work::Enlarge(specs, texts),
            };
            Ok((work, warnings))
        };
        let (work, warnings) = state.reader.run(deadline, slot.clone(), read).await?;
        slot.release_body();
        let (specs, texts) = match work {
            Work::Enlarge(specs, texts) if specs.iter().any(Spec::has_files) => (specs, texts),
            work => return Ok((work, warnings)),
        };
        let own = Arc::clone(model);
        let check = move || {
            specs.iter().try_for_each(|spec| own.check_files(spec)).map_err(refused)?;
            Ok(specs)
        };
        let specs = state.reader.look_up(deadline, slot.clone(), check).await?;
        Ok((Work::Enlarge(specs, texts), warnings))
    }
}

impl Picture {
    /// Decodes a file, with a warning of what is lost.
    fn read(name: &str, file: &ImageFile, limits: &Limits) -> Result<(Self, Option<String>)> {
        let decoded = file.decode(name, limits.max_input_pixels)?;
        let Embedded { infotext, items } = Embedded::read(&file.bytes(name)?).unwrap_or_default();
        let own = infotext.map(|text| ("parameters".to_owned(), text));
        let texts = own.into_iter().chain(items).collect();
        let warning = image::is_transparent(&decoded)
            .then(|| format!("{name} is transparent in places: their hidden colours were used"));
        let pixels = decoded.into_rgb8();
        let (width, height) = (pixels.width() as usize, pixels.height() as usize);
        let rgb = Rgb { width, height, data: pixels.into_raw() };
        Ok((Self { rgb, texts }, warning))
    }
}

/// The files, no longer in base64, and the memory of their pixels at most.
async fn weighed(
    state: &AppState,
    slot: &RequestSlot,
    mut images: Vec<(String, ImageFile)>,
) -> Result<(Vec<(String, ImageFile)>, usize)> {
    let most = state.settings.limits.max_input_pixels;
    let weigh = move || {
        let bytes = images.iter_mut().map(|(_, image)| image.weigh(most));
        let bytes = bytes.fold(0, usize::saturating_add);
        Ok((images, bytes))
    };
    state.reader.run(slot.deadline, slot.clone(), weigh).await
}

/// What is said of upscaled images, of which so many were asked for.
fn of_images(images: &[GeneratedImage], asked: usize) -> Vec<String> {
    let missing = asked.saturating_sub(images.len());
    let interrupted =
        (missing > 0).then(|| format!("interrupted: {missing} of {asked} images are missing"));
    let own = warnings(images).into_iter().map(str::to_owned);
    own.chain(interrupted).collect()
}

/// Upscales pictures, and waits for them. Those of an interrupted request may be missing.
async fn submit(
    state: &AppState,
    slot: &RequestSlot,
    client: Client,
    specs: Vec<Spec>,
) -> Result<Vec<GeneratedImage>> {
    let named = |error| match error {
        JobError::Spec { field, reason } => {
            ValidationError::range(client_name(field), reason).into()
        }
        other => slot.deadline.name(other),
    };
    let (deadline, job) = (Some(slot.deadline.at), Job::from(specs.clone()));
    let job = Job { client: client.clone(), deadline, ..job };
    let (ticket, known) = (state.engine.submit(job)?, (SystemTime::now(), specs.len()));
    let request = InFlightRequest::new(&state.engine, &ticket, client, None, known, &specs);
    let _in_flight = state.in_flight.insert(request);
    ticket.wait().await.map_err(named)
}

/// A text in HTML.
fn escaped(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#x27;"),
            c => html.push(c),
        }
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_images_is_said_once_and_missing_ones_are_counted() {
        let image = |warnings: &[&str]| GeneratedImage {
            index: 0,
            rgb: Rgb { width: 0, height: 0, data: Vec::new() },
            warnings: warnings.iter().map(|text| (*text).to_owned()).collect(),
            nsfw: None,
            loras: Vec::new(),
            text_tokens: 0,
        };
        let images = [image(&["blurred"]), image(&["blurred", "other"])];
        assert_eq!(of_images(&images, 2), ["blurred", "other"]);
        let missing = "interrupted: 2 of 3 images are missing";
        assert_eq!(of_images(&images[..1], 3), ["blurred", missing]);
    }
}
