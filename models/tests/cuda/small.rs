//! Small models with random weights in f16 on a device against f32 on the CPU: Stable Diffusion XL and
//! ControlNets. The same runs are those of diffusers in `tests/parity`.

use std::sync::Arc;

use sd_models::{
    AddOns, AssetDir, Control, ControlRule, DeviceName, LoadOptions, Pipeline, Precision,
    Preprocessor, Rgb, Sampler, Source, Spec,
};

use crate::{difference, draw, fixture, has_device, options, spec};

/// A model with nets, on a device in f16 and on the CPU in f32.
fn both(model: &str, unet: Option<&str>, nets: &str) -> Option<[Pipeline; 2]> {
    let load = |device, precision| {
        let controlnets = AssetDir {
            directory: Some(fixture(nets)),
            endings: &["safetensors"],
            folders: true,
            ..AssetDir::default()
        };
        let add_ons = AddOns { controlnets, max_controlnet_bytes: 1 << 24, ..AddOns::default() };
        let unet = unet.map(|unet| Source::Directory(fixture(unet)));
        let source = Source::Directory(fixture(model));
        let options = LoadOptions { unet, add_ons, ..options(source, device, precision) };
        Pipeline::load(&options).unwrap()
    };
    has_device()
        .then(|| [load(DeviceName::Cuda(0), Precision::F16), load(DeviceName::Cpu, Precision::F32)])
}

fn control(model: &str, scale: f64, guess: bool) -> Control {
    let byte = |i: usize| ((i / 3 % 64) * 4 + (i / 192) * 3 + 85 * (i % 3)) as u8;
    let picture = Rgb { width: 64, height: 64, data: (0..3 * 64 * 64).map(byte).collect() };
    Control {
        model: model.into(),
        preprocessor: Preprocessor::None,
        picture: Arc::new(picture),
        hires_picture: None,
        scale,
        start: 0.0,
        end: 1.0,
        rule: ControlRule::Diffusers { guess },
    }
}

/// Pictures of rows with different nets or none, stepped together, and each by itself to the bit.
fn assert_close([device, cpu]: &[Pipeline; 2], nets: [&str; 2], allowed: (f64, u8)) {
    let with = |controls: Vec<Control>, base: Spec| Spec { controls, ..base };
    let specs = [
        spec(Sampler::Euler, 3, 5.0),
        with(vec![control(nets[0], 1.0, false)], spec(Sampler::Dpmpp2m, 3, 5.0)),
        with(
            vec![control(nets[0], 0.7, false), control(nets[1], 0.5, false)],
            spec(Sampler::EulerAncestral, 3, 1.0),
        ),
        with(vec![control(nets[1], 0.9, true)], spec(Sampler::Euler, 2, 4.0)),
    ];
    let together = draw(device, &specs);
    for ((ours, reference), spec) in together.iter().zip(draw(cpu, &specs)).zip(&specs) {
        let (mean, max) = difference(ours, &reference);
        println!("{} nets: mean {mean:.4}/255, max {max}/255", spec.controls.len());
        assert!(mean <= allowed.0 && max <= allowed.1, "mean {mean:.4}/255, max {max}/255");
        let alone = &draw(device, std::slice::from_ref(spec))[0];
        assert_eq!(difference(ours, alone).1, 0, "alone");
    }
}

#[test]
fn pictures_of_xl_with_nets_are_close() {
    let Some(models) = both("xl", None, "control/nets-xl") else { return };
    assert_close(&models, ["full", "small"], (2.5, 32));
}

#[test]
fn pictures_of_v1_with_nets_are_close() {
    let Some(models) = both("v1", Some("control/v1"), "control/nets") else { return };
    assert_close(&models, ["edges", "poses"], (1.0, 24));
}
