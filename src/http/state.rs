//! The configuration of the HTTP server, and the state that its handlers share.

use std::net::IpAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sd_models::ModelInfo;

use super::access::{AccessConfig, ApiKey};
use super::deadline::Deadline;
use super::error::{ApiError, Result};
use super::reading::Reader;
use super::slots::{Amount, Slots};
use super::store::{Calls, InFlight, JobLimits, JobStore, SelectedCheckpoint, UrlStore};
use crate::engine::{Engine, JobError};
use crate::host::freed::FreedMemory;
use crate::image::Hashes;
use crate::options::{millis, min, size, switch};
use crate::registry::{ModelLease, ModelRegistry, RegistryError};
use crate::request::Limits;

/// Interval at which expired results and images are deleted.
const PURGE_INTERVAL: Duration = Duration::from_secs(5);

/// The bounds of the HTTP side, which are options of `serve`.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Limits")]
pub struct HttpConfig {
    /// The limits of one request.
    #[command(flatten)]
    pub limits: Limits,
    /// Maximum length of a request body, in bytes; a longer one gets 413
    #[arg(long, env = "SD_MAX_BODY_BYTES", default_value = "26214400", value_parser = size::<1>)]
    pub max_body_bytes: usize,
    /// Memory for input images while they are decoded, in bytes. Requests wait for that of others;
    /// an image that alone takes more is decoded alone. As much again is for the input images of
    /// requests that wait to be generated, half of it for one client, then 429
    #[arg(long, env = "SD_MAX_DECODED_BYTES", default_value = "536870912")]
    #[arg(value_parser = size::<1>)]
    pub max_decoded_bytes: usize,
    /// Maximum number of requests in flight, queued ones included. At the limit, requests get 429
    /// before the body is read
    #[arg(long, env = "SD_MAX_REQUESTS", default_value = "256", value_parser = min::<1>)]
    pub max_requests: usize,
    /// Maximum number of requests in flight of one client, which is an API key or an address.
    /// Default: half of --max-requests, so that no client can keep all others out. A trusted
    /// proxy that names no client has no such limit, since it stands for many
    #[arg(long, env = "SD_MAX_REQUESTS_PER_CLIENT", value_parser = min::<1>)]
    pub max_requests_per_client: Option<usize>,
    /// Maximum total length of the request bodies and the unread responses in memory, in bytes; at
    /// least --max-body-bytes. One client may hold half of it, or one body. At the limit, requests
    /// get 429
    #[arg(long, env = "SD_MAX_BODY_BYTES_IN_FLIGHT", default_value = "268435456")]
    #[arg(value_parser = size::<1>)]
    pub max_body_bytes_in_flight: usize,
    /// Time for a request, in milliseconds; after it the request is cancelled with 504. A client
    /// can ask for less with the header x-request-timeout-ms. SageMaker closes the connection after
    /// 60 s; asynchronous endpoints can wait up to an hour (3600000)
    #[arg(long = "request-timeout-ms", env = "SD_REQUEST_TIMEOUT_MS", default_value = "58000")]
    #[arg(value_parser = millis::<1>, help_heading = "Network")]
    pub request_timeout: Duration,
    /// Time for a request whose response is a stream of events, in milliseconds; after it the
    /// request is cancelled with an error event. SageMaker allows 8 minutes
    #[arg(long = "stream-timeout-ms", env = "SD_STREAM_TIMEOUT_MS", default_value = "470000")]
    #[arg(value_parser = millis::<1>, help_heading = "Network")]
    pub stream_timeout: Duration,
    /// Directory of the jobs of /v1/jobs: their requests and results, which survive the process. A
    /// job that is accepted is durable, and is continued by the next process that has the directory;
    /// one process can use it at a time. Without it jobs are in memory and lost with the process
    #[arg(long, env = "SD_DATA_DIR", value_name = "DIR", help_heading = "Jobs")]
    pub data_dir: Option<PathBuf>,
    /// Maximum number of jobs of /v1/jobs, finished ones included. At the limit, results are deleted
    /// for a new job: the client's own, then those that others have received; if there are none, it
    /// gets 429
    #[arg(long, env = "SD_MAX_JOBS", default_value = "64", value_parser = min::<1>)]
    #[arg(help_heading = "Jobs")]
    pub max_jobs: usize,
    /// Maximum number of jobs of one client, finished ones included. At the limit, the client's own
    /// results are deleted for a new job; if there are none, it gets 429. Default: half of
    /// --max-jobs, so that no client keeps all others out
    #[arg(long, env = "SD_MAX_JOBS_PER_CLIENT", value_parser = min::<1>, help_heading = "Jobs")]
    pub max_jobs_per_client: Option<usize>,
    /// Maximum total size of the results of jobs, and with --data-dir of their requests, in bytes;
    /// half of it for one client. At the limit, results are deleted as for --max-jobs
    #[arg(long, env = "SD_MAX_JOB_BYTES", default_value = "268435456", value_parser = size::<1>)]
    #[arg(help_heading = "Jobs")]
    pub max_job_bytes: usize,
    /// Time for a job, in milliseconds; after it the job fails. A client can ask for less with the
    /// header x-request-timeout-ms
    #[arg(long = "job-timeout-ms", env = "SD_JOB_TIMEOUT_MS", default_value = "3600000")]
    #[arg(value_parser = millis::<1>, help_heading = "Jobs")]
    pub job_timeout: Duration,
    /// Time for which the result of a job is retained, in milliseconds
    #[arg(long = "job-retention-ms", env = "SD_JOB_RETENTION_MS", default_value = "600000")]
    #[arg(value_parser = millis::<1>, help_heading = "Jobs")]
    pub job_retention: Duration,
    /// Hosts that the field `webhook` of a job may name, comma-separated, with their port if it is
    /// not that of the scheme, such as `example.org,10.0.0.7:8080`. Default: none
    #[arg(long, env = "SD_WEBHOOK_HOSTS", value_name = "HOSTS", requires = "webhook_secret")]
    #[arg(value_delimiter = ',', value_parser = webhook_host, help_heading = "Jobs")]
    pub webhook_hosts: Vec<String>,
    /// Key of the HMAC-SHA256 in the header x-sd-signature of webhooks
    #[arg(long, env = "SD_WEBHOOK_SECRET", hide_env_values = true, value_name = "KEY")]
    #[arg(help_heading = "Jobs")]
    pub webhook_secret: Option<ApiKey>,
    /// Time for which an image that was returned as a URL is retained, in milliseconds
    #[arg(long = "url-retention-ms", env = "SD_URL_RETENTION_MS", default_value = "3600000")]
    #[arg(value_parser = millis::<1>)]
    pub url_retention: Duration,
    /// Maximum total size of the images retained for their URLs, in bytes. At the limit, the oldest
    /// of the client that has most is evicted
    #[arg(long, env = "SD_MAX_URL_BYTES", default_value = "268435456", value_parser = size::<0>)]
    pub max_url_bytes: usize,
    /// Time for the headers of the next request to arrive on a connection, in milliseconds; after
    /// it the connection is closed
    #[arg(long = "idle-timeout-ms", env = "SD_IDLE_TIMEOUT_MS", default_value = "75000")]
    #[arg(value_parser = millis::<1>, help_heading = "Network")]
    pub idle_timeout: Duration,
    /// Time for the body of a request, in milliseconds; more is allowed while it arrives at 64 KiB
    /// per second on average. After it the request gets 408
    #[arg(long = "body-timeout-ms", env = "SD_BODY_TIMEOUT_MS", default_value = "10000")]
    #[arg(value_parser = millis::<1>, help_heading = "Network")]
    pub body_timeout: Duration,
    /// Time over which a client must take its response at 64 KiB per second on average, in
    /// milliseconds; if it takes less, the connection is closed
    #[arg(long = "write-timeout-ms", env = "SD_WRITE_TIMEOUT_MS", default_value = "10000")]
    #[arg(value_parser = millis::<1>, help_heading = "Network")]
    pub write_timeout: Duration,
    /// Maximum number of open connections. At the limit, new connections are answered /ping and
    /// /health/*, and 503 on all other routes
    #[arg(long, env = "SD_MAX_CONNECTIONS", default_value = "1024")]
    #[arg(value_parser = min::<1>, help_heading = "Network")]
    pub max_connections: usize,
    /// Maximum number of open connections of one address. Default: half of --max-connections.
    /// Trusted proxies have no such limit, since they stand for many clients
    #[arg(long, env = "SD_MAX_CONNECTIONS_PER_ADDRESS")]
    #[arg(value_parser = min::<1>, help_heading = "Network")]
    pub max_connections_per_address: Option<usize>,
    /// Log prompts. Without this they never appear in the log
    #[arg(long, env = "SD_LOG_PROMPTS")]
    #[arg(value_parser = switch, help_heading = "Log")]
    pub log_prompts: bool,
    /// Who may do what.
    #[command(flatten)]
    pub access: AccessConfig,
}

/// A host, or a host and a port.
fn webhook_host(text: &str) -> Result<String, String> {
    let url = reqwest::Url::parse(&format!("http://{text}/")).ok();
    let is_host = url.is_some_and(|url| url.path() == "/" && !text.contains(['/', '@', '?', '#']));
    if is_host { Ok(text.to_ascii_lowercase()) } else { Err("must be a host or host:port".into()) }
}

impl HttpConfig {
    fn slots(&self, freed: FreedMemory) -> Arc<Slots> {
        let requests = self.max_requests_per_client.unwrap_or(self.max_requests.div_ceil(2));
        let bytes = self.max_body_bytes_in_flight.max(self.max_body_bytes);
        let most = Amount { requests: self.max_requests, bytes };
        let bytes = (bytes / 2).max(self.max_body_bytes);
        Slots::new(most, Amount { requests, bytes }, freed)
    }

    /// Opens the jobs of the data directory, or of this process only. The error names what is
    /// wrong with the directory; see [`JobStore::open`].
    pub(crate) fn open_jobs(&self) -> anyhow::Result<JobStore> {
        let limits = JobLimits {
            jobs: self.max_jobs,
            jobs_per_client: self.max_jobs_per_client.unwrap_or(self.max_jobs.div_ceil(2)),
            bytes: self.max_job_bytes,
            retention: self.job_retention,
        };
        JobStore::open(self.data_dir.as_deref(), limits)
    }

    /// Maximum number of open connections of one address.
    pub(crate) fn connections_per_address(&self) -> usize {
        self.max_connections_per_address.unwrap_or(self.max_connections.div_ceil(2))
    }

    /// Whether this address is that of a trusted proxy, behind which are many clients.
    pub fn is_trusted(&self, address: IpAddr) -> bool {
        self.access.trusted_proxies.contains(address)
    }
}

/// The state of a handler.
#[derive(Debug, Clone)]
pub(crate) struct AppState {
    /// The engine of the request's model.
    pub(crate) engine: Engine,
    /// Held so that the model stays in memory; `None` for the default model.
    pub(crate) lease: Option<ModelLease>,
    shared: Arc<AppShared>,
}

/// The state that is the same for every model.
#[derive(Debug)]
pub(crate) struct AppShared {
    pub(crate) models: ModelRegistry,
    pub(crate) settings: HttpConfig,
    /// What the requests in flight hold: bodies and images take memory.
    pub(crate) slots: Arc<Slots>,
    /// What their input images hold until they are generated from.
    pub(crate) inputs: Arc<Slots>,
    pub(crate) reader: Reader,
    pub(crate) jobs: Arc<JobStore>,
    pub(crate) urls: UrlStore,
    pub(crate) in_flight: InFlight,
    pub(crate) checkpoint: SelectedCheckpoint,
    pub(crate) hashes: Hashes,
    pub(crate) calls: Calls,
}

impl Deref for AppState {
    type Target = AppShared;

    fn deref(&self) -> &AppShared {
        &self.shared
    }
}

impl AppState {
    pub(crate) fn new(models: ModelRegistry, settings: HttpConfig, jobs: JobStore) -> Self {
        let freed = FreedMemory::default();
        let (in_flight, checkpoint, hashes, calls) = Default::default();
        let shared = AppShared {
            slots: settings.slots(freed.clone()),
            inputs: Slots::of_inputs(settings.max_decoded_bytes, freed.clone()),
            reader: Reader::new(settings.max_decoded_bytes, freed),
            jobs: Arc::new(jobs),
            urls: UrlStore::new(settings.url_retention, settings.max_url_bytes),
            in_flight,
            checkpoint,
            hashes,
            calls,
            models,
            settings,
        };
        let engine = shared.models.default_engine().clone();
        Self { engine, lease: None, shared: Arc::new(shared) }
    }

    /// Deletes what has expired, as long as the state exists.
    pub(crate) fn purge(&self) -> impl Future<Output = ()> + 'static {
        let shared = Arc::downgrade(&self.shared);
        async move {
            loop {
                tokio::time::sleep(PURGE_INTERVAL).await;
                let Some(shared) = shared.upgrade() else { return };
                shared.urls.purge();
                // An error is in the log; the next attempt may succeed.
                let _ = shared.jobs.purge().await;
            }
        }
    }

    /// The state for a request to another model.
    pub(crate) fn on(&self, chosen: ModelLease) -> Self {
        let engine = chosen.engine.clone();
        Self { engine, lease: Some(chosen), shared: Arc::clone(&self.shared) }
    }

    /// The state for a request that names a model, which may have to be loaded first.
    pub(crate) async fn choose(&self, name: &str, deadline: Deadline) -> Result<Self> {
        match self.models.choose(name, deadline.at).await {
            Ok(chosen) => Ok(self.on(chosen)),
            Err(RegistryError::Unknown(name)) => Err(ApiError::NoModel(name)),
            Err(RegistryError::Deadline) => Err(deadline.missed()),
            Err(RegistryError::Stopping) => Err(JobError::Stopping.into()),
            Err(other) => Err(other.into()),
        }
    }

    /// The models that requests can name: the default one, and those in the directory.
    pub(crate) async fn model_names(&self) -> Result<Vec<String>> {
        let mut names = self.models.names().await;
        if let Some(model) = model_of(&self.engine)? {
            names.retain(|name| *name != model.name);
            names.insert(0, model.name.clone());
        }
        Ok(names)
    }
}

/// The model of an engine. None for an engine that has none because requests name their models.
pub(crate) fn model_of(engine: &Engine) -> Result<Option<Arc<ModelInfo>>> {
    match engine.model() {
        Ok(model) => Ok(Some(model)),
        Err(JobError::Absent) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
