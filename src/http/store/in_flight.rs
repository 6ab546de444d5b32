//! Requests in flight that their clients may observe and interrupt: AUTOMATIC1111's clients generate
//! on one connection, and poll and interrupt on another. A client sees its own requests only.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use sd_models::{Pass, Spec};

use crate::engine::{Client, Engine, JobMonitor, Progress, Ticket};

/// The requests, the oldest first. Each is owned by its handler, and ends with it.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    requests: Mutex<Vec<Weak<InFlightRequest>>>,
}

/// A request whose images are being generated.
#[derive(Debug)]
pub(crate) struct InFlightRequest {
    client: Client,
    /// The client's name for it.
    pub(crate) task: Option<String>,
    /// When it arrived.
    pub(crate) began: SystemTime,
    /// Whether it has an input image.
    pub(crate) is_img2img: bool,
    /// Number of its batches, which clients see one after the other.
    pub(crate) batches: usize,
    /// Number of steps of each pass of its images.
    pub(crate) passes: Vec<usize>,
    images: usize,
    pub(crate) monitor: JobMonitor,
}

impl InFlight {
    pub(crate) fn insert(&self, request: InFlightRequest) -> Arc<InFlightRequest> {
        let request = Arc::new(request);
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.retain(|request| request.strong_count() > 0);
        requests.push(Arc::downgrade(&request));
        request
    }

    /// The requests of a client.
    pub(crate) fn of(&self, client: &Client) -> Vec<Arc<InFlightRequest>> {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = requests.iter().filter_map(Weak::upgrade);
        alive.filter(|request| request.client == *client).collect()
    }
}

impl InFlightRequest {
    /// A request that was submitted to the engine.
    pub(crate) fn new(
        engine: &Engine,
        ticket: &Ticket,
        client: Client,
        task: Option<String>,
        (began, batches): (SystemTime, usize),
        specs: &[Spec],
    ) -> Self {
        let first = specs.first();
        let passes = first.map(|spec| spec.passes().map(Pass::calls).collect());
        let is_img2img = first.is_some_and(|spec| spec.img2img.is_some());
        let (images, passes) = (specs.len(), passes.unwrap_or_default());
        let monitor = engine.monitor(ticket);
        Self { client, task, began, is_img2img, batches, passes, images, monitor }
    }

    /// The completed share of its steps, 0 to 1. Images that have not started are assumed to be
    /// like those that have.
    pub(crate) fn progress(&self) -> f64 {
        let Progress { completed, total, started } = self.monitor.current();
        let share = completed as f64 / total.max(1) as f64;
        share * started as f64 / self.images as f64
    }
}
