//! Seconds for one guided UNet step, one VAE decode and loading.
//!
//!     cargo bench --bench networks -- MODEL_DIR [SIZE] [f32|bf16] [RUNS] [--candle]
//!
//! Medians after two warm-up calls, one before a single run. `--candle` also times candle-transformers' UNet with the same
//! weights; it supports the shapes of Stable Diffusion v1.x only.

#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::stable_diffusion::StableDiffusionConfig;
use sd_models::networks::{Conditioning, Decoder, UNet2DConditionModel, UNetConfig, VaeConfig};
use sd_models::{Precision, Source};

const USAGE: &str =
    "usage: cargo bench --bench networks -- MODEL_DIR [SIZE] [f32|bf16] [RUNS] [--candle]";
/// A timestep in the middle of the schedule; the time does not depend on it.
const TIMESTEP: f64 = 500.0;
const STEM: &str = "diffusion_pytorch_model";

fn main() -> Result<()> {
    // Cargo itself passes `--bench`.
    let (flags, words): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|word| word.starts_with("--"));
    let Some(directory) = words.first().map(PathBuf::from) else {
        println!("{USAGE}");
        return Ok(());
    };
    let word = |i: usize, default: &str| words.get(i).map_or(default.to_owned(), String::clone);
    let size: usize = word(1, "512").parse().context(USAGE)?;
    let precision: Precision = word(2, "f32").parse().map_err(anyhow::Error::msg)?;
    let runs: usize = word(3, "3").parse().context(USAGE)?;
    ensure!(size >= 8 && runs > 0, USAGE);
    sd_models::keep_freed_memory();

    let device = Device::Cpu;
    let dtype = precision.resolve(&device)?;
    let source = Source::Directory(directory.clone());
    let began = Instant::now();
    let unet = UNet2DConditionModel::load(
        UNetConfig::read(&source)?,
        &source.weights("unet", STEM, false)?,
        &device,
        dtype,
    )?;
    let vae = Decoder::load(
        VaeConfig::read(&source)?,
        &source.weights("vae", STEM, false)?,
        &device,
        dtype,
    )?;
    let load = began.elapsed().as_secs_f64();
    let side = size / vae.config().scale();
    let latents = Tensor::randn(0f32, 1f32, (2, unet.config().in_channels, side, side), &device)?;
    let context = Tensor::randn(0f32, 1f32, (2, 77, unet.config().cross_attention_dim), &device)?;
    // Computed once for all steps of an image, so not timed.
    let conditioning = conditioning(&unet, &context, size)?;
    let times = unet.time_embeddings(&[TIMESTEP, TIMESTEP], &[])?;
    let (step, prediction) =
        median(runs, || Ok(unet.forward(&latents, &times, &conditioning, &[])?))?;
    let one = latents.narrow(0, 0, 1)?;
    let (decode, _) = median(runs, || Ok(vae.forward(&one)?))?;
    println!(
        "sd-server {precision} {size}px unet_step_s {step:.4} vae_decode_s {decode:.4} \
         load_s {load:.2} peak_mib {}",
        peak_mib().unwrap_or_default()
    );
    if flags.iter().any(|flag| flag == "--candle") {
        drop((unet, vae));
        let (candle, reference) = candle_unet(&directory, size, runs, &latents, &context)?;
        println!(
            "candle-transformers f32 {size}px unet_step_s {candle:.3}; ours / candle {:.3}, \
             relative L2 difference {:.1e}",
            step / candle,
            norm(&(prediction - &reference)?)? / norm(&reference)?
        );
    }
    Ok(())
}

/// The conditioning of two rows, for Stable Diffusion XL with a pooled prompt and the sizes of an image
/// that is not cropped.
fn conditioning(
    unet: &UNet2DConditionModel,
    context: &Tensor,
    size: usize,
) -> Result<Vec<Conditioning>> {
    let row = |row: usize| -> Result<Conditioning> {
        let own = unet.condition(&context.narrow(0, row, 1)?, &[])?;
        let Some(added) = unet.config().added else { return Ok(own) };
        let side = size as f64;
        let sizes = [side, side, 0.0, 0.0, side, side];
        let width = added.inputs - sizes.len() * added.size_width;
        let pooled = Tensor::randn(0f32, 1f32, (1, width), context.device())?;
        Ok(unet.add(own, &pooled, &sizes, &[])?)
    };
    Ok(Conditioning::stack(&[&row(0)?, &row(1)?])?)
}

/// candle-transformers with the same weights: seconds and prediction.
fn candle_unet(
    directory: &Path,
    size: usize,
    runs: usize,
    latents: &Tensor,
    context: &Tensor,
) -> Result<(f64, Tensor)> {
    let file = directory.join("unet").join(format!("{STEM}.safetensors"));
    let config = StableDiffusionConfig::v1_5(None, Some(size), Some(size));
    let model = config.build_unet(file, &Device::Cpu, 4, false, DType::F32)?;
    median(runs, || Ok(model.forward(latents, TIMESTEP, context)?))
}

fn norm(x: &Tensor) -> Result<f32> {
    Ok(x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt())
}

/// The median of `runs` calls after those that warm up, and the last result.
fn median(runs: usize, call: impl Fn() -> Result<Tensor>) -> Result<(f64, Tensor)> {
    let mut result = call()?;
    for _ in 1..runs.min(2) {
        result = call()?;
    }
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        result = call()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok((seconds[runs / 2], result))
}

/// Peak resident memory of the process in MiB, if the system reports it.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}
