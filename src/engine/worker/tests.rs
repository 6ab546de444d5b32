//! Scheduling as arithmetic: the worker's turns are taken by hand, on this thread, around a model
//! that only keeps a diary. Where anybody waits the clock is paused; nothing here sleeps.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, Sender};

use futures_util::FutureExt as _;
use sd_models::{
    AddOns, Defaults, Embeddings, Hires, MemoryEstimate, PromptSyntax, Rgb, Sampler, SigmaSchedule,
    Upscaler,
};
use tokio::time::{Instant as Clock, advance};

use super::*;
use crate::engine::{Client, DeviceScheduler, Engine, EngineConfig, Job, Ticket};

/// What the model was asked for: the seeds tell the pictures apart.
#[derive(Debug, Clone, PartialEq)]
enum Did {
    Begin(u64),
    Step(Vec<Spec>),
    Decode(u64),
    Judge,
}

struct RecordingModel {
    info: ModelInfo,
    diary: Rc<RefCell<Vec<Did>>>,
    /// Rows for which there is memory.
    capacity: usize,
    /// How long the encoding of a text takes.
    reading: Duration,
    /// Each lets one picture's files be read, when its other end is dropped.
    files: RefCell<Vec<Receiver<()>>>,
    /// What it says of pictures, if it is asked; an error when absent.
    objects: Option<bool>,
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

    fn files(&self, spec: &Spec) -> Option<Box<dyn FnOnce() + Send>> {
        if spec.loras.is_empty() {
            return None;
        }
        let gate = self.files.borrow_mut().remove(0);
        Some(Box::new(move || gate.recv().unwrap_or_default()))
    }

    fn begin(&self, spec: &Spec) -> sd_models::Result<FakeTrajectory> {
        let began = Instant::now();
        while began.elapsed() < self.reading {}
        self.diary.borrow_mut().push(Did::Begin(spec.seed));
        Ok(FakeTrajectory { spec: spec.clone(), made: 0 })
    }

    fn step(&self, batch: &mut [&mut FakeTrajectory]) -> sd_models::Result<()> {
        let rows: usize = batch.iter().map(|member| member.rows()).sum();
        if rows > self.capacity || batch.iter().any(|member| member.spec.prompt == "too much") {
            return Err(Error::OutOfMemory(format!("{rows} rows")));
        }
        assert!(batch.iter().all(|member| member.size() == batch[0].size()), "one size a step");
        let specs = batch.iter().map(|member| member.spec.clone()).collect();
        self.diary.borrow_mut().push(Did::Step(specs));
        batch.iter_mut().for_each(|member| member.made += 1);
        Ok(())
    }

    fn decode(&self, sketch: &FakeTrajectory) -> sd_models::Result<Rgb> {
        assert!(sketch.made > 0);
        self.diary.borrow_mut().push(Did::Decode(sketch.spec.seed));
        Ok(Rgb { width: 16, height: 16, data: (0..16 * 16 * 3).map(|i| i as u8).collect() })
    }

    fn check_safety(&self, _: &Rgb) -> sd_models::Result<Option<bool>> {
        self.diary.borrow_mut().push(Did::Judge);
        match self.objects {
            None => Err(Error::OutOfMemory("to judge".into())),
            objects => Ok(objects),
        }
    }
}

/// An engine whose thread is the test.
struct TestWorker {
    engine: Engine,
    worker: Worker<RecordingModel>,
    diary: Rc<RefCell<Vec<Did>>>,
}

impl TestWorker {
    fn new(max_queue: usize, max_batch_rows: usize) -> Self {
        Self::with(max_queue, max_batch_rows, Safety::Blur)
    }

    fn with(max_queue: usize, max_batch_rows: usize, safety: Safety) -> Self {
        let settings =
            EngineConfig { max_queue, max_batch_rows, memory_budget_bytes: None, safety };
        let engine = Engine::new(&DeviceScheduler::default(), settings, EngineState::Loading);
        let diary = Rc::default();
        let defaults = Defaults {
            size: square(64),
            steps: 4,
            guidance_scale: 7.5,
            sampler: Sampler::Euler,
            schedule: SigmaSchedule::Model,
        };
        let info = ModelInfo {
            name: "diarist".into(),
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
        let (diary_of, files, objects) = (Rc::clone(&diary), RefCell::default(), None);
        let model = RecordingModel { info, diary: diary_of, capacity, reading, files, objects };
        let worker = Worker::new(model, PanicGuard(Arc::clone(&engine.shared)));
        Self { engine, worker, diary }
    }

    /// One round of the loop, and what it did.
    fn turn(&mut self) -> Vec<Did> {
        self.worker.turn();
        self.diary.take()
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

    /// Pictures that have ended so.
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

/// A second pass.
fn hires(side: usize, steps: usize) -> Hires {
    Hires { size: square(side), steps, strength: 1.0, upscaler: Upscaler::Bilinear }
}

/// The seeds that shared the step of a turn.
fn stepped(did: &[Did]) -> Vec<u64> {
    let steps = did.iter().filter_map(|did| match did {
        Did::Step(specs) => Some(specs.iter().map(|spec| spec.seed)),
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

/// A client that waits, looked at once a turn.
type PendingResult = Pin<Box<dyn Future<Output = Result<Vec<GeneratedImage>, JobError>>>>;

/// What became of the jobs of a trace, in pictures.
#[derive(Debug, Default)]
struct Outcomes {
    asked: usize,
    drawn: usize,
    refused: usize,
    late: usize,
    failed: usize,
    withdrawn: usize,
}

impl Outcomes {
    fn note(&mut self, pictures: usize, end: &Result<Vec<GeneratedImage>, JobError>) {
        match end {
            Ok(drawn) => {
                assert_eq!(drawn.len(), pictures, "all of them");
                self.drawn += pictures;
            }
            Err(JobError::Full { .. }) => self.refused += pictures,
            Err(JobError::Deadline) => self.late += pictures,
            Err(JobError::OutOfMemory) => self.failed += pictures,
            Err(other) => panic!("{other}"),
        }
    }
}

const MAX_QUEUE: usize = 12;
const MAX_ROWS: usize = 8;

/// What must hold of every turn, whatever came before.
fn check_turn(studio: &TestWorker, did: &[Did]) {
    let waiting = studio.engine.shared.queue().len();
    assert!(waiting <= MAX_QUEUE, "{waiting} wait");
    let rows: usize = studio.worker.slots.iter().map(|slot| slot.trajectory.rows()).sum();
    assert!(rows <= MAX_BUCKETS * MAX_ROWS, "{rows} rows in the making");
    let count = |which: fn(&Did) -> bool| did.iter().filter(|did| which(did)).count();
    assert!(count(|did| matches!(did, Did::Step(_))) <= 1, "one step a turn: {did:?}");
    assert!(count(|did| matches!(did, Did::Decode(_))) <= 1, "one picture a turn: {did:?}");
    for did in did {
        let Did::Step(specs) = did else { continue };
        let rows: usize = specs.iter().map(Spec::rows).sum();
        assert!(rows <= MAX_ROWS, "{did:?}");
    }
}

/// Random jobs by random clients, who stay, leave or are late; then turns until nothing is left.
async fn trace(dice: &mut Dice, capacity: usize) -> Outcomes {
    let mut studio = TestWorker::new(MAX_QUEUE, MAX_ROWS);
    studio.worker.model.capacity = capacity;
    let mut ends = Outcomes::default();
    let mut clients: Vec<(usize, PendingResult)> = Vec::new();
    let mut turns_left = 1000;
    for turn in 0.. {
        for k in 0..if turn < 150 { dice.roll(3) } else { 0 } {
            let specs = vec![dice.spec(10 * turn + k); 1 + dice.roll(3) as usize];
            let pictures = specs.len();
            let soon = Clock::now() + Duration::from_millis(10 * dice.roll(20));
            let deadline = (dice.roll(6) == 0).then_some(soon);
            ends.asked += pictures;
            match studio.try_submit(dice.roll(4), specs, deadline) {
                Ok(ticket) => clients.push((pictures, Box::pin(ticket.wait()))),
                Err(failure) => ends.note(pictures, &Err(failure)),
            }
        }
        let did = studio.turn();
        check_turn(&studio, &did);
        advance(Duration::from_millis(10)).await;
        clients.retain_mut(|(pictures, client)| match client.now_or_never() {
            Some(end) => {
                ends.note(*pictures, &end);
                false
            }
            None if dice.roll(40) == 0 => {
                ends.withdrawn += *pictures;
                false
            }
            None => true,
        });
        if turn >= 150 && studio.idle() {
            break;
        }
        turns_left -= usize::from(turn >= 150);
        assert!(turns_left > 0, "somebody starves: {:?}", studio.engine.shared.queue().len());
    }
    assert!(clients.is_empty(), "{} clients have no answer", clients.len());
    let counted = ["completed", "failed", "cancelled", "rejected"].map(|end| studio.counted(end));
    assert_eq!(counted.iter().sum::<usize>(), ends.asked, "{counted:?} {ends:?}");
    // Of a job that fails or leaves some pictures may have been drawn.
    assert!(counted[0] >= ends.drawn && counted[3] == ends.refused, "{counted:?} {ends:?}");
    assert!(studio.engine.wait_idle().now_or_never().is_some(), "nothing is left to do");
    ends
}

#[tokio::test(start_paused = true)]
async fn every_picture_of_a_random_trace_ends_exactly_once() {
    let mut all = [0; 5];
    for seed in 1..=150_u64 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let ends = trace(&mut dice, [usize::MAX, 3, 5][seed as usize % 3]).await;
        let of_one = [ends.drawn, ends.refused, ends.late, ends.failed, ends.withdrawn];
        assert_eq!(of_one.iter().sum::<usize>(), ends.asked, "seed {seed}: {ends:?}");
        all.iter_mut().zip(of_one).for_each(|(all, one)| *all += one);
    }
    assert!(all.iter().all(|pictures| *pictures > 500), "every end is seen: {all:?}");
}

#[tokio::test]
async fn clients_who_always_wait_get_the_same_work() {
    let mut studio = TestWorker::new(300, 8);
    // One asks for much at once, one for large pictures, one for a picture at a time.
    let large = |seed| Spec { size: square(128), ..spec(seed, 4) };
    let mut held = vec![studio.submit(0, (0..200).map(|_| spec(0, 4)).collect())];
    held.push(studio.submit(1, (0..50).map(|_| large(1)).collect()));
    let mut work = [0_usize; 3];
    let mut modest = studio.submit(2, vec![spec(2, 4)]);
    for _ in 0..200 {
        for did in studio.turn() {
            let Did::Step(specs) = did else { continue };
            for spec in specs {
                work[spec.seed as usize] += spec.size.pixels() * spec.rows();
            }
        }
        if modest.progress().borrow().completed == 4 {
            modest = studio.submit(2, vec![spec(2, 4)]);
        }
    }
    // The third has at most one picture under way, which is all that it asks for.
    assert!(work[2] > 0 && work[0].max(work[1]) < 2 * work[0].min(work[1]), "{work:?}");
}

#[tokio::test]
async fn neither_large_nor_small_pictures_starve() {
    for (common, rare) in [(64, 256), (256, 64)] {
        let mut studio = TestWorker::new(8, 4);
        let sized = |seed, side| Spec { size: square(side), ..spec(seed, 4) };
        let mut held = vec![studio.submit(0, vec![sized(0, common), sized(0, common)])];
        let one = studio.submit(1, vec![sized(1, rare)]);
        let mut turns = 0;
        while one.progress().borrow().completed < 4 {
            while let Ok(ticket) = studio.try_submit(0, vec![sized(0, common)], None) {
                held.push(ticket);
            }
            studio.turn();
            turns += 1;
            // A step of two small rows costs a thirty-second of one of four large rows.
            assert!(turns <= 4 * 33, "{rare} waits for {common}");
        }
    }
}

#[tokio::test]
async fn rows_are_freed_and_taken_at_the_boundary() {
    let mut studio = TestWorker::new(8, 4);
    let leaver = studio.submit(0, vec![spec(1, 100)]);
    let neighbour = studio.submit(0, vec![spec(2, 3)]);
    let next = studio.submit(0, vec![spec(3, 1)]);
    assert_eq!(stepped(&studio.turn()), [1, 2], "four rows are two pictures with guidance");
    drop(leaver);
    assert_eq!(stepped(&studio.turn()), [2, 3], "the next evaluation has another in its place");
    assert_eq!((studio.counted("cancelled"), stepped(&studio.turn())), (1, vec![2]));
    studio.turn();
    assert!(studio.idle());
    assert_eq!(neighbour.wait().await.map(|drawn| drawn.len()), Ok(1));
    assert_eq!(next.wait().await.map(|drawn| drawn.len()), Ok(1));
}

#[tokio::test(start_paused = true)]
async fn deadlines_hold_to_the_moment_for_those_who_draw_and_those_who_wait() {
    let mut studio = TestWorker::new(8, 2);
    let began = Clock::now();
    let at = |seconds| Some(began + Duration::from_secs(seconds));
    let drawing = studio.try_submit(0, vec![spec(1, 100)], at(58)).expect("room");
    let waiting = studio.try_submit(0, vec![spec(2, 1)], at(30)).expect("room");
    let patient = studio.submit(0, vec![spec(3, 1)]);
    assert_eq!(stepped(&studio.turn()), [1]);
    assert_eq!(waiting.wait().await.err(), Some(JobError::Deadline));
    assert_eq!(began.elapsed(), Duration::from_secs(30));
    assert_eq!(stepped(&studio.turn()), [1]);
    assert_eq!(drawing.wait().await.err(), Some(JobError::Deadline));
    assert_eq!(began.elapsed(), Duration::from_secs(58));
    assert_eq!(stepped(&studio.turn()), [3], "the late ones are gone");
    assert_eq!(patient.wait().await.map(|drawn| drawn.len()), Ok(1));
    assert_eq!((studio.counted("cancelled"), studio.counted("completed")), (2, 1));
}

#[tokio::test]
async fn pictures_are_decoded_one_at_a_time_between_steps() {
    let mut studio = TestWorker::new(8, 12);
    let _held = studio.submit(0, [1, 1, 1, 1, 5].map(|steps| spec(steps, steps as usize)).into());
    for turn in 0..4 {
        let did = studio.turn();
        let work: Vec<_> = did.iter().filter(|did| !matches!(did, Did::Begin(_))).collect();
        assert!(matches!(work[..], [Did::Step(_), Did::Decode(1)]), "turn {turn}: {did:?}");
    }
}

#[tokio::test]
async fn a_crowd_of_texts_does_not_hold_up_the_steps() {
    let mut studio = TestWorker::new(64, 64);
    studio.worker.model.reading = Duration::from_millis(2);
    let begun = |did: &[Did]| did.iter().filter(|did| matches!(did, Did::Begin(_))).count();
    let _first = studio.submit(0, vec![spec(0, 50); 4]);
    assert_eq!(begun(&studio.turn()), 4, "nobody is held up: the batch is filled");
    let _crowd = studio.submit(0, vec![spec(1, 50); 20]);
    // A step of this model takes less time than the text of one picture.
    for _ in 0..20 {
        assert_eq!(begun(&studio.turn()), 1);
    }
    assert_eq!(stepped(&studio.turn()).len(), 24);
}

#[tokio::test]
async fn nobody_waits_for_company() {
    let mut studio = TestWorker::new(8, 8);
    let _one = studio.submit(0, vec![spec(1, 4)]);
    assert_eq!(stepped(&studio.turn()), [1]);
    let _two = studio.submit(0, vec![Spec { guidance_scale: 1.0, ..spec(2, 9) }]);
    assert_eq!(stepped(&studio.turn()), [1, 2], "another step count, guidance and start");
}

/// What becomes of one picture of a model that judges, and the turns that it took.
fn judged(
    safety: Safety,
    objects: Option<bool>,
) -> (Result<Vec<GeneratedImage>, JobError>, Vec<Vec<Did>>) {
    let mut studio = TestWorker::with(4, 4, safety);
    studio.worker.model.info.checked = true;
    studio.worker.model.objects = objects;
    let ticket = studio.submit(1, vec![spec(1, 1)]);
    let mut turns = Vec::new();
    while !studio.idle() {
        turns.push(studio.turn());
    }
    (ticket.wait().now_or_never().expect("settled"), turns)
}

#[test]
fn a_picture_is_judged_a_turn_after_it_is_decoded() {
    let mut studio = TestWorker::with(4, 8, Safety::Blur);
    studio.worker.model.info.checked = true;
    studio.worker.model.objects = Some(false);
    let _long = studio.submit(1, vec![spec(9, 6)]);
    let _short = studio.submit(1, vec![spec(1, 1), spec(2, 1)]);
    let mut after = Vec::new();
    while !studio.idle() {
        let did = studio.turn();
        let pictures: Vec<Did> =
            did.into_iter().filter(|did| matches!(did, Did::Decode(_) | Did::Judge)).collect();
        assert!(pictures.len() <= 1, "nobody waits for more between two steps: {pictures:?}");
        after.extend(pictures);
    }
    let (one, two, long) = (Did::Decode(1), Did::Decode(2), Did::Decode(9));
    assert_eq!(after, [one, Did::Judge, two, Did::Judge, long, Did::Judge]);
}

#[test]
fn an_objection_is_flagged_blurred_or_an_error() {
    let original: Vec<u8> = (0..16 * 16 * 3).map(|i| i as u8).collect();
    let one = |judged: Result<Vec<GeneratedImage>, JobError>| judged.expect("drawn").remove(0);
    for safety in [Safety::Flag, Safety::Blur, Safety::Block] {
        let passed = one(judged(safety, Some(false)).0);
        assert_eq!((passed.nsfw, passed.warnings.len()), (Some(false), 0));
        assert_eq!(passed.rgb.data, original);
        let failed = judged(safety, None).0.expect_err("not judged, not shown");
        assert_eq!(failed, JobError::OutOfMemory);
    }
    let flagged = one(judged(Safety::Flag, Some(true)).0);
    assert_eq!((flagged.nsfw, flagged.warnings.len()), (Some(true), 1));
    assert_eq!(flagged.rgb.data, original);
    let blurred = one(judged(Safety::Blur, Some(true)).0);
    assert_eq!(blurred.nsfw, Some(true));
    assert!(blurred.warnings[0].ends_with("it is blurred") && blurred.rgb.data != original);
    let (blocked, turns) = judged(Safety::Block, Some(true));
    assert_eq!(blocked.expect_err("withheld"), JobError::Withheld);
    assert_eq!(turns.len(), 2, "{turns:?}");
}

#[test]
fn a_second_pass_goes_on_among_those_of_its_size() {
    let mut studio = TestWorker::new(4, 8);
    let _large = studio.submit(1, vec![Spec { size: square(128), ..spec(1, 12) }]);
    let _small = studio.submit(2, vec![spec(2, 12)]);
    let grows = Spec { hires: Some(hires(128, 3)), ..spec(3, 2) };
    let ticket = studio.submit(3, vec![grows]);
    let mut company = Vec::new();
    while !studio.idle() {
        let seeds = stepped(&studio.turn());
        company.extend(seeds.contains(&3).then_some(seeds));
    }
    assert_eq!(company, [vec![2, 3], vec![2, 3], vec![1, 3], vec![1, 3], vec![1, 3]]);
    let progress = *ticket.progress().borrow();
    assert_eq!((progress.completed, progress.total), (5, 5), "of both passes");
    assert!(ticket.wait().now_or_never().expect("settled").is_ok());
}

#[test]
fn a_second_pass_that_never_fits_is_refused_at_once() {
    let studio = TestWorker::new(4, 8);
    let mut info = studio.worker.model.info.clone();
    info.memory.decode_bytes = 10;
    let engine = Engine::new(
        &DeviceScheduler::default(),
        studio.engine.shared.settings,
        EngineState::Loading,
    );
    engine.shared.set_state(EngineState::Ready(Arc::new(info)));
    engine.shared.device.set_budget_bytes(10 * 64 * 64);
    let grows = |side| Spec { hires: Some(hires(side, 1)), ..spec(1, 1) };
    assert!(engine.submit(vec![spec(1, 1)]).is_ok());
    assert_eq!(engine.submit(vec![grows(128)]).err(), Some(JobError::OutOfMemory));
    assert!(engine.submit(vec![grows(32)]).is_ok());
}

#[test]
fn an_interrupt_is_answered_with_what_there_is() {
    let mut studio = TestWorker::new(10, 4);
    let ticket = studio.submit(1, vec![spec(1, 9), spec(2, 9), spec(3, 9)]);
    let other = studio.submit(2, vec![spec(4, 3)]);
    assert_eq!(stepped(&studio.turn()), [1, 4]);
    let watch = studio.engine.monitor(&ticket);
    watch.interrupt();
    let did = studio.turn();
    assert!(did.contains(&Did::Decode(1)) && !did.contains(&Did::Begin(2)), "{did:?}");
    let drawn = ticket.wait().now_or_never().expect("it is over").expect("no failure");
    let last_arrival: Vec<_> =
        drawn.iter().map(|drawn| (drawn.index, &drawn.warnings[..])).collect();
    assert_eq!(last_arrival, [(0, &["interrupted after 1 of 9 UNet calls".to_owned()][..])]);
    assert_eq!(studio.counted("cancelled"), 2);
    while !studio.idle() {
        studio.turn();
    }
    let drawn = other.wait().now_or_never().expect("it is over").expect("no failure");
    assert!(drawn[0].warnings.is_empty(), "its neighbour is drawn to the end");
}

/// What is about to be evaluated for the first time is not worth decoding.
#[test]
fn an_interrupted_picture_of_which_there_is_nothing_to_see_is_left_out() {
    let mut studio = TestWorker::new(10, 4);
    let first = studio.submit(1, vec![Spec { size: square(128), ..spec(1, 9) }]);
    studio.turn();
    let ticket = studio.submit(2, vec![spec(2, 9)]);
    studio.engine.monitor(&ticket).interrupt();
    assert!(!studio.turn().contains(&Did::Begin(2)));
    assert_eq!(ticket.wait().now_or_never().map(|drawn| drawn.map(|d| d.len())), Some(Ok(0)));
    assert_eq!(first.progress().borrow().completed, 2);
}

/// A picture that needs a file.
fn adapted(seed: u64, steps: usize) -> Spec {
    Spec { loras: vec![("style".into(), 1.0)], ..spec(seed, steps) }
}

#[test]
fn the_others_step_on_while_a_file_is_read() {
    let mut studio = TestWorker::new(4, 8);
    let file = studio.file();
    let _drawing = studio.submit(1, vec![spec(1, 3)]);
    let ticket = studio.submit(2, vec![adapted(2, 1)]);
    assert_eq!(stepped(&studio.turn()), [1]);
    let _later = studio.submit(3, vec![spec(3, 1)]);
    assert_eq!(stepped(&studio.turn()), [1, 3], "who comes later goes first");
    while !studio.idle() {
        assert!(!studio.turn().contains(&Did::Begin(2)));
    }
    // Nothing is left but to wait, and to draw for those who come.
    let _last = studio.submit(4, vec![spec(4, 1)]);
    assert!(studio.worker.wait());
    assert_eq!(stepped(&studio.turn()), [4]);
    studio.engine.drain();
    drop(file);
    assert!(studio.worker.wait(), "until the file has been read");
    let did = studio.turn();
    assert!(did.contains(&Did::Begin(2)) && stepped(&did) == [2], "{did:?}");
    assert!(ticket.wait().now_or_never().expect("settled").is_ok());
    assert!(!studio.worker.wait(), "all is drawn");
}

#[test]
fn who_waits_for_a_file_has_a_place() {
    let mut studio = TestWorker::new(4, 2);
    let (first, second) = (studio.file(), studio.file());
    let leaves = studio.submit(1, vec![adapted(1, 1)]);
    let _second = studio.submit(2, vec![spec(2, 1)]);
    let _other = studio.submit(3, vec![Spec { size: square(128), ..spec(3, 2) }]);
    assert_eq!(stepped(&studio.turn()), [3], "another size has places of its own");
    studio.engine.monitor(&leaves).interrupt();
    let did = studio.turn();
    assert!(did.contains(&Did::Begin(2)), "the place of one who left is free: {did:?}");
    assert_eq!(leaves.wait().now_or_never().map(|drawn| drawn.map(|d| d.len())), Some(Ok(0)));
    drop((first, second));
    let ticket = studio.submit(4, vec![adapted(4, 1)]);
    while studio.worker.wait() {
        studio.turn();
        studio.engine.drain();
    }
    assert!(ticket.wait().now_or_never().expect("settled").is_ok());
}

#[test]
fn what_a_prompt_takes_counts_for_its_step() {
    let mut studio = TestWorker::new(4, 8);
    studio.worker.model.info.memory.chunk_bytes = 1000;
    studio.engine.shared.device.set_budget_bytes(10_000);
    // Three windows and one: 8000 bytes. One and one: 4000.
    let long = |seed| Spec {
        prompt: "word ".repeat(100),
        prompt_syntax: PromptSyntax::A1111,
        ..spec(seed, 2)
    };
    let _tickets =
        [long(1), long(2), spec(3, 2), spec(4, 2)].map(|spec| studio.submit(spec.seed, vec![spec]));
    let mut company = Vec::new();
    while !studio.idle() {
        company.push(stepped(&studio.turn()));
    }
    company.retain(|seeds| !seeds.is_empty());
    let expected: [&[u64]; 6] = [&[1], &[1], &[2], &[2], &[3, 4], &[3, 4]];
    assert_eq!(company, expected);
}
