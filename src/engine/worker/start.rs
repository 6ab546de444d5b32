//! Before the first image: the model, the memory budget, and the image that warms the device up.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use sd_models::{Defaults, PromptSyntax, SamplerOptions, Size, Span, Spec, XlOptions};
use tracing::{info, warn};

use crate::engine::model::{Model, Trajectory as _};
use crate::engine::shared::EngineShared;

/// Share of the memory free after loading that is the budget; the rest is a reserve.
const BUDGET_PERCENT: u64 = 80;

/// Side of the warm-up image in pixels; small, since only first use matters.
const WARM_UP_SIDE: usize = 128;

/// Loads the model and warms it up.
pub(super) fn open<M: Model>(
    engine: &EngineShared,
    load: &mut impl FnMut() -> anyhow::Result<M>,
) -> anyhow::Result<M> {
    let started = Instant::now();
    let model = load()?;
    let mut time_used = Duration::ZERO;
    let turn = engine.device.acquire(&mut time_used);
    let info = model.info();
    warm_up(&model)?;
    let budget = budget(&model, engine);
    engine.device.set_budget_bytes(budget);
    drop(turn);
    let (size, max_rows) = (info.defaults.size, engine.settings.max_batch_rows as u64);
    let spec = warm_up_params(&info.defaults, size);
    let row_bytes = info.step_bytes(&spec, size).div_ceil(spec.rows() as u64).max(1);
    let (cpu_isa, warning) = sd_models::cpu_isa();
    info!(
        model = info.name,
        device = info.device,
        cpu_isa,
        dtype = info.precision,
        load_ms = started.elapsed().as_millis() as u64,
        memory_budget_bytes = budget,
        max_batch_rows = max_rows.min(budget / row_bytes),
        %size,
        "ready"
    );
    if let Some(warning) = warning {
        warn!("{warning}");
    }
    for warning in &info.warnings {
        warn!(model = info.name, "{warning}");
    }
    for (name, reason) in &info.embeddings.skipped {
        warn!(name, reason, "embedding skipped");
    }
    engine.metrics.model_load.with([]).set(started.elapsed().as_secs_f64());
    Ok(model)
}

/// The memory budget in bytes: the configured one, else a share of the memory that is free when a
/// model was loaded or unloaded. If that is unknown, there is no limit but the device's own.
pub(super) fn budget<M: Model>(model: &M, engine: &EngineShared) -> u64 {
    // Memory retained by the allocator is free, too.
    sd_models::return_freed_memory();
    let share = |free: u64| share_of(free - reserved(model, free));
    engine.settings.memory_budget_bytes.or(model.free_bytes().map(share)).unwrap_or(u64::MAX)
}

/// The part of so many free bytes that the budget is.
pub(super) fn share_of(bytes: u64) -> u64 {
    bytes / 100 * BUDGET_PERCENT
}

/// What of the free memory is kept for the ControlNets, IP-Adapters, LoRAs and upscalers that requests
/// may name: at most half.
fn reserved<M: Model>(model: &M, free: u64) -> u64 {
    let add_ons = &model.info().add_ons;
    let caches = [
        (&add_ons.controlnets, add_ons.max_controlnet_bytes),
        (&add_ons.ip_adapters, add_ons.max_ip_adapter_bytes),
        (&add_ons.loras, add_ons.max_lora_bytes),
        (&add_ons.upscalers, add_ons.max_upscaler_bytes),
    ];
    let named = caches.iter().filter(|(files, _)| files.directory.is_some());
    named.fold(0, |sum: u64, (_, most)| sum.saturating_add(*most)).min(free / 2)
}

/// Generates a small image and drops it: the first image pays for lazy initialization of the
/// device.
pub(super) fn warm_up<M: Model>(model: &M) -> anyhow::Result<()> {
    let defaults = &model.info().defaults;
    let small = Size::new(
        WARM_UP_SIDE.min(defaults.size.width()),
        WARM_UP_SIDE.min(defaults.size.height()),
    );
    let spec = warm_up_params(defaults, small.unwrap_or(defaults.size));
    let generate = || {
        let mut trajectory = model.begin(&spec)?;
        while !trajectory.done() {
            model.step(&mut [&mut trajectory])?;
        }
        model.preview(&trajectory)?;
        let image = loop {
            if let Some(image) = model.decode(&mut trajectory)? {
                break image;
            }
        };
        model.check_safety(&image)
    };
    generate().context("warm-up failed").map(drop)
}

/// The spec of the warm-up image: no prompt, one step.
pub(super) fn warm_up_params(defaults: &Defaults, size: Size) -> Spec {
    Spec {
        prompt: String::new(),
        prompt_syntax: PromptSyntax::Plain,
        negative_prompt: String::new(),
        loras: Vec::new(),
        size,
        steps: 1,
        guidance_scale: defaults.guidance_scale,
        seed: 0,
        sampler: defaults.sampler,
        schedule: defaults.schedule,
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
