//! A job and its two ends. The client's end is the [`Ticket`]; the worker's end is one
//! [`ImageTask`] per image, with the sender of the result. The channel is the only link: if the
//! ticket is dropped, the tasks are cancelled; if the worker terminates, the ticket fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sd_models::{AssetFile, Pass, Rgb, Spec};
use tokio::sync::{mpsc, watch};

use super::client::{Client, Priority};
use super::state::EngineState;
use crate::telemetry::Metrics;

/// Why an image was not generated, as far as a client may know. The causes are in the log.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum JobError {
    /// No model is loaded and the request names none.
    #[error("no model is loaded; name one in the request")]
    Absent,
    /// The model is still loading.
    #[error("the model is still loading")]
    Loading,
    /// The queue is full.
    #[error("the queue is full (--max-queue); retry after {retry_after_s} s")]
    Full {
        /// Estimated time until there is room, in seconds.
        retry_after_s: u64,
    },
    /// The server is draining.
    #[error("the server is shutting down")]
    Stopping,
    /// The job was not finished within its timeout.
    #[error("the request was not finished within its timeout")]
    Deadline,
    /// The device is out of memory for this image.
    #[error("the device has not enough memory for this image; ask for a smaller one")]
    OutOfMemory,
    /// The device is lost; only a new process can use it.
    #[error("the device failed and is no longer usable")]
    DeviceLost,
    /// The model does not support this spec.
    #[error("{field} {reason}")]
    Spec {
        /// The field of the spec.
        field: &'static str,
        /// The violated rule.
        reason: String,
    },
    /// The safety checker flags the image, and flagged images are blocked.
    #[error("the image is blocked: the safety checker flags it as NSFW; another seed may pass")]
    Withheld,
    /// The model was unloaded, and cannot be loaded again.
    #[error("the model was unloaded and cannot be loaded again; the reason is in the log")]
    Unloaded,
    /// The model was unloaded, and the device has no memory for it now.
    #[error("the model was unloaded and the device has not enough free memory to load it again")]
    NoRoom,
    /// The model failed, or its thread panicked.
    #[error("the model failed to generate the image")]
    Model,
}

/// The images of one request.
#[derive(Debug, Clone)]
pub struct Job {
    /// One spec per image.
    pub specs: Vec<Spec>,
    /// The client.
    pub client: Client,
    /// The time after which the job is cancelled.
    pub deadline: Option<tokio::time::Instant>,
    /// The previews that are sent.
    pub previews: Previews,
    /// Its order among the client's jobs.
    pub priority: Priority,
    /// Given if the job is submitted again whenever the queue is full.
    pub uncounted: Option<Arc<Uncounted>>,
}

/// Which previews of a job are sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Previews {
    /// None.
    #[default]
    None,
    /// The latest of each image, twice a second at most.
    Live,
    /// So many of the first image, one after each equal part of its steps. Of fewer steps some are
    /// sent more than once.
    Parts(usize),
}

/// The images of a job that are not yet counted in the metrics, because the job is submitted again
/// whenever the queue is full: only its end is counted. What is left when this is dropped was
/// cancelled.
#[derive(Debug)]
pub struct Uncounted {
    images: AtomicUsize,
    metrics: Arc<Metrics>,
}

impl Uncounted {
    pub(super) fn new(images: usize, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { images: images.into(), metrics })
    }
}

impl Drop for Uncounted {
    fn drop(&mut self) {
        let left = *self.images.get_mut() as u64;
        if left > 0 {
            self.metrics.images.with(["cancelled"]).inc_by(left);
        }
    }
}

impl From<Vec<Spec>> for Job {
    fn from(specs: Vec<Spec>) -> Self {
        let (client, priority) = Default::default();
        Self { specs, client, deadline: None, previews: Previews::None, priority, uncounted: None }
    }
}

/// A job's number; later jobs have greater numbers.
pub(super) type JobId = u64;

/// A finished image, or the partly denoised one of an interrupted job.
#[derive(Debug, Clone)]
pub struct GeneratedImage {
    /// Index of the image in the job.
    pub index: usize,
    /// The pixels.
    pub rgb: Rgb,
    /// Warnings for the client, such as a truncated prompt.
    pub warnings: Vec<String>,
    /// Whether the safety checker flags it as NSFW; `None` without a checker.
    pub nsfw: Option<bool>,
    /// The files of its LoRAs, in the versions that it was generated with.
    pub loras: Vec<AssetFile>,
    /// Number of tokens of its prompts.
    pub text_tokens: usize,
}

/// Progress in UNet calls, over all images of a job that have left the queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Number of completed UNet calls.
    pub completed: usize,
    /// Number of UNet calls in total.
    pub total: usize,
    /// Number of images that have left the queue.
    pub started: usize,
}

/// A preview of a running image.
#[derive(Debug, Clone)]
pub struct Preview {
    /// Index of the image in the job.
    pub index: usize,
    /// The pixels.
    pub rgb: Arc<Rgb>,
}

/// How a client ends images of a job before their last step.
#[derive(Debug, Default)]
pub(super) struct Stops {
    /// All, at once.
    pub(super) all: AtomicBool,
    /// Those that run.
    pub(super) running: AtomicBool,
    /// Whether there was such a wish.
    pub(super) skipped: AtomicBool,
}

/// Minimum time between two previews of an image.
const PREVIEW_INTERVAL: Duration = Duration::from_millis(500);

/// The previews of a job: of live ones the last, of parts all.
pub(super) type Shown = Vec<Preview>;
/// The index of an image and its result; `None` if it was interrupted before its first step.
type TaskResult = (usize, Result<Option<GeneratedImage>, JobError>);

/// The client's end of a job. Dropping it cancels the job.
#[derive(Debug)]
pub struct Ticket {
    pub(super) job: JobId,
    results: mpsc::Receiver<TaskResult>,
    count: usize,
    deadline: Option<tokio::time::Instant>,
    progress: watch::Receiver<Progress>,
    previews: Option<watch::Receiver<Shown>>,
    pub(super) stops: Arc<Stops>,
    state: watch::Receiver<EngineState>,
}

/// The worker's end of one image of a job. It is counted in the metrics when dropped, unless its job
/// is submitted again.
#[derive(Debug)]
pub(super) struct ImageTask {
    pub(super) spec: Spec,
    pub(super) client: Client,
    pub(super) job: JobId,
    pub(super) priority: Priority,
    /// Number of images of the job.
    pub(super) siblings: usize,
    pub(super) submitted: Instant,
    /// The work of the image: pixels times rows times steps, and what upscalers take. Computed once:
    /// it takes reading the prompt.
    pub(super) work: u64,
    index: usize,
    results: mpsc::Sender<TaskResult>,
    progress: watch::Sender<Progress>,
    previews: Previews,
    shown: Option<watch::Sender<Shown>>,
    /// The time of the last preview.
    last_shown: Option<Instant>,
    stops: Arc<Stops>,
    outcome: Option<&'static str>,
    /// Whether its job is submitted again.
    returns: bool,
    uncounted: Option<Arc<Uncounted>>,
    metrics: Arc<Metrics>,
    _busy: watch::Receiver<()>,
}

/// Creates a job: the ticket, and a task for each spec.
pub(super) fn open(
    id: JobId,
    job: Job,
    state: &watch::Sender<EngineState>,
    busy: &watch::Sender<()>,
    metrics: &Arc<Metrics>,
) -> (Ticket, Vec<ImageTask>) {
    let Job { specs, client, deadline, previews, priority, uncounted } = job;
    let count = specs.len();
    // Each task sends one result, so with this capacity the worker never waits.
    let (sender, results) = mpsc::channel(count.max(1));
    let (advanced, progress) = watch::channel(Progress::default());
    let shown = (previews != Previews::None).then(|| watch::Sender::new(Shown::new()));
    let seen = shown.as_ref().map(watch::Sender::subscribe);
    let stops = Arc::<Stops>::default();
    let submitted = Instant::now();
    let task = |(index, spec): (usize, Spec)| ImageTask {
        work: (spec.passes().map(Pass::work).sum::<usize>() + spec.upscaling_work()) as u64,
        spec,
        client: client.clone(),
        job: id,
        priority,
        siblings: count,
        submitted,
        index,
        results: sender.clone(),
        progress: advanced.clone(),
        previews,
        shown: shown.clone(),
        last_shown: None,
        stops: Arc::clone(&stops),
        outcome: None,
        returns: false,
        uncounted: uncounted.clone(),
        metrics: Arc::clone(metrics),
        _busy: busy.subscribe(),
    };
    let state = state.subscribe();
    let tasks = specs.into_iter().enumerate().map(task).collect();
    let (job, previews) = (id, seen);
    let ticket = Ticket { job, results, count, deadline, progress, previews, stops, state };
    (ticket, tasks)
}

impl Ticket {
    /// Waits for the images, in the order of their specs, or the first failure. Images of an
    /// interrupted job may be missing.
    pub async fn wait(mut self) -> Result<Vec<GeneratedImage>, JobError> {
        let Self { results, count, deadline, state, .. } = &mut self;
        let timed_out = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(*deadline).await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            biased;
            images = collect(results, *count) => images,
            () = timed_out => Err(JobError::Deadline),
            _ = state.wait_for(|state| matches!(state, EngineState::Stopped)) => {
                Err(JobError::Stopping)
            }
        };
        // An engine that is stopped drops its tasks as one whose thread has panicked does.
        match ended {
            Err(JobError::Model) if matches!(*state.borrow(), EngineState::Stopped) => {
                Err(JobError::Stopping)
            }
            ended => ended,
        }
    }

    /// The progress of the job; changes with each UNet call.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// The previews, if some are requested: of live ones the last, of parts all.
    pub fn previews(&self) -> Option<watch::Receiver<Vec<Preview>>> {
        self.previews.clone()
    }
}

async fn collect(
    results: &mut mpsc::Receiver<TaskResult>,
    count: usize,
) -> Result<Vec<GeneratedImage>, JobError> {
    let mut images: Vec<Option<GeneratedImage>> = vec![None; count];
    for _ in 0..count {
        // The tasks are dropped without a result if the model thread has panicked.
        let (index, image) = results.recv().await.ok_or(JobError::Model)?;
        images[index] = image?;
    }
    Ok(images.into_iter().flatten().collect())
}

impl ImageTask {
    /// Job and index of the image.
    pub(super) fn key(&self) -> (JobId, usize) {
        (self.job, self.index)
    }

    /// Whether the ticket still exists.
    pub(super) fn is_wanted(&self) -> bool {
        !self.results.is_closed()
    }

    /// Whether the client has interrupted the job.
    pub(super) fn interrupted(&self) -> bool {
        self.stops.all.load(Ordering::Relaxed)
    }

    /// Whether the client wants those images of the job ended that run. Ends the wish.
    pub(super) fn take_skip(&self) -> bool {
        self.stops.running.swap(false, Ordering::Relaxed)
    }

    /// How many previews are requested and due after so many UNet calls of all.
    pub(super) fn previews_due(&self, (made, all): (usize, usize)) -> usize {
        let sent = || self.shown.as_ref().map_or(0, |shown| shown.borrow().len());
        match self.previews {
            Previews::None => 0,
            Previews::Live => {
                let due = self.last_shown.is_none_or(|last| last.elapsed() > PREVIEW_INTERVAL);
                usize::from(due)
            }
            Previews::Parts(_) if self.index > 0 => 0,
            // Of n in N calls, the k-th is due after N k / (n + 1) of them, and all with the last.
            Previews::Parts(parts) => {
                let ended = made * (parts + 1) / all.max(1);
                ended.min(parts).saturating_sub(sent())
            }
        }
    }

    /// Sends a preview, so many times.
    pub(super) fn show(&mut self, rgb: Rgb, times: usize) {
        let Some(shown) = &self.shown else { return };
        let preview = Preview { index: self.index, rgb: Arc::new(rgb) };
        let live = self.previews == Previews::Live;
        shown.send_modify(|shown| {
            if live {
                shown.clear();
            }
            shown.extend(std::iter::repeat_n(preview, times));
        });
        self.last_shown = Some(Instant::now());
    }

    /// Adds to the numbers of completed UNet calls and, when the image starts, of those in total.
    pub(super) fn advance(&self, completed: usize, total: usize) {
        self.progress.send_modify(|progress| {
            progress.completed += completed;
            progress.total += total;
            progress.started += usize::from(total > 0);
        });
    }

    /// Sends the result. The ticket may already be dropped.
    pub(super) fn complete(mut self, result: Result<GeneratedImage, JobError>) {
        self.outcome = Some(if result.is_ok() { "completed" } else { "failed" });
        let _ = self.results.try_send((self.index, result.map(Some)));
    }

    /// Ends an interrupted image without a finished step.
    pub(super) fn skip(mut self) {
        self.outcome = Some("cancelled");
        let _ = self.results.try_send((self.index, Ok(None)));
    }

    /// Ends an image that is not accepted, or evicted.
    pub(super) fn reject(mut self, failure: JobError) {
        self.returns = self.uncounted.is_some() && matches!(failure, JobError::Full { .. });
        self.outcome = Some("rejected");
        let _ = self.results.try_send((self.index, Err(failure)));
    }
}

/// Without an outcome, the ticket was dropped, or the model thread has terminated.
impl Drop for ImageTask {
    fn drop(&mut self) {
        if self.returns {
            return;
        }
        if let Some(uncounted) = &self.uncounted {
            uncounted.images.fetch_sub(1, Ordering::Relaxed);
        }
        let silent = if self.is_wanted() { "failed" } else { "cancelled" };
        self.metrics.images.with([self.outcome.unwrap_or(silent)]).inc();
    }
}
