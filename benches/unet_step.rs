//! Seconds for one guided UNet step, ours beside candle-transformers' on the same weights.
//!
//!     cargo bench --bench unet_step -- MODEL_DIR [SIZE] [RUNS]
//!
//! MODEL_DIR holds Stable Diffusion v1.x in the diffusers layout; the other network knows no other
//! shape. Prints each median, their ratio, and how far the two predictions lie apart.

#![expect(clippy::print_stdout, reason = "a program that prints a table")]

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::stable_diffusion::StableDiffusionConfig;
use sd_models::Source;
use sd_models::config::UNetConfig;
use sd_models::unet::UNet2DConditionModel;
use sd_models::weights::Weights;

/// A timestep in the middle of the schedule; the time does not depend on it.
const TIMESTEP: f64 = 500.0;

fn main() -> Result<()> {
    // Cargo itself passes `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let usage = "usage: cargo bench --bench unet_step -- MODEL_DIR [SIZE] [RUNS]";
    let Some(directory) = arguments.next().map(PathBuf::from) else {
        println!("{usage}");
        return Ok(());
    };
    let mut number = |default: usize| {
        arguments.next().map_or(Ok(default), |a| a.parse().context(usage))
    };
    let (side, runs) = (number(512)? / 8, number(3)?);
    ensure!(side > 0 && runs > 0, "{usage}");
    sd_models::keep_freed_memory();

    let device = Device::Cpu;
    let source = Source::Directory(directory.clone());
    let weights = Weights::open(&source, "unet", "diffusion_pytorch_model", false)?;
    let config = UNetConfig::read(&source)?;
    let latents = Tensor::randn(0f32, 1f32, (2, config.in_channels, side, side), &device)?;
    let context = Tensor::randn(0f32, 1f32, (2, 77, config.cross_attention_dim), &device)?;

    let model = UNet2DConditionModel::load(config, &weights, &device, DType::F32)?;
    let (ours, prediction) =
        median(runs, || Ok(model.forward(&latents, &[TIMESTEP, TIMESTEP], &context)?))?;
    println!("sd-models f32: {ours:.3} s");
    drop(model);

    let file = directory.join("unet/diffusion_pytorch_model.safetensors");
    let config = StableDiffusionConfig::v1_5(None, Some(side * 8), Some(side * 8));
    let model = config.build_unet(file, &device, 4, false, DType::F32)?;
    let (candle, reference) =
        median(runs, || Ok(model.forward(&latents, TIMESTEP, &context)?))?;
    println!("candle-transformers f32: {candle:.3} s");

    let difference = (prediction - &reference)?.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt();
    let norm = reference.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt();
    println!("ours / candle: {:.3}; relative L2 difference {:.1e}", ours / candle, difference / norm);
    Ok(())
}

/// The median of `runs` calls after one that is not counted, and the last result.
fn median(runs: usize, call: impl Fn() -> Result<Tensor>) -> Result<(f64, Tensor)> {
    let mut result = call()?;
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        result = call()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok((seconds[runs / 2], result))
}
