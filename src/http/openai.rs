//! OpenAI's Images API and list of models, as its official clients speak it. A request is put into
//! native words and read like any other, so the native fields (`seed`, `steps`, `guidance_scale`,
//! `negative_prompt`, `scheduler`) may stand beside OpenAI's own. What OpenAI's models can be told
//! and ours cannot (`quality`, `style`, `moderation`) is accepted and changes nothing; what would
//! change the picture (a transparent background, SVG) is refused.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Request};
use axum::http::header::{CONTENT_TYPE, HOST};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::stream;
use serde_json::{Map, Value, json};
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::accept::Reply;
use super::asked::Asked;
use super::body::Speech;
use super::error::{self, ApiError, Reason};
use super::events::{Answering, HEARTBEAT};
use super::intake::{self, Intake};
use super::{State, models};
use crate::api::{Fields, Invalid};
use crate::engine::{Drawn, Failure, Preview, Progress, Ticket};
use crate::image::{self, Format};

/// Names that clients send who know no other server than OpenAI's. They mean whatever is here.
const THEIR_MODELS: [&str; 3] = ["dall-e-", "gpt-image-", "chatgpt-image-"];

/// Tells OpenAI's clients that to send the request again will not help.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// What a client wants besides pictures.
#[derive(Debug, Clone)]
struct Wish {
    /// `image_generation` or `image_edit`: the first half of the names of events.
    kind: &'static str,
    /// Where pictures are fetched, if they are not to be in the answer.
    url: Option<String>,
    partial_images: usize,
}

/// `POST /v1/images/generations`.
pub(super) async fn generations(state: State, request: Request) -> Result<Response, ApiError> {
    let intake = intake::take(&state, request).await?;
    let text = std::str::from_utf8(&intake.body)
        .map_err(|error| Invalid::body(format!("the body is not UTF-8: {error}")))?;
    let fields = Fields::json(text)?;
    draw(state, intake, fields, "image_generation").await
}

/// `POST /v1/images/edits`: a form with a picture in it, and a mask whose transparent parts are to
/// be painted anew. Without one it is the picture's own transparency that says where, and without
/// that the whole picture is begun from.
pub(super) async fn edits(state: State, request: Request) -> Result<Response, ApiError> {
    let mut intake = intake::take(&state, request).await?;
    let body = std::mem::take(&mut intake.body);
    let Form { texts, image, mask } = Form::read(&intake.headers, body).await?;
    let image = image.ok_or_else(|| Invalid::malformed("image", "is required"))?;
    let mut fields = Fields::form(texts);
    let encoded = BASE64_STANDARD.encode(&image);
    let (name, file) = match mask {
        Some(mask) => ("mask", mask),
        None => ("image", image),
    };
    let most = state.settings.limits.max_input_pixels;
    let turn = state.readers.acquire().await;
    let found = tokio::task::spawn_blocking(move || image::mask(&file, most, image::holes)).await;
    drop(turn);
    let holes = found.map_err(|_| Invalid::malformed(name, "cannot be read"))?;
    let holes = holes.map_err(|reason| Invalid::range(name, reason))?;
    if holes.is_none() && name == "mask" {
        let reason = "has no transparent pixels; they say what is to be painted anew";
        return Err(Invalid::range(name, reason).into());
    }
    if let Some(holes) = holes {
        fields.add("mask", name, BASE64_STANDARD.encode(holes));
        // Nothing is to be seen any more of what was there.
        if !fields.has("strength") {
            fields.add("strength", "strength", "1");
        }
    }
    fields.add("image", "image", encoded);
    draw(state, intake, fields, "image_edit").await
}

/// A form with files in it.
#[derive(Default)]
struct Form {
    texts: Vec<(String, String)>,
    image: Option<Bytes>,
    mask: Option<Bytes>,
}

impl Form {
    async fn read(headers: &HeaderMap, body: Vec<u8>) -> Result<Self, ApiError> {
        let declared = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let boundary = multer::parse_boundary(declared.unwrap_or_default())
            .map_err(|_| ApiError::MediaType("send multipart/form-data with a boundary".into()))?;
        let broken = |error: multer::Error| Invalid::body(format!("the form is broken: {error}"));
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
                    return Err(Invalid::range("image", "may be one picture only").into());
                }
                "mask" if form.mask.is_none() => form.mask = Some(data),
                _ => {
                    let text = String::from_utf8(data.into())
                        .map_err(|_| Invalid::malformed(&name, "is not UTF-8"))?;
                    form.texts.push((name, text));
                }
            }
        }
        Ok(form)
    }
}

/// Reads OpenAI's fields, draws, and answers.
async fn draw(
    state: State,
    intake: Intake,
    mut fields: Fields,
    kind: &'static str,
) -> Result<Response, ApiError> {
    let Intake { headers, client, deadline, stream_deadline, permit, .. } = intake;
    let Words { model, compression, url, partial_images } = translate(&mut fields)?;
    let state = find(state, model).await?;
    let url = url.then(|| origin(&headers));
    let wish = Wish { kind, url, partial_images };
    let asked = Asked::read(&state, fields, Speech::Json, |wish| {
        let format = wish.format.unwrap_or(Format::Png);
        Ok(if wish.stream { Reply::Events(format) } else { Reply::Json(format) })
    })
    .await;
    let mut asked = asked?;
    asked.quality = quality(compression, asked.reply.format())?.unwrap_or(asked.quality);
    let streams = matches!(asked.reply, Reply::Events(_));
    let ticket = asked.submit(&client, Some(if streams { stream_deadline } else { deadline }))?;
    let common = common(&asked);
    if streams {
        return Ok(stream(state, asked, ticket, wish, common, permit));
    }
    let pictures = ticket.wait().await?;
    let data = data(&state, asked, pictures, wish.url).await?;
    let mut reply = common;
    reply.insert("created".into(), now().into());
    reply.insert("data".into(), data.into());
    Ok(Json(reply).into_response())
}

/// What OpenAI's words say that ours cannot.
pub(super) struct Words {
    model: Option<String>,
    compression: Option<u64>,
    url: bool,
    partial_images: usize,
}

/// Puts the fields that are OpenAI's own into native words.
pub(super) fn translate(fields: &mut Fields) -> Result<Words, Invalid> {
    let model = fields.text(&["model"], 256)?;
    for silent in ["quality", "style", "moderation", "input_fidelity", "user", "safety_identifier"]
    {
        fields.text(&[silent], 256)?;
    }
    fields.one_of(&["background"], &["auto", "opaque"])?;
    if let Some(size) = fields.text(&["size"], 32)?
        && size != "auto"
    {
        let sides = size.split_once('x').and_then(|(width, height)| {
            Some((width.parse::<u64>().ok()?, height.parse::<u64>().ok()?))
        });
        let (width, height) = sides.ok_or_else(|| {
            Invalid::malformed("size", format!("must be auto or like 512x512, not {size:?}"))
        })?;
        fields.add("width", "size", width);
        fields.add("height", "size", height);
    }
    let compression = fields.whole(&["output_compression"], 0..=100)?;
    let url = fields.one_of(&["response_format"], &["b64_json", "url"])? == Some("url");
    let partial_images = fields.whole(&["partial_images"], 0..=3)?.unwrap_or(0) as usize;
    if partial_images > 0 {
        fields.add("preview", "partial_images", true);
    }
    Ok(Words { model, compression, url, partial_images })
}

/// What `output_compression` means for a format: the quality of JPEG. Our PNG and WebP are lossless.
fn quality(compression: Option<u64>, format: Format) -> Result<Option<u8>, Invalid> {
    match (compression, format) {
        (None | Some(100), Format::Png | Format::Webp) | (None, Format::Jpeg) => Ok(None),
        (Some(percent), Format::Jpeg) => Ok(u8::try_from(percent.max(1)).ok()),
        (Some(_), Format::Png | Format::Webp) => {
            let reason = "is for jpeg only; png and webp are lossless here";
            Err(Invalid::range("output_compression", reason))
        }
    }
}

/// What every answer and event says of its pictures.
fn common(asked: &Asked) -> Map<String, Value> {
    let size = asked.specs.first().map(|spec| spec.final_size().to_string());
    let format = asked.reply.format().name();
    let common = json!({ "size": size, "output_format": format, "background": "opaque" });
    common.as_object().cloned().unwrap_or_default()
}

/// One object a picture: its seed, and itself or where it is.
async fn data(
    state: &State,
    asked: Asked,
    pictures: Vec<Drawn>,
    url: Option<String>,
) -> Result<Vec<Value>, ApiError> {
    let state = state.clone();
    let data = move |asked: &Asked, pictures: &[Drawn], files: Vec<Vec<u8>>| {
        let (field, values): (_, Vec<String>) = match url {
            Some(origin) => {
                let names = state.shelf.keep(files, asked.reply.format(), &state.settings)?;
                ("url", names.iter().map(|name| format!("{origin}/files/{name}")).collect())
            }
            None => ("b64_json", files.iter().map(|file| BASE64_STANDARD.encode(file)).collect()),
        };
        let drawn = asked.specs.iter().zip(pictures).zip(values);
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
    asked.encode(pictures, data).await?
}

/// Scheme and host as the client sees them, also through a proxy that says so.
fn origin(headers: &HeaderMap) -> String {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let scheme = header("x-forwarded-proto").filter(|scheme| *scheme == "https").unwrap_or("http");
    let host = header("x-forwarded-host").or_else(|| header(HOST.as_str()));
    host.map_or(String::new(), |host| format!("{scheme}://{host}"))
}

/// A request as a stream of events.
struct Underway {
    wish: Wish,
    common: Map<String, Value>,
    format: Format,
    quality: u8,
    previews: Option<watch::Receiver<Option<Preview>>>,
    progress: watch::Receiver<Progress>,
    /// Previews that have been told.
    told: usize,
    result: Answering<Vec<Value>>,
    /// What is to be told when the pictures are there.
    last: VecDeque<Event>,
    over: bool,
    _permit: OwnedSemaphorePermit,
}

fn stream(
    state: State,
    asked: Asked,
    ticket: Ticket,
    wish: Wish,
    common: Map<String, Value>,
    permit: OwnedSemaphorePermit,
) -> Response {
    let (format, quality) = (asked.reply.format(), asked.quality);
    let (previews, progress) = (ticket.previews(), ticket.progress());
    let url = wish.url.clone();
    let result = tokio::spawn(async move {
        let pictures = ticket.wait().await?;
        data(&state, asked, pictures, url).await
    });
    let underway = Underway {
        wish,
        common,
        format,
        quality,
        previews,
        progress,
        told: 0,
        result: Answering(result),
        last: VecDeque::new(),
        over: false,
        _permit: permit,
    };
    let events = stream::unfold(underway, async |mut underway| {
        let event = underway.next().await?;
        Some((Ok::<_, Infallible>(event), underway))
    });
    let alive = KeepAlive::new().interval(HEARTBEAT).text("waiting");
    Sse::new(events).keep_alive(alive).into_response()
}

impl Underway {
    async fn next(&mut self) -> Option<Event> {
        while !self.over {
            let wanted = self.told < self.wish.partial_images;
            let preview = look(self.previews.as_mut().filter(|_| wanted));
            tokio::select! {
                result = &mut self.result.0 => {
                    self.over = true;
                    self.end(result.unwrap_or(Err(ApiError::Encode)));
                }
                preview = preview => {
                    if let Some(event) = self.partial(preview).await {
                        return Some(event);
                    }
                }
            }
        }
        self.last.pop_front()
    }

    /// A look at a picture, when the next share of the steps has been made.
    async fn partial(&mut self, Preview { rgb, .. }: Preview) -> Option<Event> {
        let Progress { made, total, .. } = *self.progress.borrow();
        if made * (self.wish.partial_images + 1) < total * (self.told + 1) {
            return None;
        }
        let (format, quality) = (self.format, self.quality);
        let encode = move || image::encode(&rgb, format, quality, "");
        let file = tokio::task::spawn_blocking(encode).await.ok()?.ok()?;
        let mut data = json!({ "b64_json": BASE64_STANDARD.encode(file) });
        data["partial_image_index"] = self.told.into();
        self.told += 1;
        Some(self.event("partial_image", data))
    }

    fn end(&mut self, result: Result<Vec<Value>, ApiError>) {
        match result {
            Ok(pictures) => {
                let events = pictures.into_iter().map(|data| self.event("completed", data));
                self.last = events.collect();
            }
            Err(error) => {
                let data = describe(error.status(), &error.reason());
                self.last.push_back(Event::default().event("error").data(data.to_string()));
            }
        }
    }

    fn event(&self, end: &str, mut data: Value) -> Event {
        let name = format!("{}.{end}", self.wish.kind);
        data["type"] = name.as_str().into();
        data["created_at"] = now().into();
        data["quality"] = "auto".into();
        for (name, value) in &self.common {
            data[name] = value.clone();
        }
        Event::default().event(name).data(data.to_string())
    }
}

/// The next preview; never, where there is none to come.
async fn look(previews: Option<&mut watch::Receiver<Option<Preview>>>) -> Preview {
    if let Some(previews) = previews
        && previews.changed().await.is_ok()
        && let Some(preview) = previews.borrow_and_update().clone()
    {
        return preview;
    }
    std::future::pending().await
}

/// `GET /v1/models`: the one that is here, and those that can be loaded.
pub(super) async fn models(state: State) -> Result<Json<Value>, ApiError> {
    let cards: Vec<Value> = names(&state).await?.iter().map(|name| card(name)).collect();
    Ok(Json(json!({ "object": "list", "data": cards })))
}

/// `GET /v1/models/{id}`; an id may hold slashes.
pub(super) async fn model(state: State, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    if names(&state).await?.contains(&id) {
        Ok(Json(card(&id)))
    } else {
        Err(ApiError::NoModel(id))
    }
}

/// The models that requests can name.
pub(super) async fn names(state: &State) -> Result<Vec<String>, ApiError> {
    let mut names = state.models.names().await;
    match state.engine.model() {
        Ok(model) => {
            names.retain(|name| *name != model.name);
            names.insert(0, model.name.clone());
        }
        Err(Failure::Absent) => {}
        Err(failure) => return Err(failure.into()),
    }
    Ok(names)
}

fn card(id: &str) -> Value {
    json!({ "id": id, "object": "model", "created": 0, "owned_by": "sd-server" })
}

/// The server as a request sees it that names this model, which may have to be loaded first.
/// OpenAI's names mean the one that is here.
async fn find(state: State, name: Option<String>) -> Result<State, ApiError> {
    let theirs = |name: &String| THEIR_MODELS.iter().any(|prefix| name.starts_with(prefix));
    let Some(name) = name.filter(|name| !theirs(name)) else { return Ok(state) };
    models::choose(&state, &name).await
}

/// Puts errors into OpenAI's words, whoever made them.
pub(super) async fn errors(response: Response) -> Response {
    let mut response = error::rephrase(response, describe);
    // A failed picture fails again; only a full queue and a start are worth another try.
    let status = response.status();
    if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    response
}

fn describe(status: StatusCode, reason: &Reason) -> Value {
    let kind = match status.as_u16() {
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    let Reason { code, message, param } = reason;
    json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
}

/// Unix time in seconds.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
