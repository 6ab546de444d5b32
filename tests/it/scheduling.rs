//! Scheduling without a model, through the engine and its thread: fairness, no starvation,
//! deadlines, and over random traces that every picture ends exactly once whatever the threads'
//! timing. Turn by turn, without threads: `src/engine/worker/tests.rs`.

use std::time::Duration;

use anyhow::Result;
use sd_models::{Size, Spec};
use sd_server::engine::{Client, Engine, EngineConfig, Job, JobError, Ticket};
use tokio::time::Instant;

use crate::engine::ready;
use crate::fake::{ENGINE, Fake, spec, wait_until};

/// Marsaglia's xorshift: the same traces on every run.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

fn job(client: u64, specs: Vec<Spec>) -> Job {
    Job { client: Client::named(&client.to_string()), ..Job::from(specs) }
}

/// A job of one to three pictures by one of four clients.
fn random_job(dice: &mut Dice, name: u64) -> Job {
    let side = [64, 64, 64, 128, 96][dice.roll(5) as usize];
    let picture = Spec {
        size: Size::new(side, 64).expect("multiples of 8"),
        guidance_scale: [1.0, 7.5, 7.5][dice.roll(3) as usize],
        prompt: if dice.roll(12) == 0 { "out of memory" } else { "a cat" }.into(),
        ..spec(name, 1 + dice.roll(6) as usize)
    };
    job(dice.roll(4), vec![picture; 1 + dice.roll(3) as usize])
}

async fn end(ticket: Ticket, dice: u64) -> &'static str {
    let result = match dice {
        0 => return "withdrawn",
        1 => {
            tokio::select! {
                result = ticket.wait() => result,
                () = tokio::time::sleep(Duration::from_millis(2)) => return "withdrawn",
            }
        }
        _ => ticket.wait().await,
    };
    match result {
        Ok(_) => "drawn",
        Err(JobError::OutOfMemory) => "out of memory",
        Err(JobError::Full { .. }) => "evicted",
        Err(JobError::Deadline) => "late",
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_picture_of_a_random_trace_ends_exactly_once() -> Result<()> {
    for seed in 1..=12 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let (mut fake, strings) = Fake::new();
        fake.pace = Duration::from_micros(200);
        fake.capacity = [usize::MAX, 3, 5][seed as usize % 3];
        drop(strings.permits);
        let settings = EngineConfig { max_queue: 12, max_batch_rows: 8, ..ENGINE };
        let engine = Engine::start(settings, || Ok(fake))?;
        engine.ready().await?;
        let (mut pictures, mut ends) = (0, Vec::new());
        for name in 0..120 {
            let mut job = random_job(&mut dice, name);
            pictures += job.specs.len();
            if dice.roll(8) == 0 {
                job.deadline = Some(Instant::now() + Duration::from_millis(dice.roll(5)));
            }
            let chance = dice.roll(6);
            match engine.submit(job) {
                Ok(ticket) => ends.push(tokio::spawn(end(ticket, chance))),
                Err(JobError::Full { .. }) => {}
                Err(other) => panic!("{other}"),
            }
            if dice.roll(3) == 0 {
                tokio::time::sleep(Duration::from_millis(dice.roll(3))).await;
            }
        }
        for ticket in ends {
            ticket.await?;
        }
        // Those that were withdrawn last leave at the next step boundary or arrival.
        engine.submit(vec![spec(0, 1)])?.wait().await?;
        wait_until(|| counted(&engine) > pictures);
        assert_eq!(counted(&engine), pictures + 1, "seed {seed}");
        engine.gauge();
        let text = engine.metrics().to_string();
        assert!(text.contains("\nsd_images_waiting 0\n"), "{text}");
    }
    Ok(())
}

/// Pictures that have ended in one way or another.
fn counted(engine: &Engine) -> usize {
    let text = engine.metrics().to_string();
    let series = text.lines().filter(|line| line.starts_with("sd_images_total{"));
    let counts = series.filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok());
    counts.sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_one_picture_does_not_wait_for_anothers_many() -> Result<()> {
    let (fake, strings) = Fake::new();
    let engine = Engine::start(EngineConfig { max_queue: 100, ..ENGINE }, || Ok(fake))?;
    engine.ready().await?;
    let many = engine.submit(job(1, (1..50).map(|seed| spec(seed, 2)).collect()))?;
    wait_until(|| many.progress().borrow().started == 2);
    let one = engine.submit(job(2, vec![spec(99, 2)]))?;
    for _ in 0..4 {
        strings.step();
    }
    wait_until(|| one.progress().borrow().completed == 2);
    assert_eq!(one.wait().await?.len(), 1);
    assert!(many.progress().borrow().completed <= 8);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_picture_is_not_starved_by_small_ones() -> Result<()> {
    let (engine, strings) = ready().await;
    let large = Spec { size: Size::new(256, 256).expect("multiples"), ..spec(99, 3) };
    let mut small = vec![engine.submit(vec![spec(1, 2)])?];
    let large = engine.submit(vec![large])?;
    let mut steps = 0;
    while large.progress().borrow().completed < 3 {
        while let Ok(ticket) = engine.submit(vec![spec(1, 2)]) {
            small.push(ticket);
        }
        strings.step();
        steps += 1;
        // A step of the large one costs eight full steps of the small ones.
        assert!(steps < 40, "{:?}", large.progress().borrow());
    }
    assert!(steps >= 12, "and the small ones were drawn between its steps: {steps}");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_deadline_frees_the_rows_at_the_next_step() -> Result<()> {
    let (engine, strings) = ready().await;
    let began = Instant::now();
    let deadline = Some(began + Duration::from_secs(58));
    let late = engine.submit(Job { deadline, ..Job::from(vec![spec(1, 3)]) })?;
    wait_until(|| late.progress().borrow().started == 1);
    let neighbour = engine.submit(vec![spec(2, 2)])?;
    assert_eq!(late.wait().await.err(), Some(JobError::Deadline));
    assert_eq!(began.elapsed(), Duration::from_secs(58), "to the moment");
    strings.step();
    assert_eq!(strings.last(), [1], "this step had begun");
    strings.step();
    assert_eq!(strings.last(), [2]);
    drop(strings.permits);
    assert_eq!(neighbour.wait().await?.len(), 1);
    Ok(())
}
