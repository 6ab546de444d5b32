//! Models on a CUDA device: the built-in one and small ones with random weights against the CPU, and
//! what pictures of full-size ones take. Without a device every test here says that it is skipped;
//! `SD_TEST_CUDA=required` makes that a failure.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests fail by it and report")]

mod counts; // launches, copies and memory of full-size pictures, on the emulator
mod demo; // the built-in model
mod small; // Stable Diffusion XL and ControlNets

use std::path::{Path, PathBuf};

use sd_models::{
    AddOns, DeviceName, LoadOptions, Pipeline, Precision, PromptSyntax, Rgb, SafetyMode, Sampler,
    SamplerOptions, SigmaSchedule, Size, Source, Span, Spec, Trajectory, XlOptions,
};

/// Whether there is a device, or a message why the test is skipped.
fn has_device() -> bool {
    let opened = DeviceName::Cuda(0).open();
    if let Err(error) = &opened {
        let required = std::env::var_os("SD_TEST_CUDA").is_some_and(|v| v == "required");
        assert!(!required, "no CUDA device: {error}");
        println!("skipped: no CUDA device: {error}");
    }
    opened.is_ok()
}

fn options(source: Source, device: DeviceName, precision: Precision) -> LoadOptions {
    LoadOptions {
        name: None,
        source,
        device,
        precision,
        safety: SafetyMode::Never,
        threads: None,
        unet: None,
        vae: None,
        add_ons: AddOns::default(),
    }
}

/// A path of the fixtures.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn spec(sampler: Sampler, steps: usize, guidance_scale: f64) -> Spec {
    Spec {
        prompt: "a red house by the sea at night".into(),
        negative_prompt: String::new(),
        loras: Vec::new(),
        size: Size::new(64, 64).unwrap(),
        steps,
        guidance_scale,
        sampler,
        schedule: SigmaSchedule::Model,
        sampler_options: SamplerOptions::default(),
        seed: 7,
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
        prompt_syntax: PromptSyntax::Plain,
    }
}

/// The images of some specs, stepped together.
fn draw(pipeline: &Pipeline, specs: &[Spec]) -> Vec<Rgb> {
    let mut under_way: Vec<_> = specs.iter().map(|spec| pipeline.begin(spec).unwrap()).collect();
    while !under_way.iter().all(Trajectory::done) {
        pipeline.step(&mut under_way.iter_mut().collect::<Vec<_>>()).unwrap();
    }
    under_way.iter().map(|trajectory| pipeline.decode(trajectory).unwrap()).collect()
}

/// Mean and maximum of the differences of bytes.
fn difference(a: &Rgb, b: &Rgb) -> (f64, u8) {
    assert_eq!((a.width, a.height), (b.width, b.height));
    let each = || a.data.iter().zip(&b.data).map(|(a, b)| a.abs_diff(*b));
    (each().map(f64::from).sum::<f64>() / a.data.len() as f64, each().max().unwrap())
}
