//! A job and its two ends. The client's end is the [`Ticket`]; the worker's end is one [`Order`]
//! for each picture, which carries the way back with it. The channel is the only link: when the
//! ticket is dropped the orders are no longer wanted, and when the worker dies the ticket hears it.

use std::time::{Duration, Instant};

use sd_models::{Rgb, Spec};
use tokio::sync::{mpsc, watch};

use super::Phase;

/// Why a picture was not drawn. The causes are in the log; this is what a client may know.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Failure {
    /// The model is not there yet.
    #[error("the model is still loading")]
    Loading,
    /// As many pictures wait as may.
    #[error("too many pictures are waiting")]
    Full,
    /// The process is about to end.
    #[error("the server is shutting down")]
    Stopping,
    /// The time for this job is up.
    #[error("the picture was not finished in time")]
    Deadline,
    /// The device has no memory for this picture.
    #[error("the device has not enough memory for this picture")]
    OutOfMemory,
    /// The device is gone.
    #[error("the device failed")]
    DeviceLost,
    /// The model cannot draw this.
    #[error("{reason}")]
    Spec {
        /// The field of the spec.
        field: &'static str,
        /// What it must be.
        reason: String,
    },
    /// The model failed, or its thread did.
    #[error("the model failed to draw the picture")]
    Model,
}

/// A finished picture.
#[derive(Debug, Clone)]
pub struct Drawn {
    /// The pixels.
    pub rgb: Rgb,
    /// What the client should know, such as a prompt that was cut.
    pub warnings: Vec<String>,
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
    pub made: usize,
    /// Evaluations of the pictures that have begun.
    pub total: usize,
}

type Settled = (usize, Result<Drawn, Failure>);

/// The claim on the pictures of one job. Dropping it withdraws the job.
#[derive(Debug)]
pub struct Ticket {
    pictures: mpsc::Receiver<Settled>,
    count: usize,
    deadline: Option<tokio::time::Instant>,
    progress: watch::Receiver<Progress>,
    phase: watch::Receiver<Phase>,
}

/// One picture of a job, as the worker holds it.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) spec: Spec,
    pub(super) submitted: Instant,
    index: usize,
    settled: mpsc::Sender<Settled>,
    progress: watch::Sender<Progress>,
}

/// Opens a job: the ticket and an order for each spec.
pub(super) fn open(
    specs: Vec<Spec>,
    deadline: Option<tokio::time::Instant>,
    phase: watch::Receiver<Phase>,
) -> (Ticket, Vec<Order>) {
    let count = specs.len();
    // Each order settles once, so a place for each means that the worker never waits.
    let (settled, pictures) = mpsc::channel(count.max(1));
    let (made, progress) = watch::channel(Progress::default());
    let submitted = Instant::now();
    let order = |(index, spec)| Order {
        spec,
        submitted,
        index,
        settled: settled.clone(),
        progress: made.clone(),
    };
    let orders = specs.into_iter().enumerate().map(order).collect();
    (Ticket { pictures, count, deadline, progress, phase }, orders)
}

impl Ticket {
    /// The pictures in the order of their specs, or the first failure.
    pub async fn wait(mut self) -> Result<Vec<Drawn>, Failure> {
        let Self { pictures, count, deadline, phase, .. } = &mut self;
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(*deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            drawn = collect(pictures, *count) => drawn,
            () = late => Err(Failure::Deadline),
            _ = phase.wait_for(|phase| matches!(phase, Phase::Stopped)) => Err(Failure::Stopping),
        }
    }

    /// How far the job is; changes with every evaluation.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

async fn collect(
    pictures: &mut mpsc::Receiver<Settled>,
    count: usize,
) -> Result<Vec<Drawn>, Failure> {
    let mut drawn: Vec<Option<Drawn>> = vec![None; count];
    for _ in 0..count {
        // The orders are gone without a word when the model thread has panicked.
        let (index, picture) = pictures.recv().await.ok_or(Failure::Model)?;
        drawn[index] = Some(picture?);
    }
    Ok(drawn.into_iter().flatten().collect())
}

impl Order {
    /// Whether anyone still holds the ticket.
    pub(super) fn wanted(&self) -> bool {
        !self.settled.is_closed()
    }

    /// Tells the ticket that this many evaluations have been made and promised.
    pub(super) fn advance(&self, made: usize, promised: usize) {
        self.progress.send_modify(|progress| {
            progress.made += made;
            progress.total += promised;
        });
    }

    /// The end of this picture. Nobody may be listening any more, which is fine.
    pub(super) fn settle(self, result: Result<Drawn, Failure>) {
        let _ = self.settled.try_send((self.index, result));
    }
}
