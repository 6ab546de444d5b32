//! Scheduling: the tests call the worker's turns one by one, on their own thread, with a model that
//! only records its calls. Tests with timeouts pause the clock; nothing here sleeps.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, Sender};

use futures_util::FutureExt as _;
use sd_models::{
    AddOns, Chosen, Defaults, Embeddings, Enlarge, Error, Hires, LoraUse, MemoryEstimate,
    ModelInfo, NamedFiles, Pass, PictureUpscaler, PromptSyntax, Rgb, Sampler, SamplerOptions,
    SigmaSchedule, SingleFiles, Size, Span, Spec, Upscaler, XlOptions,
};
use tokio::time::{Instant as Clock, advance};

use super::admit::{MAX_BUCKETS, MAX_READERS};
use super::*;
use crate::engine::{
    Client, DeviceScheduler, Engine, EngineConfig, GeneratedImage, Job, ReadFiles, Safety, Ticket,
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
    /// Bytes that are free.
    free: Option<u64>,
    /// Time to encode a prompt.
    reading: Duration,
    /// One per image with files: reading them ends when the sender is dropped.
    files: RefCell<Vec<Receiver<()>>>,
    /// The result of its safety checker; `None`: an error.
    flags: Option<bool>,
}

/// Steps of a picture that is enlarged, and tiles of one that is decoded in tiles.
const TILES: usize = 3;

struct FakeTrajectory {
    spec: Spec,
    made: usize,
    /// Tiles of it that are decoded.
    decoded: usize,
}

impl Trajectory for FakeTrajectory {
    fn done(&self) -> bool {
        self.made == self.progress().1
    }

    fn progress(&self) -> (usize, usize) {
        let tiles = if self.spec.enlarge.is_some() { TILES } else { 0 };
        (self.made, tiles + self.spec.passes().map(Pass::calls).sum::<usize>())
    }

    fn enlarging(&self) -> bool {
        self.spec.enlarge.is_some()
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

    fn free_bytes(&self) -> Option<u64> {
        self.free
    }

    fn read_files(&self, spec: &Spec) -> Option<ReadFiles> {
        if spec.loras.is_empty() {
            return None;
        }
        let panics = spec.prompt == "panic";
        let gate = self.files.borrow_mut().remove(0);
        Some(Box::new(move || {
            gate.recv().unwrap_or_default();
            assert!(!panics, "as the prompt asks");
            Ok(NamedFiles::default())
        }))
    }

    fn begin(&self, spec: &Spec) -> sd_models::Result<FakeTrajectory> {
        let began = Instant::now();
        while began.elapsed() < self.reading {}
        self.calls.borrow_mut().push(Call::Begin(spec.seed));
        Ok(FakeTrajectory { spec: spec.clone(), made: 0, decoded: 0 })
    }

    fn step(&self, batch: &mut [&mut FakeTrajectory]) -> sd_models::Result<()> {
        let rows: usize = batch.iter().map(|member| member.rows()).sum();
        if rows > self.capacity || batch.iter().any(|member| member.spec.prompt == "too much") {
            return Err(Error::OutOfMemory(format!("{rows} rows")));
        }
        if batch.iter().any(|member| member.spec.prompt == "overflow") {
            let reason = "is of a file whose numbers overflow".into();
            return Err(Error::Spec { field: "loras", reason });
        }
        assert!(batch.iter().all(|member| member.size() == batch[0].size()), "one size a step");
        let specs = batch.iter().map(|member| member.spec.clone()).collect();
        self.calls.borrow_mut().push(Call::Step(specs));
        batch.iter_mut().for_each(|member| member.made += 1);
        Ok(())
    }

    fn decode(&self, trajectory: &mut FakeTrajectory) -> sd_models::Result<Option<Rgb>> {
        assert!(trajectory.made > 0);
        self.calls.borrow_mut().push(Call::Decode(trajectory.spec.seed));
        trajectory.decoded += 1;
        let tiles = if trajectory.spec.vae_tiling == Some(true) { TILES } else { 1 };
        let data = || (0..16 * 16 * 3).map(|i| i as u8).collect();
        Ok((trajectory.decoded == tiles).then(|| Rgb { width: 16, height: 16, data: data() }))
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
        let settings = EngineConfig {
            max_queue,
            max_batch_rows,
            memory_budget_bytes: None,
            vae_tiling: false,
            unload_after: None,
            safety,
        };
        let engine =
            Engine::new(&DeviceScheduler::default(), settings, EngineState::Loading, false);
        let calls = Rc::default();
        let defaults = Defaults {
            size: square(64),
            steps: 4,
            guidance_scale: 7.5,
            inpainting_guidance_scale: 7.5,
            sampler: Sampler::Euler,
            schedule: SigmaSchedule::Model,
            clip_skip: 0,
            guidance_rescale: 0.0,
            eta: None,
            chosen: Chosen::default(),
        };
        let info = ModelInfo {
            name: "recorder".into(),
            fingerprint: String::new(),
            files: SingleFiles::default(),
            unsuited: Vec::new(),
            device: "none".into(),
            precision: "none".into(),
            defaults,
            multiple: 8,
            embeds_guidance: false,
            gives_strength_to_scheduler: false,
            text_layers: 12,
            text_width: 768,
            is_xl: false,
            most_steps: (1000, 50),
            checked: false,
            memory: MemoryEstimate { scale: 8, ..MemoryEstimate::default() },
            add_ons: AddOns::default(),
            embeddings: Embeddings::default(),
            warnings: Vec::new(),
        };
        engine.shared.set_state(EngineState::Ready(Arc::new(info.clone())));
        let (capacity, reading) = (usize::MAX, Duration::ZERO);
        let (log, files, flags) = (Rc::clone(&calls), RefCell::default(), None);
        let free = None;
        let model = RecordingModel { info, calls: log, capacity, free, reading, files, flags };
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
    }
}

/// A hires pass.
fn hires(side: usize, steps: usize) -> Hires {
    Hires {
        size: square(side),
        steps,
        strength: 1.0,
        upscaler: Upscaler::default(),
        prompt: None,
        negative_prompt: None,
        guidance_scale: None,
        sampler: None,
    }
}

/// The seeds that shared the step of a turn.
fn stepped(calls: &[Call]) -> Vec<u64> {
    let steps = calls.iter().filter_map(|call| match call {
        Call::Step(specs) => Some(specs.iter().map(|spec| spec.seed)),
        _ => None,
    });
    steps.flatten().collect()
}

/// The result of a job, polled once per turn.
type PendingResult = Pin<Box<dyn Future<Output = Result<Vec<GeneratedImage>, JobError>>>>;

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

mod finish;
mod loras;
mod properties;
mod share;
mod trace;
