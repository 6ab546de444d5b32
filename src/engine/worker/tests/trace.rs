//! Long random traces, in which every way to end occurs.

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;

/// A random request for images with this seed.
fn random_spec(dice: &mut StdRng, seed: u64) -> Spec {
    let side = [64, 64, 64, 128, 96][dice.random_range(0..5)];
    Spec {
        size: square(side),
        guidance_scale: [1.0, 7.5, 7.5][dice.random_range(0..3)],
        prompt: if dice.random_range(0..12) == 0 { "too much" } else { "a cat" }.into(),
        hires: (dice.random_range(0..5) == 0).then(|| hires(128, dice.random_range(1..5))),
        ..spec(seed, dice.random_range(1..7))
    }
}

/// Number of images by outcome.
#[derive(Debug, Default)]
struct Outcomes {
    requested: usize,
    completed: usize,
    rejected: usize,
    timed_out: usize,
    failed: usize,
    cancelled: usize,
}

impl Outcomes {
    fn add(&mut self, count: usize, end: &Result<Vec<GeneratedImage>, JobError>) {
        match end {
            Ok(images) => {
                assert_eq!(images.len(), count, "all of them");
                self.completed += count;
            }
            Err(JobError::Full { .. }) => self.rejected += count,
            Err(JobError::Deadline) => self.timed_out += count,
            Err(JobError::OutOfMemory) => self.failed += count,
            Err(other) => panic!("{other}"),
        }
    }
}

/// Random jobs of random clients, some cancelled or with a deadline; then turns until all end.
async fn trace(dice: &mut StdRng, capacity: usize) -> Outcomes {
    let mut test = TestWorker::new(MAX_QUEUE, MAX_ROWS);
    test.worker.model.capacity = capacity;
    let mut outcomes = Outcomes::default();
    let mut clients: Vec<(usize, PendingResult)> = Vec::new();
    let mut turns_left = 1000;
    for turn in 0.. {
        for k in 0..if turn < 150 { dice.random_range(0..3) } else { 0 } {
            let specs = vec![random_spec(dice, 10 * turn + k); dice.random_range(1..4)];
            let images = specs.len();
            let soon = Clock::now() + Duration::from_millis(10 * dice.random_range(0..20));
            let deadline = (dice.random_range(0..6) == 0).then_some(soon);
            outcomes.requested += images;
            match test.try_submit(dice.random_range(0..4), specs, deadline) {
                Ok(ticket) => clients.push((images, Box::pin(ticket.wait()))),
                Err(failure) => outcomes.add(images, &Err(failure)),
            }
        }
        let calls = test.turn();
        check_turn(&test, &calls);
        advance(Duration::from_millis(10)).await;
        clients.retain_mut(|(images, client)| match client.now_or_never() {
            Some(end) => {
                outcomes.add(*images, &end);
                false
            }
            None if dice.random_range(0..40) == 0 => {
                outcomes.cancelled += *images;
                false
            }
            None => true,
        });
        if turn >= 150 && test.idle() {
            break;
        }
        turns_left -= usize::from(turn >= 150);
        assert!(turns_left > 0, "an image waits forever: {:?}", test.engine.shared.queue().len());
    }
    assert!(clients.is_empty(), "{} jobs have no result", clients.len());
    let counted = ["completed", "failed", "cancelled", "rejected"].map(|end| test.counted(end));
    assert_eq!(counted.iter().sum::<usize>(), outcomes.requested, "{counted:?} {outcomes:?}");
    // Some images of a failed or cancelled job may be completed.
    assert!(
        counted[0] >= outcomes.completed && counted[3] == outcomes.rejected,
        "{counted:?} {outcomes:?}"
    );
    assert!(test.engine.wait_idle().now_or_never().is_some(), "nothing is left to do");
    outcomes
}

#[tokio::test(start_paused = true)]
async fn every_picture_of_a_random_trace_ends_exactly_once() {
    let mut all = [0; 5];
    for seed in 1..=150_u64 {
        let mut dice = StdRng::seed_from_u64(seed);
        let outcomes = trace(&mut dice, [usize::MAX, 3, 5][seed as usize % 3]).await;
        let of_one = [
            outcomes.completed,
            outcomes.rejected,
            outcomes.timed_out,
            outcomes.failed,
            outcomes.cancelled,
        ];
        assert_eq!(of_one.iter().sum::<usize>(), outcomes.requested, "seed {seed}: {outcomes:?}");
        all.iter_mut().zip(of_one).for_each(|(all, one)| *all += one);
    }
    assert!(all.iter().all(|images| *images > 500), "every outcome occurs: {all:?}");
}
