//! Pictures that were asked for, from the body of the request to the body of the answer, whatever
//! lies between: a wait, a stream of events or a job.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use sd_models::{ModelInfo, Spec};
use tracing::{error, info, info_span};

use super::State;
use super::accept::{Reply, Wish};
use super::body::Speech;
use super::dialect::{Dialect, Heard, Pictures};
use super::error::ApiError;
use crate::api::{Draw, Fields, Invalid};
use crate::engine::{Client, Drawn, Engine, Failure, Job, Ticket};
use crate::image::{self, Hashes, JPEG_QUALITY};
use crate::telemetry::Id;

/// The seed for those who see every header.
pub(super) const SEED: HeaderName = HeaderName::from_static("x-sd-seed");
/// Whether the safety checker objects to any picture; absent where there is no checker.
pub(super) const NSFW: HeaderName = HeaderName::from_static("x-sd-nsfw");
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
    /// Whether there is a place for looks at the pictures in the making.
    pub(super) preview: bool,
    dialect: Dialect,
    model: Arc<ModelInfo>,
    engine: Engine,
    hashes: Hashes,
}

/// A finished answer.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Asked {
    /// Reads native fields; `choose` says how to answer.
    pub(super) async fn read(
        state: &State,
        fields: Fields,
        speech: Speech,
        choose: impl FnOnce(Wish) -> Result<Reply, ApiError>,
    ) -> Result<Self, ApiError> {
        Self::understand(state, Heard::native(fields, speech), choose).await
    }

    /// Reads what was heard in any of the dialects of `/invocations`, on a thread that may take its
    /// time over the pictures in it.
    pub(super) async fn understand(
        state: &State,
        heard: Heard,
        choose: impl FnOnce(Wish) -> Result<Reply, ApiError>,
    ) -> Result<Self, ApiError> {
        let (engine, settings) = (state.engine.clone(), &state.settings);
        let model = engine.model()?;
        let Heard { requests, speech, dialect } = heard;
        // Pictures take much more memory than their files: as many at a time as can be worked on.
        let _turn = state.readers.acquire().await;
        let (limits, reader) = (settings.limits, Arc::clone(&model));
        let read = move |fields| Draw::read(fields, &limits, &reader, random_seed);
        let read = move || requests.into_iter().map(read).collect::<Result<Vec<_>, _>>();
        // A decoder that panics was given a file that was made for it.
        let draws = tokio::task::spawn_blocking(read).await;
        let draws = draws.map_err(|_| Invalid::body("the request cannot be read"))??;
        let mut specs: Vec<Spec> = draws.iter().flat_map(Draw::specs).collect();
        let count = specs.len();
        if count > settings.limits.max_images {
            let most = settings.limits.max_images;
            let reason = format!("asks for {count} pictures in all; at most {most} are allowed");
            return Err(Invalid::range("prompt", reason).into());
        }
        let Some(Draw { format, stream, preview, .. }) = draws.into_iter().next() else {
            return Err(Invalid::body("the request asks for nothing").into());
        };
        // Several prompts are one request: picture k has seed + k.
        let first = specs.first().map_or(0, |spec| spec.seed);
        for (k, spec) in specs.iter_mut().enumerate() {
            spec.seed = first.wrapping_add(k as u64);
        }
        let reply = choose(Wish { speech, usual: dialect.format, format, count, stream })?;
        let preview = preview && matches!(reply, Reply::Events(_));
        if settings.log_prompts {
            info!(prompt = specs[0].prompt, "accepted");
        }
        let (quality, hashes) = (JPEG_QUALITY, state.hashes.clone());
        Ok(Self { specs, reply, quality, preview, dialect, model, engine, hashes })
    }

    /// The model that draws them.
    pub(super) fn model(&self) -> &ModelInfo {
        &self.model
    }

    /// Hands the pictures to the engine.
    pub(super) fn submit(
        &self,
        client: &Client,
        deadline: Option<tokio::time::Instant>,
    ) -> Result<Ticket, ApiError> {
        let (specs, client) = (self.specs.clone(), client.clone());
        Ok(self.engine.submit(Job { specs, client, deadline, preview: self.preview })?)
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

    /// The LoRAs of a picture by their hashes. Reads files.
    pub(super) fn loras(&self, spec: &Spec) -> String {
        self.hashes.of(spec, &self.model.add_ons.loras)
    }

    fn files(&self, pictures: &[Drawn]) -> Result<Vec<Vec<u8>>, ApiError> {
        let file = |(spec, picture): (&Spec, &Drawn)| {
            let began = Instant::now();
            let infotext = image::infotext(spec, &self.model.name, &self.loras(spec));
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
        let nsfw = pictures.iter().filter_map(|picture| picture.nsfw).reduce(|a, b| a | b);
        let objection = if nsfw == Some(true) { ";nsfw=true" } else { "" };
        if let Ok(value) = HeaderValue::try_from(format!("seed={seed}{objection}")) {
            headers.insert(ATTRIBUTES, value);
        }
        if let Some(nsfw) = nsfw {
            let value = if nsfw { "true" } else { "false" };
            headers.insert(NSFW, HeaderValue::from_static(value));
        }
        let (media_type, body) = match self.reply {
            Reply::Bytes(_) => (format.media_type(), files.pop().unwrap_or_default()),
            Reply::Json(_) | Reply::Events(_) => {
                let (specs, files) = (&self.specs, &files);
                let json = (self.dialect.word)(&Pictures { specs, drawn: pictures, files, format });
                ("application/json", json.into())
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
