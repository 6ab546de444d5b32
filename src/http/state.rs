//! The bounds of the HTTP side, and what its handlers share.

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use axum::http::HeaderValue;
use tokio::sync::Semaphore;

use super::error::ApiError;
use super::store::{InFlight, JobStore, SelectedCheckpoint, UrlStore};
use crate::engine::{Engine, JobError};
use crate::image::Hashes;
use crate::registry::{ModelLease, ModelRegistry, RegistryError};
use crate::request::Limits;

/// The bounds of the HTTP side.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// What one request may ask for.
    pub limits: Limits,
    /// Length of a body.
    pub max_body_bytes: usize,
    /// Requests served at the same time, waiting ones included.
    pub max_requests: usize,
    /// From the head of a request to its answer.
    pub request_timeout: Duration,
    /// The same for an answer that is a stream.
    pub stream_timeout: Duration,
    /// Jobs that are kept, those with a result included.
    pub max_jobs: usize,
    /// From the acceptance of a job to its result.
    pub job_timeout: Duration,
    /// How long the result of a job is kept.
    pub job_retention: Duration,
    /// How long a picture that was answered with a URL is kept.
    pub url_retention: Duration,
    /// Size of all pictures that are kept for their URL.
    pub max_url_bytes: usize,
    /// From the opening of a connection, or the last answer on it, to the head of a request.
    pub idle_timeout: Duration,
    /// Open connections.
    pub max_connections: usize,
    /// Whether prompts may appear in the log.
    pub log_prompts: bool,
    /// Who may come in; everyone when there are none.
    pub api_keys: Vec<ApiKey>,
    /// The web pages that may call from a browser; `*` stands for all.
    pub cors_origins: Vec<HeaderValue>,
}

/// A key that opens the routes of `/v1` and `/sdapi`. It does not show itself.
#[derive(Clone)]
pub struct ApiKey(Box<str>);

impl FromStr for ApiKey {
    type Err = String;

    fn from_str(key: &str) -> Result<Self, String> {
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("an API key is one or more visible ASCII characters".into());
        }
        Ok(Self(key.into()))
    }
}

impl ApiKey {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// What the handlers share.
#[derive(Debug, Clone)]
pub(crate) struct AppState {
    /// The model that the request means.
    pub(crate) engine: Engine,
    _chosen: Option<ModelLease>,
    shared: Arc<AppShared>,
}

/// The part that is the same for every model.
#[derive(Debug)]
pub(crate) struct AppShared {
    pub(crate) models: ModelRegistry,
    pub(crate) settings: HttpConfig,
    /// A permit for each request in flight: bodies and images take memory.
    pub(crate) request_slots: Arc<Semaphore>,
    /// A permit for each request whose images are being decoded.
    pub(crate) decode_slots: Arc<Semaphore>,
    pub(crate) jobs: Arc<JobStore>,
    pub(crate) urls: UrlStore,
    pub(crate) in_flight: InFlight,
    pub(crate) checkpoint: SelectedCheckpoint,
    pub(crate) hashes: Hashes,
}

impl Deref for AppState {
    type Target = AppShared;

    fn deref(&self) -> &AppShared {
        &self.shared
    }
}

impl AppState {
    pub(crate) fn new(models: ModelRegistry, settings: HttpConfig) -> Self {
        let readers = thread::available_parallelism().map_or(1, usize::from);
        let (jobs, in_flight, checkpoint, hashes) = Default::default();
        let shared = AppShared {
            request_slots: Arc::new(Semaphore::new(settings.max_requests)),
            decode_slots: Arc::new(Semaphore::new(readers)),
            jobs,
            urls: UrlStore::new(settings.url_retention, settings.max_url_bytes),
            in_flight,
            checkpoint,
            hashes,
            models,
            settings,
        };
        let engine = shared.models.default_engine().clone();
        Self { engine, _chosen: None, shared: Arc::new(shared) }
    }

    /// The same for a request that means another model.
    pub(crate) fn on(&self, chosen: ModelLease) -> Self {
        let engine = chosen.engine.clone();
        Self { engine, _chosen: Some(chosen), shared: Arc::clone(&self.shared) }
    }

    /// The same for a request that names a model, which may have to be loaded first.
    pub(crate) async fn choose(&self, name: &str) -> Result<Self, ApiError> {
        match self.models.choose(name).await {
            Ok(chosen) => Ok(self.on(chosen)),
            Err(RegistryError::Unknown(name)) => Err(ApiError::NoModel(name)),
            Err(other) => Err(other.into()),
        }
    }

    /// The models that requests can name: the one that is here, and those that can be loaded.
    pub(crate) async fn model_names(&self) -> Result<Vec<String>, ApiError> {
        let mut names = self.models.names().await;
        match self.engine.model() {
            Ok(model) => {
                names.retain(|name| *name != model.name);
                names.insert(0, model.name.clone());
            }
            Err(JobError::Absent) => {}
            Err(failure) => return Err(failure.into()),
        }
        Ok(names)
    }
}
