//! The built-in model on a device against the CPU.

use std::path::Path;

use sd_models::{
    AddOns, AssetDir, DeviceName, LoadOptions, LoraUse, Pipeline, Precision, Sampler, Source, Spec,
};

use crate::{difference, draw, has_device, options, spec};

fn load(device: DeviceName, precision: Precision) -> Pipeline {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/pictures/loras");
    let loras =
        AssetDir { directory: Some(directory), endings: &["safetensors"], ..AssetDir::default() };
    let add_ons = AddOns { loras, max_lora_bytes: 1 << 28, ..AddOns::default() };
    Pipeline::load(&LoadOptions { add_ons, ..options(Source::Demo, device, precision) }).unwrap()
}

/// The model on the device, if there is one.
fn on_device(precision: Precision) -> Option<Pipeline> {
    has_device().then(|| load(DeviceName::Cuda(0), precision))
}

fn mixed() -> [Spec; 3] {
    [
        spec(Sampler::Pndm, 2, 7.5),
        spec(Sampler::EulerAncestral, 3, 1.0),
        spec(Sampler::Dpmpp2m, 2, 3.0),
    ]
}

#[test]
fn pictures_in_f32_are_those_of_the_cpu() {
    let Some(device) = on_device(Precision::F32) else { return };
    let cpu = load(DeviceName::Cpu, Precision::F32);
    for (ours, reference) in draw(&device, &mixed()).iter().zip(draw(&cpu, &mixed())) {
        let (mean, max) = difference(ours, &reference);
        println!("f32: mean {mean:.4}/255, max {max}/255");
        assert!(max <= 2, "mean {mean:.4}/255, max {max}/255");
    }
}

#[test]
fn pictures_in_f16_are_close() {
    let Some(device) = on_device(Precision::F16) else { return };
    let cpu = load(DeviceName::Cpu, Precision::F32);
    for (ours, reference) in draw(&device, &mixed()).iter().zip(draw(&cpu, &mixed())) {
        let (mean, max) = difference(ours, &reference);
        println!("f16: mean {mean:.4}/255, max {max}/255");
        assert!(mean <= 1.0 && max <= 24, "mean {mean:.4}/255, max {max}/255");
    }
}

#[test]
fn a_picture_does_not_depend_on_its_neighbours() {
    let Some(device) = on_device(Precision::F16) else { return };
    let specs = mixed();
    for (together, spec) in draw(&device, &specs).iter().zip(&specs) {
        let (mean, max) = difference(together, &draw(&device, std::slice::from_ref(spec))[0]);
        println!("alone: mean {mean:.4}/255, max {max}/255");
        assert!(max <= 2, "mean {mean:.4}/255, max {max}/255");
    }
}

#[test]
fn rows_with_loras_are_those_of_the_cpu_beside_rows_without() {
    let Some(device) = on_device(Precision::F16) else { return };
    let cpu = load(DeviceName::Cpu, Precision::F32);
    let with = |loras: &[(&str, f64)], spec: &Spec| Spec {
        loras: loras.iter().map(|(name, scale)| LoraUse::new(*name, *scale)).collect(),
        ..spec.clone()
    };
    let specs = mixed();
    let specs = [
        with(&[("everywhere", 0.8)], &specs[0]),
        specs[1].clone(),
        with(&[("attention", 1.0), ("everywhere", -0.3)], &specs[2]),
    ];
    let together = draw(&device, &specs);
    for ((ours, reference), spec) in together.iter().zip(draw(&cpu, &specs)).zip(&specs) {
        let (mean, max) = difference(ours, &reference);
        println!("LoRAs in f16: mean {mean:.4}/255, max {max}/255");
        assert!(mean <= 1.0 && max <= 24, "mean {mean:.4}/255, max {max}/255");
        let alone = difference(ours, &draw(&device, std::slice::from_ref(spec))[0]);
        println!("alone: mean {:.4}/255, max {}/255", alone.0, alone.1);
        assert!(alone.1 <= 2, "alone: {alone:?}");
    }
}
