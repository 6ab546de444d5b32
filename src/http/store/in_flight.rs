//! Requests in flight that their clients may observe and interrupt: AUTOMATIC1111's clients generate
//! on one connection, and poll and interrupt on another. A client sees its own requests only.

use std::sync::{Arc, Mutex, PoisonError, Weak};

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
    /// Number of steps of each of its images.
    pub(crate) steps: usize,
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
        specs: &[Spec],
    ) -> Self {
        let steps = specs.iter().map(|spec| spec.passes().map(Pass::calls).sum()).max();
        let (images, monitor) = (specs.len(), engine.monitor(ticket));
        Self { client, task, steps: steps.unwrap_or_default(), images, monitor }
    }

    /// The completed share of its steps, 0 to 1. Images that have not started are assumed to be
    /// like those that have.
    pub(crate) fn progress(&self) -> f64 {
        let Progress { completed, total, started } = self.monitor.current();
        let share = completed as f64 / total.max(1) as f64;
        share * started as f64 / self.images as f64
    }
}
