//! The order of the queue, and who makes room in it.

use sd_models::{
    PromptSyntax, Sampler, SamplerOptions, SigmaSchedule, Size, Span, Spec, XlOptions,
};

use super::*;
use crate::engine::job::{self, Job, Ticket};
use crate::engine::{DeviceScheduler, Engine, EngineConfig, Safety};

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
        sampler_options: SamplerOptions::default(),
        img2img: None,
        embeds_guidance: false,
        clip_skip: 0,
        guidance_rescale: 0.0,
        variation: None,
        eta_noise_seed_delta: 0,
        xl: XlOptions::default(),
        span: Span::default(),
        refiner: None,
        warnings: Vec::new(),
        hires: None,
        controls: Vec::new(),
        tiling: false,
        vae_tiling: None,
        ip_adapters: Vec::new(),
        enlarge: None,
    };
    let client = Client::named(&client.to_string());
    let job = Job { client, ..Job::from(vec![spec; images]) };
    let settings = EngineConfig {
        unload_after: None,
        max_queue: 0,
        max_batch_rows: 2,
        memory_budget_bytes: None,
        vae_tiling: false,
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
    use crate::engine::Priority::{High, Low, Normal};
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
        one[0].work *= 1000;
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
    large[0].work *= 1000;
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
