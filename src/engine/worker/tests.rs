//! Scheduling: the tests call the worker's turns one by one, on their own thread, with a model that
//! only records its calls. Tests with timeouts pause the clock; nothing here sleeps.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, Sender};

use futures_util::FutureExt as _;
use sd_models::{
    AddOns, Defaults, Embeddings, Error, Hires, LoraStack, MemoryEstimate, ModelInfo, PromptSyntax,
    Rgb, Sampler, SigmaSchedule, Size, Spec, Upscaler,
};
use tokio::time::{Instant as Clock, advance};

use super::admit::{MAX_BUCKETS, MAX_READERS};
use super::*;
use crate::engine::{
    Client, DeviceScheduler, Engine, EngineConfig, GeneratedImage, Job, ReadLoras, Safety, Ticket,
    Trajectory,
};

/// A call of the model. Images are identified by their seeds.
#[derive(Debug, Clone, PartialEq)]
enum Call {
    Begin(u64),
    Step(Vec<Spec>),
    Decode(u64),
    CheckSafety,
}

struct RecordingModel {
    info: ModelInfo,
    calls: Rc<RefCell<Vec<Call>>>,
    /// Rows for which there is memory.
    capacity: usize,
    /// Time to encode a prompt.
    reading: Duration,
    /// One per image with files: reading them ends when the sender is dropped.
    files: RefCell<Vec<Receiver<()>>>,
    /// The result of its safety checker; `None`: an error.
    flags: Option<bool>,
}

struct FakeTrajectory {
    spec: Spec,
    made: usize,
}

impl Trajectory for FakeTrajectory {
    fn done(&self) -> bool {
        self.made == self.progress().1
    }

    fn progress(&self) -> (usize, usize) {
        (self.made, self.spec.passes().map(|(_, steps)| steps).sum())
    }

    fn rows(&self) -> usize {
        self.spec.rows()
    }

    fn size(&self) -> Size {
        let first = self.made < self.spec.steps;
        if first { self.spec.size } else { self.spec.final_size() }
    }

    fn warnings(&self) -> &[String] {
        &[]
    }
}

impl Model for RecordingModel {
    type Trajectory = FakeTrajectory;

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn read_loras(&self, spec: &Spec) -> Option<ReadLoras> {
        if spec.loras.is_empty() {
            return None;
        }
        let panics = spec.prompt == "panic";
        let gate = self.files.borrow_mut().remove(0);
        Some(Box::new(move || {
            gate.recv().unwrap_or_default();
            assert!(!panics, "as the prompt asks");
            Ok(LoraStack::default())
        }))
    }

    fn begin(&self, spec: &Spec) -> sd_models::Result<FakeTrajectory> {
        let began = Instant::now();
        while began.elapsed() < self.reading {}
        self.calls.borrow_mut().push(Call::Begin(spec.seed));
        Ok(FakeTrajectory { spec: spec.clone(), made: 0 })
    }

    fn step(&self, batch: &mut [&mut FakeTrajectory]) -> sd_models::Result<()> {
        let rows: usize = batch.iter().map(|member| member.rows()).sum();
        if rows > self.capacity || batch.iter().any(|member| member.spec.prompt == "too much") {
            return Err(Error::OutOfMemory(format!("{rows} rows")));
        }
        assert!(batch.iter().all(|member| member.size() == batch[0].size()), "one size a step");
        let specs = batch.iter().map(|member| member.spec.clone()).collect();
        self.calls.borrow_mut().push(Call::Step(specs));
        batch.iter_mut().for_each(|member| member.made += 1);
        Ok(())
    }

    fn decode(&self, trajectory: &FakeTrajectory) -> sd_models::Result<Rgb> {
        assert!(trajectory.made > 0);
        self.calls.borrow_mut().push(Call::Decode(trajectory.spec.seed));
        Ok(Rgb { width: 16, height: 16, data: (0..16 * 16 * 3).map(|i| i as u8).collect() })
    }

    fn check_safety(&self, _: &Rgb) -> sd_models::Result<Option<bool>> {
        self.calls.borrow_mut().push(Call::CheckSafety);
        match self.flags {
            None => Err(Error::OutOfMemory("safety check".into())),
            flags => Ok(flags),
        }
    }
}

/// An engine whose thread is the test.
struct TestWorker {
    engine: Engine,
    worker: Worker<RecordingModel>,
    calls: Rc<RefCell<Vec<Call>>>,
}

impl TestWorker {
    fn new(max_queue: usize, max_batch_rows: usize) -> Self {
        Self::with(max_queue, max_batch_rows, Safety::Blur)
    }

    fn with(max_queue: usize, max_batch_rows: usize, safety: Safety) -> Self {
        let settings =
            EngineConfig { max_queue, max_batch_rows, memory_budget_bytes: None, safety };
        let engine = Engine::new(&DeviceScheduler::default(), settings, EngineState::Loading);
        let calls = Rc::default();
        let defaults = Defaults {
            size: square(64),
            steps: 4,
            guidance_scale: 7.5,
            sampler: Sampler::Euler,
            schedule: SigmaSchedule::Model,
        };
        let info = ModelInfo {
            name: "recorder".into(),
            device: "none".into(),
            precision: "none".into(),
            defaults,
            multiple: 8,
            checked: false,
            memory: MemoryEstimate { scale: 8, ..MemoryEstimate::default() },
            add_ons: AddOns::default(),
            embeddings: Embeddings::default(),
        };
        engine.shared.set_state(EngineState::Ready(Arc::new(info.clone())));
        let (capacity, reading) = (usize::MAX, Duration::ZERO);
        let (log, files, flags) = (Rc::clone(&calls), RefCell::default(), None);
        let model = RecordingModel { info, calls: log, capacity, reading, files, flags };
        let worker = Worker::new(model, PanicGuard(Arc::clone(&engine.shared)));
        Self { engine, worker, calls }
    }

    /// One round of the loop. Returns the model calls.
    fn turn(&mut self) -> Vec<Call> {
        self.worker.turn();
        self.calls.take()
    }

    /// A file that is being read until this is dropped.
    fn file(&self) -> Sender<()> {
        let (held, gate) = mpsc::channel();
        self.worker.model.files.borrow_mut().push(gate);
        held
    }

    fn idle(&self) -> bool {
        self.worker.slots.is_empty() && self.engine.shared.queue().is_empty()
    }

    fn submit(&self, client: u64, specs: Vec<Spec>) -> Ticket {
        self.try_submit(client, specs, None).expect("room")
    }

    fn try_submit(
        &self,
        client: u64,
        specs: Vec<Spec>,
        deadline: Option<Clock>,
    ) -> Result<Ticket, JobError> {
        let client = Client::named(&client.to_string());
        self.engine.submit(Job { client, deadline, ..Job::from(specs) })
    }

    /// Number of images with this outcome.
    fn counted(&self, outcome: &str) -> usize {
        let series = format!("sd_images_total{{outcome=\"{outcome}\"}} ");
        let text = self.engine.metrics().to_string();
        let value = text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok());
        value.unwrap_or(0)
    }
}

fn square(side: usize) -> Size {
    Size::new(side, side).expect("a multiple of eight")
}

fn spec(seed: u64, steps: usize) -> Spec {
    Spec {
        prompt: "a cat".into(),
        prompt_syntax: PromptSyntax::Plain,
        loras: Vec::new(),
        negative_prompt: String::new(),
        size: square(64),
        steps,
        guidance_scale: 7.5,
        seed,
        sampler: Sampler::Euler,
        schedule: SigmaSchedule::Model,
        img2img: None,
        hires: None,
    }
}

/// A hires pass.
fn hires(side: usize, steps: usize) -> Hires {
    Hires { size: square(side), steps, strength: 1.0, upscaler: Upscaler::Bilinear }
}

/// The seeds that shared the step of a turn.
fn stepped(calls: &[Call]) -> Vec<u64> {
    let steps = calls.iter().filter_map(|call| match call {
        Call::Step(specs) => Some(specs.iter().map(|spec| spec.seed)),
        _ => None,
    });
    steps.flatten().collect()
}

/// Marsaglia's xorshift: the same traces on every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    fn spec(&mut self, seed: u64) -> Spec {
        let side = [64, 64, 64, 128, 96][self.roll(5) as usize];
        Spec {
            size: square(side),
            guidance_scale: [1.0, 7.5, 7.5][self.roll(3) as usize],
            prompt: if self.roll(12) == 0 { "too much" } else { "a cat" }.into(),
            hires: (self.roll(5) == 0).then(|| hires(128, 1 + self.roll(4) as usize)),
            ..spec(seed, 1 + self.roll(6) as usize)
        }
    }
}

/// The result of a job, polled once per turn.
type PendingResult = Pin<Box<dyn Future<Output = Result<Vec<GeneratedImage>, JobError>>>>;

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

const MAX_QUEUE: usize = 12;
const MAX_ROWS: usize = 8;

/// Checks the bounds of a turn.
fn check_turn(test: &TestWorker, calls: &[Call]) {
    let waiting = test.engine.shared.queue().len();
    assert!(waiting <= MAX_QUEUE, "{waiting} images wait");
    let rows: usize = test.worker.slots.iter().map(|slot| slot.trajectory.rows()).sum();
    assert!(rows <= MAX_BUCKETS * MAX_ROWS, "{rows} rows are running");
    let count = |which: fn(&Call) -> bool| calls.iter().filter(|call| which(call)).count();
    assert!(count(|call| matches!(call, Call::Step(_))) <= 1, "one step a turn: {calls:?}");
    assert!(count(|call| matches!(call, Call::Decode(_))) <= 1, "one image a turn: {calls:?}");
    for call in calls {
        let Call::Step(specs) = call else { continue };
        let rows: usize = specs.iter().map(Spec::rows).sum();
        assert!(rows <= MAX_ROWS, "{calls:?}");
    }
}

/// Random jobs of random clients, some cancelled or with a deadline; then turns until all end.
async fn trace(dice: &mut Dice, capacity: usize) -> Outcomes {
    let mut test = TestWorker::new(MAX_QUEUE, MAX_ROWS);
    test.worker.model.capacity = capacity;
    let mut outcomes = Outcomes::default();
    let mut clients: Vec<(usize, PendingResult)> = Vec::new();
    let mut turns_left = 1000;
    for turn in 0.. {
        for k in 0..if turn < 150 { dice.roll(3) } else { 0 } {
            let specs = vec![dice.spec(10 * turn + k); 1 + dice.roll(3) as usize];
            let images = specs.len();
            let soon = Clock::now() + Duration::from_millis(10 * dice.roll(20));
            let deadline = (dice.roll(6) == 0).then_some(soon);
            outcomes.requested += images;
            match test.try_submit(dice.roll(4), specs, deadline) {
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
            None if dice.roll(40) == 0 => {
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
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
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

#[tokio::test]
async fn a_job_that_is_submitted_again_is_counted_once() {
    let mut test = TestWorker::new(2, 4);
    let first = test.submit(0, vec![spec(0, 1); 2]);
    let uncounted = test.engine.uncounted(3);
    let job = || {
        let (client, uncounted) = (Client::named("1"), Some(Arc::clone(&uncounted)));
        test.engine.submit(Job { client, uncounted, ..Job::from(vec![spec(1, 1); 3]) })
    };
    for _ in 0..3 {
        assert!(matches!(job(), Err(JobError::Full { .. })));
    }
    drop(first);
    let ticket = job().expect("room");
    drop(ticket);
    test.turn();
    let counted = ["completed", "failed", "cancelled", "rejected"].map(|end| test.counted(end));
    assert_eq!(counted, [0, 0, 5, 0]);
    // One that is given up while it waits.
    let given_up = test.engine.uncounted(3);
    let _other = test.submit(0, vec![spec(0, 1); 2]);
    let job = Job { uncounted: Some(Arc::clone(&given_up)), ..Job::from(vec![spec(1, 1); 3]) };
    assert!(test.engine.submit(job).is_err());
    assert_eq!(test.counted("cancelled"), 5);
    drop((uncounted, given_up));
    assert_eq!(test.counted("cancelled"), 8);
}

#[tokio::test]
async fn clients_with_waiting_images_get_the_same_work() {
    let mut test = TestWorker::new(300, 8);
    // Many images at once, large images, one image at a time.
    let large = |seed| Spec { size: square(128), ..spec(seed, 4) };
    let mut held = vec![test.submit(0, (0..200).map(|_| spec(0, 4)).collect())];
    held.push(test.submit(1, (0..50).map(|_| large(1)).collect()));
    let mut work = [0_usize; 3];
    let mut small = test.submit(2, vec![spec(2, 4)]);
    for _ in 0..200 {
        for call in test.turn() {
            let Call::Step(specs) = call else { continue };
            for spec in specs {
                work[spec.seed as usize] += spec.size.pixels() * spec.rows();
            }
        }
        if small.progress().borrow().completed == 4 {
            small = test.submit(2, vec![spec(2, 4)]);
        }
    }
    // The third has at most one image in flight.
    assert!(work[2] > 0 && work[0].max(work[1]) < 2 * work[0].min(work[1]), "{work:?}");
}

#[tokio::test]
async fn neither_large_nor_small_pictures_starve() {
    for (common, rare) in [(64, 256), (256, 64)] {
        let mut test = TestWorker::new(8, 4);
        let sized = |seed, side| Spec { size: square(side), ..spec(seed, 4) };
        let mut held = vec![test.submit(0, vec![sized(0, common), sized(0, common)])];
        let one = test.submit(1, vec![sized(1, rare)]);
        let mut turns = 0;
        while one.progress().borrow().completed < 4 {
            while let Ok(ticket) = test.try_submit(0, vec![sized(0, common)], None) {
                held.push(ticket);
            }
            test.turn();
            turns += 1;
            // A step of two small rows costs a thirty-second of one of four large rows.
            assert!(turns <= 4 * 33, "{rare} waits for {common}");
        }
    }
}

#[tokio::test]
async fn rows_are_freed_and_taken_between_steps() {
    let mut test = TestWorker::new(8, 4);
    let cancelled = test.submit(0, vec![spec(1, 100)]);
    let neighbour = test.submit(0, vec![spec(2, 3)]);
    let next = test.submit(0, vec![spec(3, 1)]);
    assert_eq!(stepped(&test.turn()), [1, 2], "four rows are two images with guidance");
    drop(cancelled);
    assert_eq!(stepped(&test.turn()), [2, 3], "the next step has another image in its rows");
    assert_eq!((test.counted("cancelled"), stepped(&test.turn())), (1, vec![2]));
    test.turn();
    assert!(test.idle());
    assert_eq!(neighbour.wait().await.map(|images| images.len()), Ok(1));
    assert_eq!(next.wait().await.map(|images| images.len()), Ok(1));
}

#[tokio::test(start_paused = true)]
async fn deadlines_are_exact_for_running_and_waiting_images() {
    let mut test = TestWorker::new(8, 2);
    let began = Clock::now();
    let at = |seconds| Some(began + Duration::from_secs(seconds));
    let running = test.try_submit(0, vec![spec(1, 100)], at(58)).expect("room");
    let waiting = test.try_submit(0, vec![spec(2, 1)], at(30)).expect("room");
    let later = test.submit(0, vec![spec(3, 1)]);
    assert_eq!(stepped(&test.turn()), [1]);
    assert_eq!(waiting.wait().await.err(), Some(JobError::Deadline));
    assert_eq!(began.elapsed(), Duration::from_secs(30));
    assert_eq!(stepped(&test.turn()), [1]);
    assert_eq!(running.wait().await.err(), Some(JobError::Deadline));
    assert_eq!(began.elapsed(), Duration::from_secs(58));
    assert_eq!(stepped(&test.turn()), [3], "timed-out images are cancelled");
    assert_eq!(later.wait().await.map(|images| images.len()), Ok(1));
    assert_eq!((test.counted("cancelled"), test.counted("completed")), (2, 1));
}

#[tokio::test]
async fn pictures_are_decoded_one_at_a_time_between_steps() {
    let mut test = TestWorker::new(8, 12);
    let _held = test.submit(0, [1, 1, 1, 1, 5].map(|steps| spec(steps, steps as usize)).into());
    for turn in 0..4 {
        let calls = test.turn();
        let work: Vec<_> = calls.iter().filter(|calls| !matches!(calls, Call::Begin(_))).collect();
        assert!(matches!(work[..], [Call::Step(_), Call::Decode(1)]), "turn {turn}: {calls:?}");
    }
}

#[tokio::test]
async fn encoding_of_many_prompts_does_not_delay_the_steps() {
    let mut test = TestWorker::new(64, 64);
    test.worker.model.reading = Duration::from_millis(2);
    let begun = |calls: &[Call]| calls.iter().filter(|call| matches!(call, Call::Begin(_))).count();
    let _first = test.submit(0, vec![spec(0, 50); 4]);
    assert_eq!(begun(&test.turn()), 4, "nothing runs yet: the batch is filled");
    let _many = test.submit(0, vec![spec(1, 50); 20]);
    // A step of this model takes less time than the text of one image.
    for _ in 0..20 {
        assert_eq!(begun(&test.turn()), 1);
    }
    assert_eq!(stepped(&test.turn()).len(), 24);
}

#[tokio::test]
async fn an_image_does_not_wait_for_others() {
    let mut test = TestWorker::new(8, 8);
    let _one = test.submit(0, vec![spec(1, 4)]);
    assert_eq!(stepped(&test.turn()), [1]);
    let _two = test.submit(0, vec![Spec { guidance_scale: 1.0, ..spec(2, 9) }]);
    assert_eq!(stepped(&test.turn()), [1, 2], "another step count, guidance and start");
}

/// The result of one image of a model with a safety checker, and its turns.
fn checked(
    safety: Safety,
    flags: Option<bool>,
) -> (Result<Vec<GeneratedImage>, JobError>, Vec<Vec<Call>>) {
    let mut test = TestWorker::with(4, 4, safety);
    test.worker.model.info.checked = true;
    test.worker.model.flags = flags;
    let ticket = test.submit(1, vec![spec(1, 1)]);
    let mut turns = Vec::new();
    while !test.idle() {
        turns.push(test.turn());
    }
    (ticket.wait().now_or_never().expect("settled"), turns)
}

#[test]
fn a_picture_is_judged_a_turn_after_it_is_decoded() {
    let mut test = TestWorker::with(4, 8, Safety::Blur);
    test.worker.model.info.checked = true;
    test.worker.model.flags = Some(false);
    let _long = test.submit(1, vec![spec(9, 6)]);
    let _short = test.submit(1, vec![spec(1, 1), spec(2, 1)]);
    let mut after = Vec::new();
    while !test.idle() {
        let calls = test.turn();
        let images: Vec<Call> = calls
            .into_iter()
            .filter(|call| matches!(call, Call::Decode(_) | Call::CheckSafety))
            .collect();
        assert!(images.len() <= 1, "at most one between two steps: {images:?}");
        after.extend(images);
    }
    let (one, two, long) = (Call::Decode(1), Call::Decode(2), Call::Decode(9));
    assert_eq!(after, [one, Call::CheckSafety, two, Call::CheckSafety, long, Call::CheckSafety]);
}

#[test]
fn a_flagged_image_is_marked_blurred_or_an_error() {
    let original: Vec<u8> = (0..16 * 16 * 3).map(|i| i as u8).collect();
    let one =
        |checked: Result<Vec<GeneratedImage>, JobError>| checked.expect("completed").remove(0);
    for safety in [Safety::Flag, Safety::Blur, Safety::Block] {
        let passed = one(checked(safety, Some(false)).0);
        assert_eq!((passed.nsfw, passed.warnings.len()), (Some(false), 0));
        assert_eq!(passed.rgb.data, original);
        let failed = checked(safety, None).0.expect_err("a failed check fails the image");
        assert_eq!(failed, JobError::OutOfMemory);
    }
    let flagged = one(checked(Safety::Flag, Some(true)).0);
    assert_eq!((flagged.nsfw, flagged.warnings.len()), (Some(true), 1));
    assert_eq!(flagged.rgb.data, original);
    let blurred = one(checked(Safety::Blur, Some(true)).0);
    assert_eq!(blurred.nsfw, Some(true));
    assert!(blurred.warnings[0].ends_with("it is blurred") && blurred.rgb.data != original);
    let (blocked, turns) = checked(Safety::Block, Some(true));
    assert_eq!(blocked.expect_err("blocked"), JobError::Withheld);
    assert_eq!(turns.len(), 2, "{turns:?}");
}

#[test]
fn a_hires_pass_shares_steps_with_images_of_its_size() {
    let mut test = TestWorker::new(4, 8);
    let _large = test.submit(1, vec![Spec { size: square(128), ..spec(1, 12) }]);
    let _small = test.submit(2, vec![spec(2, 12)]);
    let grows = Spec { hires: Some(hires(128, 3)), ..spec(3, 2) };
    let ticket = test.submit(3, vec![grows]);
    let mut steps = Vec::new();
    while !test.idle() {
        let seeds = stepped(&test.turn());
        steps.extend(seeds.contains(&3).then_some(seeds));
    }
    assert_eq!(steps, [vec![2, 3], vec![2, 3], vec![1, 3], vec![1, 3], vec![1, 3]]);
    let progress = *ticket.progress().borrow();
    assert_eq!((progress.completed, progress.total), (5, 5), "of both passes");
    assert!(ticket.wait().now_or_never().expect("settled").is_ok());
}

#[test]
fn a_second_pass_that_never_fits_is_refused_at_once() {
    let test = TestWorker::new(4, 8);
    let mut info = test.worker.model.info.clone();
    info.memory.decode_bytes = 10;
    let engine =
        Engine::new(&DeviceScheduler::default(), test.engine.shared.settings, EngineState::Loading);
    engine.shared.set_state(EngineState::Ready(Arc::new(info)));
    engine.shared.device.set_budget_bytes(10 * 64 * 64);
    let grows = |side| Spec { hires: Some(hires(side, 1)), ..spec(1, 1) };
    assert!(engine.submit(vec![spec(1, 1)]).is_ok());
    assert_eq!(engine.submit(vec![grows(128)]).err(), Some(JobError::OutOfMemory));
    assert!(engine.submit(vec![grows(32)]).is_ok());
}

#[test]
fn an_interrupted_job_returns_partly_denoised_images() {
    let mut test = TestWorker::new(10, 4);
    let ticket = test.submit(1, vec![spec(1, 9), spec(2, 9), spec(3, 9)]);
    let other = test.submit(2, vec![spec(4, 3)]);
    assert_eq!(stepped(&test.turn()), [1, 4]);
    let watch = test.engine.monitor(&ticket);
    watch.interrupt();
    let calls = test.turn();
    assert!(calls.contains(&Call::Decode(1)) && !calls.contains(&Call::Begin(2)), "{calls:?}");
    let images = ticket.wait().now_or_never().expect("it is over").expect("no failure");
    let found: Vec<_> = images.iter().map(|image| (image.index, &image.warnings[..])).collect();
    assert_eq!(found, [(0, &["interrupted after 1 of 9 UNet calls".to_owned()][..])]);
    assert_eq!(test.counted("cancelled"), 2);
    while !test.idle() {
        test.turn();
    }
    let images = other.wait().now_or_never().expect("it is over").expect("no failure");
    assert!(images[0].warnings.is_empty(), "other jobs are not interrupted");
}

#[test]
fn an_interrupted_picture_of_which_there_is_nothing_to_see_is_left_out() {
    let mut test = TestWorker::new(10, 4);
    let first = test.submit(1, vec![Spec { size: square(128), ..spec(1, 9) }]);
    test.turn();
    let ticket = test.submit(2, vec![spec(2, 9)]);
    test.engine.monitor(&ticket).interrupt();
    assert!(!test.turn().contains(&Call::Begin(2)));
    assert_eq!(ticket.wait().now_or_never().map(|images| images.map(|d| d.len())), Some(Ok(0)));
    assert_eq!(first.progress().borrow().completed, 2);
}

/// An image that needs a file.
fn adapted(seed: u64, steps: usize) -> Spec {
    Spec { loras: vec![("style".into(), 1.0)], ..spec(seed, steps) }
}

#[test]
fn other_images_step_while_a_file_is_read() {
    let mut test = TestWorker::new(4, 8);
    let file = test.file();
    let _running = test.submit(1, vec![spec(1, 3)]);
    let ticket = test.submit(2, vec![adapted(2, 1)]);
    assert_eq!(stepped(&test.turn()), [1]);
    let _later = test.submit(3, vec![spec(3, 1)]);
    assert_eq!(stepped(&test.turn()), [1, 3], "a later image overtakes it");
    while !test.idle() {
        assert!(!test.turn().contains(&Call::Begin(2)));
    }
    // New images are still accepted.
    let _last = test.submit(4, vec![spec(4, 1)]);
    assert!(test.worker.wait());
    assert_eq!(stepped(&test.turn()), [4]);
    test.engine.drain();
    drop(file);
    assert!(test.worker.wait(), "until the file has been read");
    let calls = test.turn();
    assert!(calls.contains(&Call::Begin(2)) && stepped(&calls) == [2], "{calls:?}");
    assert!(ticket.wait().now_or_never().expect("settled").is_ok());
    assert!(!test.worker.wait(), "nothing is left");
}

#[test]
fn readers_are_bounded_also_when_nobody_wants_their_images() {
    let mut test = TestWorker::new(8, 8);
    let files: Vec<_> = (0..=MAX_READERS).map(|_| test.file()).collect();
    let gone = (0..MAX_READERS as u64).map(|k| test.submit(k, vec![adapted(k, 1)]));
    let gone: Vec<_> = gone.collect();
    test.turn();
    drop(gone);
    let waits = test.submit(8, vec![adapted(8, 1)]);
    let plain = test.submit(9, vec![spec(9, 1)]);
    assert_eq!(stepped(&test.turn()), [9], "images without LoRAs go on");
    while !test.worker.slots.is_empty() {
        test.turn();
    }
    assert!(plain.wait().now_or_never().expect("settled").is_ok());
    assert_eq!((test.worker.readers.len(), test.worker.reading.len()), (MAX_READERS, 0));
    drop(files);
    while !test.idle() || !test.worker.reading.is_empty() {
        assert!(test.worker.wait());
        test.turn();
    }
    assert!(waits.wait().now_or_never().expect("settled").is_ok());
}

#[test]
fn a_reader_that_panics_fails_its_image_alone() {
    let mut test = TestWorker::new(8, 8);
    drop(test.file());
    let ticket = test.submit(1, vec![Spec { prompt: "panic".into(), ..adapted(1, 1) }]);
    test.turn();
    assert!(test.worker.wait());
    test.turn();
    assert_eq!(ticket.wait().now_or_never().expect("settled").err(), Some(JobError::Model));
    let _next = test.submit(2, vec![spec(2, 1)]);
    assert_eq!(stepped(&test.turn()), [2]);
}

#[test]
fn a_client_with_many_sizes_leaves_room_and_time_for_others() {
    let mut test = TestWorker::new(64, 4);
    let sizes = [56, 72, 80, 88].map(square);
    let odd = sizes.iter().flat_map(|size| vec![Spec { size: *size, ..spec(0, 100) }; 2]);
    let _many = test.submit(0, odd.collect());
    for _ in 0..8 {
        test.turn();
    }
    let _one = test.submit(1, vec![spec(1, 100), spec(1, 100)]);
    let mut work = [0_usize; 2];
    for _ in 0..100 {
        for call in test.turn() {
            let Call::Step(specs) = call else { continue };
            for spec in specs {
                work[spec.seed as usize] += spec.size.pixels() * spec.rows();
            }
        }
    }
    assert!(work[0].abs_diff(work[1]) * 10 < work[0] + work[1], "{work:?}");
}

#[test]
fn an_image_that_waits_for_a_file_has_its_rows() {
    let mut test = TestWorker::new(4, 2);
    let (first, second) = (test.file(), test.file());
    let leaves = test.submit(1, vec![adapted(1, 1)]);
    let _second = test.submit(2, vec![spec(2, 1)]);
    let _other = test.submit(3, vec![Spec { size: square(128), ..spec(3, 2) }]);
    assert_eq!(stepped(&test.turn()), [3], "another size has rows of its own");
    test.engine.monitor(&leaves).interrupt();
    let calls = test.turn();
    assert!(
        calls.contains(&Call::Begin(2)),
        "the rows of an interrupted image are free: {calls:?}"
    );
    assert_eq!(leaves.wait().now_or_never().map(|images| images.map(|d| d.len())), Some(Ok(0)));
    drop((first, second));
    let ticket = test.submit(4, vec![adapted(4, 1)]);
    while test.worker.wait() {
        test.turn();
        test.engine.drain();
    }
    assert!(ticket.wait().now_or_never().expect("settled").is_ok());
}

#[test]
fn the_memory_of_a_prompt_counts_in_its_step() {
    let mut test = TestWorker::new(4, 8);
    test.worker.model.info.memory.chunk_bytes = 1000;
    test.engine.shared.device.set_budget_bytes(10_000);
    // Three chunks and one: 8000 bytes. One and one: 4000.
    let long = |seed| Spec {
        prompt: "word ".repeat(100),
        prompt_syntax: PromptSyntax::A1111,
        ..spec(seed, 2)
    };
    let _tickets =
        [long(1), long(2), spec(3, 2), spec(4, 2)].map(|spec| test.submit(spec.seed, vec![spec]));
    let mut steps = Vec::new();
    while !test.idle() {
        steps.push(stepped(&test.turn()));
    }
    steps.retain(|seeds| !seeds.is_empty());
    let expected: [&[u64]; 6] = [&[1], &[1], &[2], &[2], &[3, 4], &[3, 4]];
    assert_eq!(steps, expected);
}

mod properties;
