//! Requests under way that others may ask about and end: AUTOMATIC1111's clients draw on one
//! connection, and look and interrupt on another. A client sees its own requests only.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sd_models::Spec;
use tokio::sync::watch;

use crate::engine::{Client, Engine, Estimate, JobMonitor, Preview, Progress, Ticket};
use crate::image::{self, Format, JPEG_QUALITY};

/// The requests, the oldest first.
#[derive(Debug, Default, Clone)]
pub(crate) struct InFlight {
    requests: Arc<Mutex<Vec<Arc<InFlightRequest>>>>,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct InFlightRequest {
    client: Client,
    /// The client's name for it.
    pub(crate) task: Option<String>,
    /// Of each of its pictures.
    pub(crate) steps: usize,
    pictures: usize,
    watch: JobMonitor,
    previews: Option<watch::Receiver<Option<Preview>>>,
}

/// A place among the requests, given up when it is dropped.
#[derive(Debug)]
pub(crate) struct InFlightGuard {
    begun: Arc<InFlightRequest>,
    requests: Arc<Mutex<Vec<Arc<InFlightRequest>>>>,
}

impl Deref for InFlightGuard {
    type Target = InFlightRequest;

    fn deref(&self) -> &InFlightRequest {
        &self.begun
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        lock(&self.requests).retain(|begun| !Arc::ptr_eq(begun, &self.begun));
    }
}

fn lock(requests: &Mutex<Vec<Arc<InFlightRequest>>>) -> MutexGuard<'_, Vec<Arc<InFlightRequest>>> {
    requests.lock().unwrap_or_else(PoisonError::into_inner)
}

impl InFlight {
    pub(crate) fn enter(&self, begun: InFlightRequest) -> InFlightGuard {
        let begun = Arc::new(begun);
        lock(&self.requests).push(Arc::clone(&begun));
        InFlightGuard { begun, requests: Arc::clone(&self.requests) }
    }

    /// The requests of a client.
    pub(crate) fn of(&self, client: &Client) -> Vec<Arc<InFlightRequest>> {
        lock(&self.requests).iter().filter(|begun| begun.client == *client).cloned().collect()
    }
}

impl InFlightRequest {
    /// A request that has been handed to the engine.
    pub(crate) fn new(
        engine: &Engine,
        ticket: &Ticket,
        client: Client,
        task: Option<String>,
        specs: &[Spec],
    ) -> Self {
        let of = |spec: &Spec| spec.passes().map(|(_, steps)| steps).sum();
        let steps = specs.iter().map(of).max().unwrap_or_default();
        let (watch, previews) = (engine.watch(ticket), ticket.previews());
        Self { client, task, steps, pictures: specs.len(), watch, previews }
    }

    /// Where it stands.
    pub(crate) fn outlook(&self) -> Estimate {
        self.watch.outlook()
    }

    /// Evaluations that have been made.
    pub(crate) fn completed(&self) -> usize {
        self.watch.current().completed
    }

    /// The share of its evaluations that have been made, 0 to 1. Pictures that have not begun are
    /// taken to be like those that have.
    pub(crate) fn share(&self) -> f64 {
        let Progress { completed, total, started } = self.watch.current();
        if total == 0 {
            0.0
        } else {
            completed as f64 / total as f64 * started as f64 / self.pictures as f64
        }
    }

    /// The latest look at one of its pictures, as PNG.
    pub(crate) async fn preview(&self) -> Option<Vec<u8>> {
        let rgb =
            self.previews.as_ref()?.borrow().as_ref().map(|preview| Arc::clone(&preview.rgb))?;
        let encode = move || image::encode(&rgb, Format::Png, JPEG_QUALITY, "");
        tokio::task::spawn_blocking(encode).await.ok()?.ok()
    }

    /// Ends the request with what there is.
    pub(crate) fn interrupt(&self) {
        self.watch.interrupt();
    }
}
