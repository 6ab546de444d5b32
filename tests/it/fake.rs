//! A model that draws nothing: it waits, remembers who shared a step, and fails on command. The
//! prompts `panic`, `out of memory` and `device lost` say how.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sd_models::{
    AddOns, Chosen, Defaults, Embeddings, Error, MemoryEstimate, ModelInfo, Pass, PromptSyntax,
    Result, Rgb, Sampler, SamplerOptions, SigmaSchedule, SingleFiles, Size, Span, Spec, XlOptions,
};
use sd_server::engine::{Model, Trajectory};
use sd_server::request::Limits;
use sd_server::{engine, http};

/// Seeds of the pictures in each step, in the order of the steps.
pub(crate) type Steps = Arc<Mutex<Vec<Vec<u64>>>>;

pub(crate) struct Fake {
    pub(crate) info: ModelInfo,
    /// Rows for which there is memory.
    pub(crate) capacity: usize,
    /// How long a step takes.
    pub(crate) pace: Duration,
    /// Whether prompts make it fail.
    pub(crate) obeys_prompts: bool,
    steps: Steps,
    /// A step waits for one of these; when the sender is gone steps are free.
    permits: Receiver<()>,
}

pub(crate) struct FakeTrajectory {
    spec: Spec,
    made: usize,
}

/// The hands that hold a fake.
pub(crate) struct Strings {
    pub(crate) steps: Steps,
    pub(crate) permits: Sender<()>,
}

impl Strings {
    /// Lets one step happen and waits until it has.
    pub(crate) fn step(&self) {
        let before = self.count();
        self.permits.send(()).expect("the model lives");
        wait_until(|| self.count() > before);
    }

    pub(crate) fn count(&self) -> usize {
        self.steps.lock().expect("unpoisoned").len()
    }

    pub(crate) fn last(&self) -> Vec<u64> {
        self.steps.lock().expect("unpoisoned").last().cloned().unwrap_or_default()
    }
}

pub(crate) fn wait_until(mut condition: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("this should have happened by now");
}

impl Fake {
    pub(crate) fn new() -> (Self, Strings) {
        let (permits, permitted) = mpsc::channel();
        let steps = Steps::default();
        let defaults = Defaults {
            size: Size::new(64, 64).expect("multiples of 8"),
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
            name: "fake".into(),
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
        let (capacity, pace, obeys_prompts) = (usize::MAX, Duration::ZERO, true);
        let made = Arc::clone(&steps);
        let fake = Self { info, capacity, pace, obeys_prompts, steps: made, permits: permitted };
        (fake, Strings { steps, permits })
    }
}

impl Model for Fake {
    type Trajectory = FakeTrajectory;

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn begin(&self, spec: &Spec) -> Result<FakeTrajectory> {
        Ok(FakeTrajectory { spec: spec.clone(), made: 0 })
    }

    fn step(&self, batch: &mut [&mut FakeTrajectory]) -> Result<()> {
        let warming = batch.iter().all(|member| member.spec.prompt.is_empty());
        let rows: usize = batch.iter().map(|member| member.spec.rows()).sum();
        if rows > self.capacity {
            return Err(Error::OutOfMemory(format!("{rows} rows")));
        }
        if !warming {
            let _ = self.permits.recv();
            std::thread::sleep(self.pace);
            let seeds = batch.iter().map(|member| member.spec.seed).collect();
            self.steps.lock().expect("unpoisoned").push(seeds);
        }
        assert!(batch.windows(2).all(|pair| pair[0].size() == pair[1].size()));
        for member in batch.iter().filter(|_| self.obeys_prompts) {
            match member.spec.prompt.as_str() {
                "panic" => panic!("as the prompt asked"),
                "out of memory" => return Err(Error::OutOfMemory("1 GiB".into())),
                "device lost" => return Err(Error::DeviceLost("it fell down".into())),
                _ => {}
            }
        }
        batch.iter_mut().for_each(|member| member.made += 1);
        Ok(())
    }

    fn preview(&self, _: &FakeTrajectory) -> Result<Option<Rgb>> {
        Ok(Some(Rgb { width: 8, height: 8, data: vec![9; 8 * 8 * 3] }))
    }

    fn text_tokens(&self, text: &str) -> usize {
        text.split_whitespace().count()
    }

    fn decode(&self, trajectory: &mut FakeTrajectory) -> Result<Option<Rgb>> {
        let size = trajectory.spec.final_size();
        let data = vec![trajectory.spec.seed as u8; size.pixels() * 3];
        Ok(Some(Rgb { width: size.width(), height: size.height(), data }))
    }
}

impl Trajectory for FakeTrajectory {
    fn done(&self) -> bool {
        self.made >= self.progress().1
    }

    fn progress(&self) -> (usize, usize) {
        (self.made, self.spec.passes().map(Pass::calls).sum())
    }

    fn rows(&self) -> usize {
        self.spec.rows()
    }

    fn size(&self) -> Size {
        let first = self.spec.passes().next().is_some_and(|pass| self.made < pass.calls());
        if first { self.spec.size } else { self.spec.final_size() }
    }

    fn warnings(&self) -> &[String] {
        &self.spec.warnings
    }
}

/// A picture to order: its seed tells it apart from others.
pub(crate) fn spec(seed: u64, steps: usize) -> Spec {
    Spec {
        prompt: "a cat".into(),
        prompt_syntax: PromptSyntax::Plain,
        loras: Vec::new(),
        negative_prompt: String::new(),
        size: Size::new(64, 64).expect("multiples of 8"),
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

pub(crate) const ENGINE: engine::EngineConfig = engine::EngineConfig {
    max_queue: 4,
    max_batch_rows: 4,
    memory_budget_bytes: None,
    vae_tiling: false,
    unload_after: None,
    safety: engine::Safety::Blur,
};

pub(crate) const HTTP: http::HttpConfig = http::HttpConfig {
    limits: Limits {
        max_pixels: 1 << 20,
        max_steps: 150,
        max_images: 8,
        max_prompt_bytes: 1000,
        max_input_pixels: 1 << 20,
        max_loras: 2,
        max_controlnets: 2,
    },
    max_body_bytes: 100_000,
    max_decoded_bytes: 64 << 20,
    max_requests: 16,
    max_requests_per_client: None,
    max_body_bytes_in_flight: 1_000_000,
    request_timeout: Duration::from_secs(30),
    stream_timeout: Duration::from_secs(60),
    data_dir: None,
    max_jobs: 4,
    max_jobs_per_client: None,
    max_job_bytes: 1 << 20,
    job_timeout: Duration::from_secs(60),
    job_retention: Duration::from_secs(60),
    webhook_hosts: Vec::new(),
    webhook_secret: None,
    url_retention: Duration::from_secs(60),
    max_url_bytes: 1 << 20,
    idle_timeout: Duration::from_secs(75),
    body_timeout: Duration::from_secs(10),
    write_timeout: Duration::from_secs(10),
    max_connections: 64,
    max_connections_per_address: None,
    log_prompts: false,
    access: ACCESS,
};

pub(crate) const ACCESS: http::AccessConfig = http::AccessConfig {
    api_keys: Vec::new(),
    lock_invocations: false,
    cors_origins: Vec::new(),
    public_url: None,
    allowed_hosts: Vec::new(),
    trusted_proxies: http::TrustedProxies::LOOPBACK,
};

/// A server that these keys open.
pub(crate) fn keyed(keys: &[&str]) -> http::HttpConfig {
    let api_keys = keys.iter().map(|key| key.parse().expect("a key")).collect();
    http::HttpConfig { access: http::AccessConfig { api_keys, ..ACCESS }, ..HTTP }
}
