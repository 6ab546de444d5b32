//! Pictures that were asked for, from the body of the request to the body of the answer, whatever
//! lies between: a wait, a stream of events or a job.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sd_models::{ModelInfo, Spec};
use serde_json::{Value, json};
use tracing::{error, info, info_span};

use super::State;
use super::accept::{Reply, Wish};
use super::body::Speech;
use super::error::ApiError;
use crate::api::{Draw, Fields};
use crate::engine::{Client, Drawn, Engine, Failure, Job, Ticket};
use crate::image::{self, Format, JPEG_QUALITY};
use crate::telemetry::Id;

/// The seed for those who see every header.
pub(super) const SEED: HeaderName = HeaderName::from_static("x-sd-seed");
/// The seed for those behind SageMaker, which passes on only this header.
const ATTRIBUTES: HeaderName = HeaderName::from_static("x-amzn-sagemaker-custom-attributes");

/// How soon those who can wait try again in a full queue.
const PAUSE: Duration = Duration::from_millis(200);

/// A valid request and the form of its answer.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) specs: Vec<Spec>,
    pub(super) reply: Reply,
    /// Of JPEG, up to 100.
    pub(super) quality: u8,
    preview: bool,
    model: Arc<ModelInfo>,
    engine: Engine,
}

/// A finished answer.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Asked {
    /// Reads the fields; `choose` says how to answer.
    pub(super) fn read(
        state: &State,
        fields: Fields,
        speech: Speech,
        choose: impl FnOnce(Wish) -> Result<Reply, ApiError>,
    ) -> Result<Self, ApiError> {
        let (engine, settings) = (state.engine.clone(), &state.settings);
        let model = engine.model()?;
        let draw = Draw::read(fields, &settings.limits, &model, random_seed)?;
        let (format, count, stream) = (draw.format, draw.count(), draw.stream);
        let reply = choose(Wish { speech, format, count, stream })?;
        let (specs, preview) = (draw.specs(), draw.preview);
        if settings.log_prompts {
            info!(prompt = specs[0].prompt, "accepted");
        }
        Ok(Self { specs, reply, quality: JPEG_QUALITY, preview, model, engine })
    }

    /// Hands the pictures to the engine.
    pub(super) fn submit(
        &self,
        client: &Client,
        deadline: Option<tokio::time::Instant>,
    ) -> Result<Ticket, ApiError> {
        let (specs, client) = (self.specs.clone(), client.clone());
        // Only a stream has a place for previews.
        let preview = self.preview && matches!(self.reply, Reply::Events(_));
        Ok(self.engine.submit(Job { specs, client, deadline, preview })?)
    }

    /// Hands the pictures to the engine as soon as there is room for them.
    pub(super) async fn submit_patiently(
        &self,
        client: &Client,
        deadline: tokio::time::Instant,
    ) -> Result<Ticket, ApiError> {
        loop {
            match self.submit(client, Some(deadline)) {
                Err(ApiError::Failure(Failure::Full { .. })) => tokio::time::sleep(PAUSE).await,
                submitted => return submitted,
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(Failure::Deadline.into());
            }
        }
    }

    /// The native answer.
    pub(super) async fn answer(self, pictures: Vec<Drawn>) -> Result<Answer, ApiError> {
        self.encode(pictures, Self::native).await
    }

    /// Puts the pictures into their files, and with `dress` the files into an answer, on a thread
    /// for that.
    pub(super) async fn encode<T: Send + 'static>(
        self,
        pictures: Vec<Drawn>,
        dress: impl FnOnce(&Self, &[Drawn], Vec<Vec<u8>>) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let span = info_span!(parent: tracing::Span::current(), "encode");
        let work = move || {
            let _inside = span.enter();
            let files = self.files(&pictures)?;
            Ok(dress(&self, &pictures, files))
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::Encode)?
    }

    fn files(&self, pictures: &[Drawn]) -> Result<Vec<Vec<u8>>, ApiError> {
        let file = |(spec, picture): (&Spec, &Drawn)| {
            let began = Instant::now();
            let infotext = image::infotext(spec, &self.model.name);
            let file = image::encode(&picture.rgb, self.reply.format(), self.quality, &infotext);
            self.engine.metrics().time(Id::StageSeconds, &["encode"], began.elapsed());
            file.map_err(|error| {
                error!("{error:#}");
                ApiError::Encode
            })
        };
        self.specs.iter().zip(pictures).map(file).collect()
    }

    fn native(&self, pictures: &[Drawn], mut files: Vec<Vec<u8>>) -> Answer {
        let format = self.reply.format();
        let mut headers = HeaderMap::new();
        let seed = self.specs.first().map_or(0, |spec| spec.seed);
        headers.insert(SEED, HeaderValue::from(seed));
        if let Ok(value) = HeaderValue::try_from(format!("seed={seed}")) {
            headers.insert(ATTRIBUTES, value);
        }
        let (media_type, body) = match self.reply {
            Reply::Bytes(_) => (format.media_type(), files.pop().unwrap_or_default()),
            Reply::Json(_) | Reply::Events(_) => {
                let json = json(&self.specs, pictures, &files, format);
                ("application/json", json.to_string().into())
            }
        };
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
        Answer { headers, body: body.into() }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        (self.headers, self.body).into_response()
    }
}

/// Thirty-two bits, so that a client that reads numbers as doubles can repeat the picture.
fn random_seed() -> u64 {
    getrandom::u32().unwrap_or_default().into()
}

/// `data` and `seed` for one picture, `images` for several.
fn json(specs: &[Spec], pictures: &[Drawn], files: &[Vec<u8>], format: Format) -> Value {
    let image = |(spec, file): (&Spec, &Vec<u8>)| {
        let data = BASE64_STANDARD.encode(file);
        json!({ "seed": spec.seed, "data": data })
    };
    let mut images: Vec<Value> = specs.iter().zip(files).map(image).collect();
    let mut reply = match &mut images[..] {
        [one] => one.take(),
        _ => json!({ "images": images }),
    };
    reply["prompt"] = specs.first().map(|spec| spec.prompt.as_str()).into();
    reply["content_type"] = format.media_type().into();
    if let Some(first) = pictures.first().filter(|picture| !picture.warnings.is_empty()) {
        reply["warnings"] = first.warnings.clone().into();
    }
    reply
}
