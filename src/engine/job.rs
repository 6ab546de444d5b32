//! A job and its two ends. The client's end is the [`Ticket`]; the worker's end is one
//! [`ImageTask`] for each picture, which carries the way back with it. The channel is the only link: when the
//! ticket is dropped the orders are no longer wanted, and when the worker dies the ticket hears it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sd_models::{Rgb, Spec};
use tokio::sync::{mpsc, watch};

use super::state::EngineState;
use crate::telemetry::{MetricId, Metrics};

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
    #[error("the queue is full; retry after {retry_after_s} s")]
    Full {
        /// Seconds until there should be room.
        retry_after_s: u64,
    },
    /// The server is draining.
    #[error("the server is shutting down")]
    Stopping,
    /// The job was not finished within its timeout.
    #[error("the request was not finished within its timeout")]
    Deadline,
    /// The device is out of memory for this image.
    #[error("the device has not enough memory for this image")]
    OutOfMemory,
    /// The device is lost; only a new process can use it.
    #[error("the device failed and is no longer usable")]
    DeviceLost,
    /// The model does not support this spec.
    #[error("{reason}")]
    Spec {
        /// The field of the spec.
        field: &'static str,
        /// What it must be.
        reason: String,
    },
    /// The safety checker flags the image, and flagged images are blocked.
    #[error("the image is blocked: the safety checker flags it as NSFW; another seed may pass")]
    Withheld,
    /// The model failed, or its thread panicked.
    #[error("the model failed to generate the image")]
    Model,
}

/// Whom a job is for. Clients share the device fairly.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Client(Arc<str>);

impl Client {
    /// A client that has a name.
    pub fn named(name: &str) -> Self {
        Self(name.into())
    }

    /// A client known by its address; one IPv6 subscriber has a network of 64 bits.
    pub fn at(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(address.to_string().into()),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self(format!("{a:x}:{b:x}:{c:x}:{d:x}").into())
            }
        }
    }
}

/// Pictures that are asked for together.
#[derive(Debug, Clone)]
pub struct Job {
    /// One for each picture.
    pub specs: Vec<Spec>,
    /// Whose they are.
    pub client: Client,
    /// When nobody wants them any more.
    pub deadline: Option<tokio::time::Instant>,
    /// Whether to show the pictures in the making.
    pub preview: bool,
}

impl From<Vec<Spec>> for Job {
    fn from(specs: Vec<Spec>) -> Self {
        Self { specs, client: Client::default(), deadline: None, preview: false }
    }
}

/// A job's number; later jobs have greater ones.
pub(super) type JobId = u64;

/// A finished picture, or what there was of one when its job was interrupted.
#[derive(Debug, Clone)]
pub struct GeneratedImage {
    /// Which picture of the job.
    pub index: usize,
    /// The pixels.
    pub rgb: Rgb,
    /// What the client should know, such as a prompt that was cut.
    pub warnings: Vec<String>,
    /// Whether the safety checker objects to it; `None` where there is no checker.
    pub nsfw: Option<bool>,
    /// From submission to the first look at the prompt.
    pub queued: Duration,
    /// From there to the pixels.
    pub drawn: Duration,
}

/// UNet evaluations made and to make, over all pictures of a job. The total counts pictures
/// from the moment they leave the queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Evaluations made.
    pub completed: usize,
    /// Evaluations of the pictures that have begun.
    pub total: usize,
    /// Pictures that have begun.
    pub started: usize,
}

/// A small look at a picture in the making.
#[derive(Debug, Clone)]
pub struct Preview {
    /// Which picture of the job.
    pub index: usize,
    /// Its pixels, as far as they can be told.
    pub rgb: Arc<Rgb>,
}

/// Previews are for eyes: more of one picture in a second would only cost.
const PREVIEW_PAUSE: Duration = Duration::from_millis(500);

type Previews = watch::Sender<Option<Preview>>;
/// Nothing, of a picture that was interrupted before there was anything to see.
type TaskResult = (usize, Result<Option<GeneratedImage>, JobError>);

/// The claim on the pictures of one job. Dropping it withdraws the job.
#[derive(Debug)]
pub struct Ticket {
    pub(super) job: JobId,
    pictures: mpsc::Receiver<TaskResult>,
    count: usize,
    deadline: Option<tokio::time::Instant>,
    progress: watch::Receiver<Progress>,
    previews: Option<watch::Receiver<Option<Preview>>>,
    pub(super) interrupted: Arc<AtomicBool>,
    state: watch::Receiver<EngineState>,
}

/// One picture of a job, as the worker holds it. It is counted once, when it is dropped.
#[derive(Debug)]
pub(super) struct ImageTask {
    pub(super) spec: Spec,
    pub(super) client: Client,
    pub(super) job: JobId,
    /// Pictures of the job, this one included.
    pub(super) siblings: usize,
    pub(super) submitted: Instant,
    index: usize,
    settled: mpsc::Sender<TaskResult>,
    progress: watch::Sender<Progress>,
    /// Of those who asked for previews, and when they were last shown one.
    previews: Option<(Previews, Option<Instant>)>,
    interrupted: Arc<AtomicBool>,
    outcome: Option<&'static str>,
    metrics: Arc<Metrics>,
    _busy: watch::Receiver<()>,
}

/// Opens a job: the ticket and an order for each spec.
pub(super) fn open(
    id: JobId,
    job: Job,
    state: &watch::Sender<EngineState>,
    busy: &watch::Sender<()>,
    metrics: &Arc<Metrics>,
) -> (Ticket, Vec<ImageTask>) {
    let Job { specs, client, deadline, preview } = job;
    let count = specs.len();
    // Each order settles once, so a place for each means that the worker never waits.
    let (settled, pictures) = mpsc::channel(count.max(1));
    let (made, progress) = watch::channel(Progress::default());
    let previews = preview.then(|| Previews::new(None));
    let looks = previews.as_ref().map(watch::Sender::subscribe);
    let interrupted = Arc::<AtomicBool>::default();
    let submitted = Instant::now();
    let order = |(index, spec)| ImageTask {
        spec,
        client: client.clone(),
        job: id,
        siblings: count,
        submitted,
        index,
        settled: settled.clone(),
        progress: made.clone(),
        previews: previews.clone().map(|previews| (previews, None)),
        interrupted: Arc::clone(&interrupted),
        outcome: None,
        metrics: Arc::clone(metrics),
        _busy: busy.subscribe(),
    };
    let state = state.subscribe();
    let orders = specs.into_iter().enumerate().map(order).collect();
    let ticket = Ticket {
        job: id,
        pictures,
        count,
        deadline,
        progress,
        previews: looks,
        interrupted,
        state,
    };
    (ticket, orders)
}

impl Ticket {
    /// The pictures in the order of their specs, or the first failure. Only where the job was
    /// interrupted may some be missing.
    pub async fn wait(mut self) -> Result<Vec<GeneratedImage>, JobError> {
        let Self { pictures, count, deadline, state, .. } = &mut self;
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(*deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            drawn = collect(pictures, *count) => drawn,
            () = late => Err(JobError::Deadline),
            _ = state.wait_for(|state| matches!(state, EngineState::Stopped)) => Err(JobError::Stopping),
        }
    }

    /// How far the job is; changes with every evaluation.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// The latest preview, where they were asked for.
    pub fn previews(&self) -> Option<watch::Receiver<Option<Preview>>> {
        self.previews.clone()
    }
}

async fn collect(
    pictures: &mut mpsc::Receiver<TaskResult>,
    count: usize,
) -> Result<Vec<GeneratedImage>, JobError> {
    let mut drawn: Vec<Option<GeneratedImage>> = vec![None; count];
    for _ in 0..count {
        // The orders are gone without a word when the model thread has panicked.
        let (index, picture) = pictures.recv().await.ok_or(JobError::Model)?;
        drawn[index] = picture?;
    }
    Ok(drawn.into_iter().flatten().collect())
}

impl ImageTask {
    /// Which picture of which job.
    pub(super) fn key(&self) -> (JobId, usize) {
        (self.job, self.index)
    }

    /// What it costs: pixels times rows times evaluations, these counted as steps.
    pub(super) fn work(&self) -> u64 {
        let passes = self.spec.passes().map(|(size, steps)| size.pixels() * steps);
        (passes.sum::<usize>() * self.spec.rows()) as u64
    }

    /// Whether anyone still holds the ticket.
    pub(super) fn is_wanted(&self) -> bool {
        !self.settled.is_closed()
    }

    /// Whether the client takes what there is of it.
    pub(super) fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Whether it is time for a preview.
    pub(super) fn wants_preview(&self) -> bool {
        let due = |last: &Option<Instant>| last.is_none_or(|last| last.elapsed() > PREVIEW_PAUSE);
        self.previews.as_ref().is_some_and(|(_, last)| due(last))
    }

    /// Shows a preview.
    pub(super) fn show(&mut self, rgb: Rgb) {
        if let Some((previews, last)) = &mut self.previews {
            previews.send_replace(Some(Preview { index: self.index, rgb: Arc::new(rgb) }));
            *last = Some(Instant::now());
        }
    }

    /// Tells the ticket that this many evaluations have been made and promised.
    pub(super) fn advance(&self, made: usize, promised: usize) {
        self.progress.send_modify(|progress| {
            progress.completed += made;
            progress.total += promised;
            progress.started += usize::from(promised > 0);
        });
    }

    /// The end of this picture. Nobody may be listening any more, which is fine.
    pub(super) fn complete(mut self, result: Result<GeneratedImage, JobError>) {
        self.outcome = Some(if result.is_ok() { "completed" } else { "failed" });
        let _ = self.settled.try_send((self.index, result.map(Some)));
    }

    /// The end of an interrupted picture of which there is nothing to see.
    pub(super) fn skip(mut self) {
        self.outcome = Some("cancelled");
        let _ = self.settled.try_send((self.index, Ok(None)));
    }

    /// The end of a picture that is not even taken on.
    pub(super) fn reject(mut self, failure: JobError) {
        self.outcome = Some("rejected");
        let _ = self.settled.try_send((self.index, Err(failure)));
    }
}

/// Dropped without a word: nobody wanted it, or the model thread is gone.
impl Drop for ImageTask {
    fn drop(&mut self) {
        let silent = if self.is_wanted() { "failed" } else { "cancelled" };
        self.metrics.count(MetricId::Images, &[self.outcome.unwrap_or(silent)]);
    }
}
