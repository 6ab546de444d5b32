//! The queue of images: bounded, and fair between clients. Plain data; the engine locks it.
//!
//! The order is start-time fair queueing (Goyal, Vin and Cheng 1996): the start of an image, in
//! virtual time, is when the earlier work of its client is done. A client with one image does not
//! wait for another client's hundred. Images of one client keep their order, except that those of a
//! higher priority go first: a priority changes the order within a client's share, not the share.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};

use super::client::Client;
use super::job::{ImageTask, JobId};

/// The waiting images.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// By ascending start.
    tasks: VecDeque<Waiting>,
    capacity: usize,
    closed: bool,
    /// Number of accepted jobs.
    arrivals: u64,
    /// Virtual time: the start of the image that left last.
    now: u64,
    /// The virtual time when the work of each client ends; only of clients ahead of `now`.
    ends: HashMap<Client, u64>,
}

#[derive(Debug)]
struct Waiting {
    task: ImageTask,
    start: u64,
}

/// The images of a job that wait.
struct WaitingJob<'a> {
    /// One of them.
    task: &'a ImageTask,
    images: usize,
    work: u64,
}

/// Why a job was rejected.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PushError {
    Full,
    Closed,
}

impl Queue {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Whether the queue is closed and empty.
    pub(super) fn is_over(&self) -> bool {
        self.closed && self.tasks.is_empty()
    }

    /// Number of jobs accepted so far, to detect new ones.
    pub(super) fn arrivals(&self) -> u64 {
        self.arrivals
    }

    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// The work of all waiting images.
    pub(super) fn work(&self) -> u64 {
        self.tasks.iter().map(|waiting| waiting.task.work).sum()
    }

    /// Number of images ahead of the first image of a job, and the work up to its last image.
    pub(super) fn place(&self, job: JobId) -> Option<(usize, u64)> {
        let first = self.tasks.iter().position(|waiting| waiting.task.job == job)?;
        let last = self.tasks.iter().rposition(|waiting| waiting.task.job == job)?;
        let ahead = self.tasks.iter().take(last + 1);
        Some((first, ahead.map(|waiting| waiting.task.work).sum()))
    }

    /// Adds all images of a job or none. A job larger than the queue is accepted if the queue is
    /// empty. Returns the evicted images: see [`Self::make_room`].
    pub(super) fn push(&mut self, job: &mut Vec<ImageTask>) -> Result<Vec<ImageTask>, PushError> {
        if self.closed {
            return Err(PushError::Closed);
        }
        let mut evicted = Vec::new();
        if self.tasks.len() + job.len() > self.capacity {
            // Images of disconnected clients do not count.
            self.remove_unwanted();
        }
        if !self.tasks.is_empty() && self.tasks.len() + job.len() > self.capacity {
            evicted = self.make_room(job).ok_or(PushError::Full)?;
        }
        self.arrivals += 1;
        let newcomer = job.first().map(|task| (task.client.clone(), task.priority));
        for task in job.drain(..) {
            let end = self.ends.entry(task.client.clone()).or_default();
            let start = self.now.max(*end);
            *end = start.saturating_add(task.work);
            let place = self.tasks.partition_point(|waiting| waiting.start <= start);
            self.tasks.insert(place, Waiting { task, start });
        }
        if let Some((client, priority)) = newcomer {
            let overtakes = |task: &ImageTask| task.client == client && task.priority < priority;
            if self.tasks.iter().any(|waiting| overtakes(&waiting.task)) {
                self.order_by_priority(&client);
            }
        }
        Ok(evicted)
    }

    /// Lays the waiting images of a client out again from their first start, by priority.
    fn order_by_priority(&mut self, client: &Client) {
        let tasks = std::mem::take(&mut self.tasks).into_iter();
        let (mut own, others): (VecDeque<_>, VecDeque<_>) =
            tasks.partition(|waiting| waiting.task.client == *client);
        self.tasks = others;
        let Some(mut start) = own.front().map(|first| first.start) else { return };
        own.make_contiguous().sort_by_key(|waiting| Reverse(waiting.task.priority));
        for Waiting { task, .. } in own {
            let place = self.tasks.partition_point(|waiting| waiting.start <= start);
            let end = start.saturating_add(task.work);
            self.tasks.insert(place, Waiting { task, start });
            start = end;
        }
        self.ends.insert(client.clone(), start);
    }

    /// If the queue is full, the client with the largest share of it loses its newest jobs, until
    /// the new job fits, to a client that will have a smaller share. Jobs of which an image has
    /// left the queue stay. If that is not enough, nothing is evicted. Otherwise the first client
    /// could block all others.
    ///
    /// The share is the dominant one (Ghodsi et al. 2011) of images and of work: neither many small
    /// images nor a few large ones keep others out.
    fn make_room(&mut self, job: &[ImageTask]) -> Option<Vec<ImageTask>> {
        let client = &job.first()?.client;
        let mut jobs: BTreeMap<JobId, WaitingJob<'_>> = BTreeMap::new();
        for Waiting { task, .. } in &self.tasks {
            let job = jobs.entry(task.job).or_insert(WaitingJob { task, images: 0, work: 0 });
            (job.images, job.work) = (job.images + 1, job.work + task.work);
        }
        let new: u64 = job.iter().map(|task| task.work).sum();
        let all = (self.work() + new).max(1) as f64;
        let share = |(images, work): (usize, u64)| {
            (images as f64 / self.capacity.max(1) as f64).max(work as f64 / all)
        };
        let mut held: HashMap<&Client, (usize, u64)> = HashMap::new();
        for job in jobs.values() {
            let (images, work) = held.entry(&job.task.client).or_default();
            (*images, *work) = (*images + job.images, *work + job.work);
        }
        let (images, work) = held.get(client).copied().unwrap_or_default();
        let requested = share((images + job.len(), work + new));
        let (mut left, mut evicted) = (self.tasks.len(), Vec::new());
        while left > 0 && left + job.len() > self.capacity {
            let of_client = |job: &WaitingJob<'_>| share(held[&job.task.client]);
            let whole = |job: &WaitingJob<'_>| job.images == job.task.siblings;
            let candidates =
                jobs.iter().filter(|(_, job)| whole(job) && of_client(job) > requested);
            let (&id, _) = candidates.max_by(|(a_id, a), (b_id, b)| {
                of_client(a).total_cmp(&of_client(b)).then(a_id.cmp(b_id))
            })?;
            let job = jobs.remove(&id)?;
            let (images, work) = held.get_mut(&job.task.client)?;
            (*images, *work) = (*images - job.images, *work - job.work);
            left -= job.images;
            evicted.push(id);
        }
        Some(self.take_out(|task| evicted.contains(&task.job)))
    }

    /// Removes and returns the first image that is still wanted and `fits`.
    pub(super) fn next(&mut self, mut fits: impl FnMut(&ImageTask) -> bool) -> Option<ImageTask> {
        self.remove_unwanted();
        let place = self.tasks.iter().position(|waiting| fits(&waiting.task))?;
        let Waiting { task, start } = self.tasks.remove(place)?;
        self.now = self.now.max(start);
        let now = self.now;
        let idle = self.tasks.is_empty();
        self.ends.retain(|_, end| !idle && *end > now);
        Some(task)
    }

    /// Removes the images of dropped tickets and of interrupted jobs.
    fn remove_unwanted(&mut self) {
        drop(self.take_out(|task| !task.is_wanted()));
        self.take_out(ImageTask::interrupted).into_iter().for_each(ImageTask::skip);
    }

    /// Removes images from the queue and from their clients' accounts.
    fn take_out(&mut self, mut which: impl FnMut(&ImageTask) -> bool) -> Vec<ImageTask> {
        let tasks = std::mem::take(&mut self.tasks).into_iter();
        let (taken, kept): (VecDeque<_>, _) = tasks.partition(|waiting| which(&waiting.task));
        self.tasks = kept;
        for Waiting { task, .. } in &taken {
            if let Some(end) = self.ends.get_mut(&task.client) {
                *end = end.saturating_sub(task.work);
            }
        }
        taken.into_iter().map(|waiting| waiting.task).collect()
    }

    /// Rejects new jobs.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Takes all waiting images out.
    pub(super) fn take_all(&mut self) -> Vec<ImageTask> {
        self.take_out(|_| true)
    }

    /// Rejects new jobs and returns the waiting images.
    pub(super) fn clear(&mut self) -> Vec<ImageTask> {
        self.closed = true;
        self.take_out(|_| true)
    }
}

#[cfg(test)]
mod tests;
