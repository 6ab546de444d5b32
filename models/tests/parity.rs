//! Each part of the mathematics against what diffusers and transformers compute, on the files
//! that `make_fixtures.py` wrote.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests fail by it and report")]

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

#[path = "parity/controlnet.rs"]
mod controlnet;
#[path = "parity/controlnet_xl.rs"]
mod controlnet_xl;
#[path = "parity/editing.rs"]
mod editing;
#[path = "parity/emphasis.rs"]
mod emphasis;
#[path = "parity/few_steps.rs"]
mod few_steps;
#[path = "parity/forms.rs"]
mod forms;
#[path = "parity/hires.rs"]
mod hires;
#[path = "parity/img2img.rs"]
mod img2img;
#[path = "parity/inversion.rs"]
mod inversion;
#[path = "parity/ip_adapter.rs"]
mod ip_adapter;
#[path = "parity/knobs.rs"]
mod knobs;
#[path = "parity/lcm.rs"]
mod lcm;
#[path = "parity/lora.rs"]
mod lora;
#[path = "parity/lora_methods.rs"]
mod lora_methods;
#[path = "parity/lora_refusals.rs"]
mod lora_refusals;
#[path = "parity/networks.rs"]
mod networks;
#[path = "parity/noise.rs"]
mod noise;
#[path = "parity/preprocess.rs"]
mod preprocess;
#[path = "parity/quantized.rs"]
mod quantized;
#[path = "parity/refiner.rs"]
mod refiner;
#[path = "parity/safety.rs"]
mod safety;
#[path = "parity/sampler.rs"]
mod sampler;
#[path = "parity/schedules.rs"]
mod schedules;
#[path = "parity/second.rs"]
mod second;
#[path = "parity/single.rs"]
mod single;
#[path = "parity/tiling.rs"]
mod tiling;
#[path = "parity/tokenizer.rs"]
mod tokenizer;
#[path = "parity/upscalers.rs"]
mod upscalers;
#[path = "parity/vae_tiles.rs"]
mod vae_tiles;
#[path = "parity/xl.rs"]
mod xl;

/// The path of a fixture.
fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The tensors of a fixture by name.
fn fixture(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load_buffer(&read(name), &Device::Cpu).unwrap()
}

fn floats(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// The largest difference over the largest magnitude of the reference.
fn relative_error(ours: &Tensor, reference: &Tensor) -> f32 {
    assert_eq!(ours.dims(), reference.dims());
    let largest = |x: &Tensor| {
        let values = floats(x);
        if values.iter().any(|x| x.is_nan()) {
            return f32::NAN;
        }
        values.iter().fold(0_f32, |max, x| max.max(x.abs()))
    };
    largest(&(ours - reference).unwrap()) / largest(reference)
}
