//! Small models with random weights in f16 on a device against f32 on the CPU: Stable Diffusion XL,
//! its refiner, ControlNets and IP-Adapters. The same runs are those of diffusers in `tests/parity`.

use std::sync::Arc;

use sd_models::files::IpAdapterFile;
use sd_models::networks::IpAdapterModel;
use sd_models::{
    AddOns, AssetDir, Control, ControlRule, DeviceName, IpAdapter, LoadOptions, Pipeline,
    Precision, Preprocessor, Refiner, Rgb, Sampler, Source, Spec,
};

use crate::{difference, draw, fixture, has_device, options, spec};

/// A model with what stands beside it, on a device in f16 and on the CPU in f32.
fn both(model: &str, unet: Option<&str>, add_ons: &AddOns) -> Option<[Pipeline; 2]> {
    let load = |device, precision| {
        let unet = unet.map(|unet| Source::Directory(fixture(unet)));
        let source = Source::Directory(fixture(model));
        let add_ons = add_ons.clone();
        let options = LoadOptions { unet, add_ons, ..options(source, device, precision) };
        Pipeline::load(&options).unwrap()
    };
    has_device()
        .then(|| [load(DeviceName::Cuda(0), Precision::F16), load(DeviceName::Cpu, Precision::F32)])
}

fn with_nets(folder: &str) -> AddOns {
    let controlnets = AssetDir {
        directory: Some(fixture(folder)),
        endings: &["safetensors"],
        folders: true,
        ..AssetDir::default()
    };
    AddOns { controlnets, max_controlnet_bytes: 1 << 24, ..AddOns::default() }
}

fn with_ip_adapters() -> AddOns {
    let ip_adapters = AssetDir {
        directory: Some(fixture("ip")),
        endings: &["safetensors"],
        skipped: IpAdapterFile::ENCODER_FOLDERS,
        ..AssetDir::default()
    };
    AddOns { ip_adapters, max_ip_adapter_bytes: 1 << 24, ..AddOns::default() }
}

/// A picture of stripes.
fn picture() -> Rgb {
    let byte = |i: usize| ((i / 3 % 64) * 4 + (i / 192) * 3 + 85 * (i % 3)) as u8;
    Rgb { width: 64, height: 64, data: (0..3 * 64 * 64).map(byte).collect() }
}

fn control(model: &str, scale: f64, guess: bool) -> Control {
    Control {
        model: model.into(),
        preprocessor: Preprocessor::None,
        picture: Arc::new(picture()),
        hires_picture: None,
        scale,
        start: 0.0,
        end: 1.0,
        rule: ControlRule::Diffusers { guess },
    }
}

/// An adapter by its path without the ending.
fn ip_adapter(path: &str, scale: f64) -> IpAdapter {
    let file = IpAdapterFile { path: fixture(&format!("ip/{path}.safetensors")) };
    let seen = IpAdapterModel::picture(&picture(), IpAdapterModel::side(&file).unwrap());
    IpAdapter {
        model: path.rsplit('/').next().unwrap().to_owned(),
        pictures: vec![Arc::new(seen)],
        scale: scale.into(),
        start: 0.0,
        end: 1.0,
        unit: None,
    }
}

/// Pictures stepped together, and each by itself to the bit.
fn assert_close([device, cpu]: &[Pipeline; 2], specs: &[Spec], allowed: (f64, u8)) {
    let together = draw(device, specs);
    for (k, (ours, reference)) in together.iter().zip(draw(cpu, specs)).enumerate() {
        let (mean, max) = difference(ours, &reference);
        println!("{k}: mean {mean:.4}/255, max {max}/255");
        assert!(mean <= allowed.0 && max <= allowed.1, "mean {mean:.4}/255, max {max}/255");
        let alone = &draw(device, std::slice::from_ref(&specs[k]))[0];
        assert_eq!(difference(ours, alone).1, 0, "alone");
    }
}

/// Rows with different nets or none.
fn steered(nets: [&str; 2]) -> [Spec; 4] {
    let with = |controls: Vec<Control>, base: Spec| Spec { controls, ..base };
    [
        spec(Sampler::Euler, 3, 5.0),
        with(vec![control(nets[0], 1.0, false)], spec(Sampler::Dpmpp2m, 3, 5.0)),
        with(
            vec![control(nets[0], 0.7, false), control(nets[1], 0.5, false)],
            spec(Sampler::EulerAncestral, 3, 1.0),
        ),
        with(vec![control(nets[1], 0.9, true)], spec(Sampler::Euler, 2, 4.0)),
    ]
}

/// Rows with different adapters or none.
fn shown(adapters: [&str; 2]) -> [Spec; 4] {
    let with = |ip_adapters: Vec<IpAdapter>, base: Spec| Spec { ip_adapters, ..base };
    [
        spec(Sampler::Euler, 3, 5.0),
        with(vec![ip_adapter(adapters[0], 1.0)], spec(Sampler::Dpmpp2m, 3, 5.0)),
        with(vec![ip_adapter(adapters[1], 0.6)], spec(Sampler::EulerAncestral, 3, 1.0)),
        with(
            vec![ip_adapter(adapters[0], 0.5), ip_adapter(adapters[1], 0.7)],
            spec(Sampler::Euler, 2, 4.0),
        ),
    ]
}

#[test]
fn pictures_of_xl_with_nets_are_close() {
    let Some(models) = both("xl", None, &with_nets("control/nets-xl")) else { return };
    assert_close(&models, &steered(["full", "small"]), (2.5, 32));
}

#[test]
fn pictures_of_v1_with_nets_are_close() {
    let nets = with_nets("control/nets");
    let Some(models) = both("v1", Some("control/v1"), &nets) else { return };
    assert_close(&models, &steered(["edges", "poses"]), (1.0, 24));
}

#[test]
fn pictures_of_xl_with_ip_adapters_are_close() {
    let Some(models) = both("xl", None, &with_ip_adapters()) else { return };
    let adapters = ["sdxl_models/ip-adapter_sdxl", "sdxl_models/ip-adapter-plus_sdxl_vit-h"];
    assert_close(&models, &shown(adapters), (2.5, 32));
}

#[test]
fn pictures_of_v1_with_ip_adapters_are_close() {
    let Some(models) = both("v1", Some("control/v1"), &with_ip_adapters()) else { return };
    let adapters = ["models/ip-adapter_sd15", "models/ip-adapter-plus_sd15"];
    assert_close(&models, &shown(adapters), (1.0, 24));
}

/// A refiner beside rows that have none.
#[test]
fn pictures_of_xl_with_a_refiner_are_close() {
    let add_ons = AddOns { max_refiner_bytes: u64::MAX, ..AddOns::default() };
    let Some(models) = both("xl", None, &add_ons) else { return };
    let refined = |switch_at, base: Spec| {
        let source = Source::Directory(fixture("xl/refiner"));
        let refiner = Some(Arc::new(Refiner { name: "refiner".into(), source, switch_at }));
        Spec { refiner, ..base }
    };
    let specs = [
        spec(Sampler::Euler, 3, 5.0),
        refined(0.5, spec(Sampler::Euler, 3, 5.0)),
        refined(0.75, spec(Sampler::EulerAncestral, 4, 1.0)),
    ];
    assert_close(&models, &specs, (2.5, 32));
}
