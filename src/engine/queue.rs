//! The queue of images: bounded, and fair between clients. Plain data; the engine locks it.
//!
//! The order is start-time fair queueing (Goyal, Vin and Cheng 1996): the start of an image, in
//! virtual time, is when the earlier work of its client is done. A client with one image does not
//! wait for another client's hundred. Images of one client keep their order, except that those of a
//! higher priority go first: a priority changes the order within a client's share, not the share.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};

use super::job::{Client, ImageTask, JobId};

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
        self.tasks.iter().map(|waiting| waiting.task.work()).sum()
    }

    /// Number of images ahead of the first image of a job, and the work up to its last image.
    pub(super) fn place(&self, job: JobId) -> Option<(usize, u64)> {
        let first = self.tasks.iter().position(|waiting| waiting.task.job == job)?;
        let last = self.tasks.iter().rposition(|waiting| waiting.task.job == job)?;
        let ahead = self.tasks.iter().take(last + 1);
        Some((first, ahead.map(|waiting| waiting.task.work()).sum()))
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
            *end = start.saturating_add(task.work());
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
            let end = start.saturating_add(task.work());
            self.tasks.insert(place, Waiting { task, start });
            start = end;
        }
        self.ends.insert(client.clone(), start);
    }

    /// If the queue is full, the client with the largest share of it loses its newest jobs, until the
    /// new job fits, to a client that will have a smaller share. Jobs of which an image has left the
    /// queue stay. If that is not enough, nothing is evicted. Otherwise the first client could block
    /// all others.
    ///
    /// The share is the dominant one (Ghodsi et al. 2011) of images and of work: neither many small
    /// images nor a few large ones keep others out.
    fn make_room(&mut self, job: &[ImageTask]) -> Option<Vec<ImageTask>> {
        let client = &job.first()?.client;
        let mut jobs: BTreeMap<JobId, WaitingJob<'_>> = BTreeMap::new();
        for Waiting { task, .. } in &self.tasks {
            let job = jobs.entry(task.job).or_insert(WaitingJob { task, images: 0, work: 0 });
            (job.images, job.work) = (job.images + 1, job.work + task.work());
        }
        let new: u64 = job.iter().map(ImageTask::work).sum();
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
                *end = end.saturating_sub(task.work());
            }
        }
        taken.into_iter().map(|waiting| waiting.task).collect()
    }

    /// Rejects new jobs.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// Rejects new jobs and returns the waiting images.
    pub(super) fn clear(&mut self) -> Vec<ImageTask> {
        self.closed = true;
        self.take_out(|_| true)
    }
}

#[cfg(test)]
mod tests {
    use sd_models::{PromptSyntax, Sampler, SigmaSchedule, Size, Spec};

    use super::super::job::{self, Job, Ticket};
    use super::super::{DeviceScheduler, Engine, EngineConfig, Safety};
    use super::*;

    /// A job of images whose seeds are the client's number.
    fn job(client: u64, id: JobId, images: usize) -> (Ticket, Vec<ImageTask>) {
        let spec = Spec {
            prompt: String::new(),
            prompt_syntax: PromptSyntax::Plain,
            loras: Vec::new(),
            negative_prompt: String::new(),
            size: Size::new(64, 64).expect("multiples of 8"),
            steps: 10,
            guidance_scale: 7.5,
            seed: client,
            sampler: Sampler::Euler,
            schedule: SigmaSchedule::Model,
            img2img: None,
            hires: None,
        };
        let client = Client::named(&client.to_string());
        let job = Job { client, ..Job::from(vec![spec; images]) };
        let settings = EngineConfig {
            max_queue: 0,
            max_batch_rows: 2,
            memory_budget_bytes: None,
            safety: Safety::Blur,
        };
        let engine = Engine::absent(&DeviceScheduler::default(), settings).shared;
        job::open(id, job, &engine.state, &engine.busy, &engine.metrics)
    }

    fn drain(queue: &mut Queue) -> Vec<u64> {
        std::iter::from_fn(|| queue.next(|_| true).map(|task| task.spec.seed)).collect()
    }

    #[test]
    fn clients_take_turns_and_one_client_is_first_come_first_served() {
        let mut queue = Queue::new(100);
        let jobs = [(1, 0, 5), (2, 1, 1), (3, 2, 2), (1, 3, 1)];
        let mut tickets = Vec::new();
        for (client, id, images) in jobs {
            let (ticket, mut tasks) = job(client, id, images);
            assert!(queue.push(&mut tasks).expect("room").is_empty());
            tickets.push(ticket);
        }
        assert_eq!(queue.place(3), Some((8, queue.work())));
        assert_eq!(drain(&mut queue), [1, 2, 3, 1, 3, 1, 1, 1, 1]);
        assert!(queue.ends.is_empty());
    }

    #[test]
    fn a_priority_orders_the_jobs_of_its_own_client_only() {
        use super::super::job::Priority::{High, Low, Normal};
        let mut queue = Queue::new(100);
        let mut tickets = Vec::new();
        let jobs = [(1, Low, 1), (1, Normal, 2), (2, Normal, 2), (1, High, 1), (1, Normal, 1)];
        for (id, (client, priority, images)) in jobs.into_iter().enumerate() {
            let (ticket, mut tasks) = job(client, id as JobId, images);
            tasks.iter_mut().for_each(|task| task.priority = priority);
            queue.push(&mut tasks).expect("room");
            tickets.push(ticket);
        }
        let order = std::iter::from_fn(|| queue.next(|_| true).map(|task| task.job));
        assert_eq!(order.collect::<Vec<_>>(), [2, 3, 2, 1, 1, 4, 0]);
        assert!(queue.ends.is_empty());
    }

    #[test]
    fn a_client_that_was_served_does_not_overtake_one_that_waits() {
        let mut queue = Queue::new(100);
        let (_held, mut many) = job(1, 0, 50);
        queue.push(&mut many).expect("room");
        let mut served = [0_u64; 3];
        let mut tickets = Vec::new();
        for id in 1..40 {
            let (ticket, mut tasks) = job(2, id, 1);
            queue.push(&mut tasks).expect("room");
            tickets.push(ticket);
            let next = queue.next(|_| true).expect("a image");
            served[next.spec.seed as usize] += 1;
        }
        assert!(served[1].abs_diff(served[2]) <= 1, "{served:?}");
    }

    #[test]
    fn cancelled_images_cost_their_client_nothing() {
        let mut queue = Queue::new(100);
        let (ticket, mut cancelled) = job(1, 0, 50);
        queue.push(&mut cancelled).expect("room");
        drop(ticket);
        let (_a, mut first) = job(2, 1, 2);
        queue.push(&mut first).expect("room");
        assert!(queue.next(|_| false).is_none());
        let (_b, mut second) = job(1, 2, 2);
        queue.push(&mut second).expect("room");
        assert_eq!(drain(&mut queue), [2, 1, 2, 1]);
    }

    #[test]
    fn the_client_with_most_images_of_a_full_queue_loses_its_newest_job() {
        let mut queue = Queue::new(4);
        let (_a, mut first) = job(1, 0, 2);
        let (_b, mut second) = job(1, 1, 2);
        queue.push(&mut first).expect("room");
        queue.push(&mut second).expect("room");
        let (_c, mut more) = job(1, 2, 1);
        assert_eq!(queue.push(&mut more).expect_err("it has all of it"), PushError::Full);
        let (_d, mut other) = job(2, 3, 1);
        let evicted = queue.push(&mut other).expect("room is made");
        assert!(evicted.len() == 2 && evicted.iter().all(|task| task.job == 1));
        assert_eq!(queue.len(), 3);
        let (_e, mut large) = job(3, 4, 2);
        // Both clients have as much as this one asks for, or less.
        assert_eq!(queue.push(&mut large).expect_err("as much as the others"), PushError::Full);
        queue.close();
        assert_eq!(queue.push(&mut large).expect_err("closed"), PushError::Closed);
    }

    #[test]
    fn a_newcomer_with_several_images_gets_in_by_evicting_several_jobs() {
        let mut queue = Queue::new(4);
        let mut tickets = Vec::new();
        for id in 0..4 {
            let (ticket, mut one) = job(1, id, 1);
            queue.push(&mut one).expect("room");
            tickets.push(ticket);
        }
        let (_b, mut three) = job(2, 4, 3);
        assert_eq!(queue.push(&mut three).expect_err("more than the half"), PushError::Full);
        let (_c, mut two) = job(2, 5, 2);
        let evicted = queue.push(&mut two).expect("room is made");
        assert_eq!(evicted.iter().map(|task| task.job).collect::<Vec<_>>(), [2, 3], "the newest");
        let (_d, mut again) = job(1, 6, 1);
        assert_eq!(queue.push(&mut again).expect_err("each has its half"), PushError::Full);
        assert_eq!(drain(&mut queue), [1, 2, 1, 2]);
    }

    #[test]
    fn a_large_image_is_not_evicted_for_many_small_ones_nor_kept_out_by_them() {
        let mut queue = Queue::new(4);
        let large = |client, id| {
            let (ticket, mut one) = job(client, id, 1);
            one[0].spec.steps = 1000;
            (ticket, one)
        };
        let mut tickets = Vec::new();
        for id in 0..4 {
            let (ticket, mut small) = job(1, id, 1);
            queue.push(&mut small).expect("room");
            tickets.push(ticket);
        }
        let (_b, mut one) = large(2, 4);
        assert_eq!(queue.push(&mut one).expect("room is made").len(), 1);
        let (_c, mut more) = job(1, 5, 1);
        assert_eq!(queue.push(&mut more).expect_err("it has the most images"), PushError::Full);
    }

    #[test]
    fn a_few_large_images_are_a_large_share() {
        let mut queue = Queue::new(4);
        let (_a, mut small) = job(1, 0, 3);
        queue.push(&mut small).expect("room");
        let (_b, mut large) = job(2, 1, 1);
        large[0].spec.steps = 1000;
        queue.push(&mut large).expect("room");
        let (_c, mut one) = job(3, 2, 1);
        let evicted = queue.push(&mut one).expect("room is made");
        assert_eq!(evicted.iter().map(|task| task.job).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn a_job_that_has_begun_is_not_evicted() {
        let mut queue = Queue::new(4);
        let (_a, mut begun) = job(1, 0, 5);
        queue.push(&mut begun).expect("an empty queue");
        assert!(queue.next(|_| true).is_some());
        let (_b, mut one) = job(2, 1, 1);
        assert_eq!(queue.push(&mut one).expect_err("nothing can go"), PushError::Full);
        assert_eq!(queue.len(), 4);
    }
}
