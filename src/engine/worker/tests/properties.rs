//! Random orders of what clients do and what the worker does, which proptest makes shorter when
//! they fail: every image ends once, every job has one result, and nothing waits for ever.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::engine::JobMonitor;

const CLIENTS: u64 = 4;

#[derive(Debug, Clone)]
enum Action {
    Submit {
        client: u64,
        images: usize,
        spec: Box<Spec>,
        deadline_ms: Option<u64>,
    },
    /// The client of a pending job leaves.
    Withdraw(prop::sample::Index),
    /// The client of a pending job asks for what there is.
    Interrupt(prop::sample::Index),
    Turn,
}

fn any_spec() -> impl Strategy<Value = Spec> {
    let side = prop::sample::select(vec![64, 64, 96, 128]);
    let prompt = prop::sample::select(vec!["a cat", "a cat", "a cat", "too much"]);
    let second = prop::option::weighted(0.2, 1..4_usize);
    (side, 1..6_usize, any::<bool>(), prompt, second).prop_map(
        |(side, steps, guided, prompt, second)| Spec {
            size: square(side),
            guidance_scale: if guided { 7.5 } else { 1.0 },
            prompt: prompt.into(),
            hires: second.map(|steps| hires(128, steps)),
            ..spec(0, steps)
        },
    )
}

fn any_action() -> impl Strategy<Value = Action> {
    let deadline = prop::option::weighted(0.2, 0..200_u64);
    let submit = (0..CLIENTS, 1..5_usize, any_spec(), deadline).prop_map(
        |(client, images, spec, deadline_ms)| {
            let spec = Box::new(spec);
            Action::Submit { client, images, spec, deadline_ms }
        },
    );
    prop_oneof![
        4 => submit,
        1 => any::<prop::sample::Index>().prop_map(Action::Withdraw),
        1 => any::<prop::sample::Index>().prop_map(Action::Interrupt),
        5 => Just(Action::Turn),
    ]
}

struct Pending {
    images: usize,
    interrupted: bool,
    monitor: JobMonitor,
    result: PendingResult,
}

/// A worker, its clients, and what became of their images.
struct Trace {
    test: TestWorker,
    pending: Vec<Pending>,
    requested: usize,
    rejected: usize,
    /// Upper bound of the turns that all accepted images take: a UNet call each, a decode each.
    work: usize,
}

impl Trace {
    fn act(&mut self, action: &Action, number: usize) {
        let waiting: Vec<_> = self.pending.iter().collect();
        match action {
            Action::Submit { client, images, spec, deadline_ms } => {
                let spec = Spec { seed: number as u64, ..(**spec).clone() };
                let deadline = deadline_ms.map(|ms| Clock::now() + Duration::from_millis(ms));
                self.requested += images;
                let specs = vec![spec; *images];
                let work: usize = specs.iter().map(|spec| 2 + turns(spec)).sum();
                match self.test.try_submit(*client, specs, deadline) {
                    Ok(ticket) => {
                        self.work += work;
                        let monitor = self.test.engine.monitor(&ticket);
                        let (images, interrupted) = (*images, false);
                        let result = Box::pin(ticket.wait());
                        self.pending.push(Pending { images, interrupted, monitor, result });
                    }
                    Err(JobError::Full { .. }) => self.rejected += images,
                    Err(other) => panic!("{other}"),
                }
            }
            Action::Withdraw(place) if !waiting.is_empty() => {
                let place = place.index(waiting.len());
                drop(self.pending.swap_remove(place));
            }
            Action::Interrupt(place) if !waiting.is_empty() => {
                let place = place.index(waiting.len());
                self.pending[place].monitor.interrupt();
                self.pending[place].interrupted = true;
            }
            Action::Withdraw(_) | Action::Interrupt(_) => {}
            Action::Turn => {
                let calls = self.test.turn();
                check_turn(&self.test, &calls);
            }
        }
    }

    /// Takes the results that have come.
    fn collect(&mut self) {
        self.pending.retain_mut(|job| match (&mut job.result).now_or_never() {
            None => true,
            Some(Ok(images)) => {
                assert!(images.len() == job.images || job.interrupted, "all images of a job");
                assert!(images.len() <= job.images);
                assert!(images.windows(2).all(|pair| pair[0].index < pair[1].index), "each once");
                false
            }
            Some(Err(JobError::Full { .. } | JobError::Deadline | JobError::OutOfMemory)) => false,
            Some(Err(other)) => panic!("{other}"),
        });
    }
}

/// UNet calls of an image; one that does not fit is tried again with fewer rows.
fn turns(spec: &Spec) -> usize {
    2 * spec.passes().map(sd_models::Pass::calls).sum::<usize>()
}

fn run(actions: &[Action], capacity: usize) {
    let mut test = TestWorker::new(MAX_QUEUE, MAX_ROWS);
    test.worker.model.capacity = capacity;
    let mut trace = Trace { test, pending: Vec::new(), requested: 0, rejected: 0, work: 0 };
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        for (number, action) in actions.iter().enumerate() {
            trace.act(action, number);
            advance(Duration::from_millis(7)).await;
            trace.collect();
        }
        let mut left = trace.work + 1;
        while !trace.test.idle() {
            assert!(left > 0, "an image waits for ever");
            left -= 1;
            trace.act(&Action::Turn, 0);
            trace.collect();
        }
        assert!(trace.pending.is_empty(), "{} jobs have no result", trace.pending.len());
        let ends = ["completed", "failed", "cancelled", "rejected"];
        let ended = ends.map(|end| trace.test.counted(end));
        assert_eq!(ended.iter().sum::<usize>(), trace.requested, "{ends:?} {ended:?}");
        assert!(ended[3] >= trace.rejected, "{ends:?} {ended:?}");
        assert!(trace.test.engine.wait_idle().now_or_never().is_some(), "nothing is left to do");
    });
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn every_image_of_any_order_ends_once(
        actions in vec(any_action(), 1..80),
        capacity in prop::sample::select(vec![usize::MAX, 2, 3, 5]),
    ) {
        run(&actions, capacity);
    }
}
