//! The built-in model on a CUDA device against the CPU. Without a device every test here says that
//! it is skipped; `SD_TEST_CUDA=required` makes that a failure.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests fail by it and report")]

use sd_models::{
    DeviceName, LoadOptions, Pipeline, Precision, Rgb, Scheduler, Size, Source, Spec, Trajectory,
};

fn load(device: DeviceName, precision: Precision) -> Pipeline {
    let source = Source::Demo;
    Pipeline::load(&LoadOptions { source, device, precision, threads: None }).unwrap()
}

/// The model on the device, or a word on why the test is skipped.
fn on_device(precision: Precision) -> Option<Pipeline> {
    match DeviceName::Cuda(0).open() {
        Ok(_) => Some(load(DeviceName::Cuda(0), precision)),
        Err(error) => {
            let required = std::env::var_os("SD_TEST_CUDA").is_some_and(|v| v == "required");
            assert!(!required, "no CUDA device: {error}");
            println!("skipped: no CUDA device: {error}");
            None
        }
    }
}

fn spec(scheduler: Scheduler, steps: usize, guidance_scale: f64) -> Spec {
    Spec {
        prompt: "a red house by the sea at night".into(),
        negative_prompt: String::new(),
        size: Size::new(64, 64).unwrap(),
        steps,
        guidance_scale,
        scheduler,
        seed: 7,
        start: None,
    }
}

/// The pictures of some specs, stepped together.
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

fn mixed() -> [Spec; 3] {
    [
        spec(Scheduler::Pndm, 2, 7.5),
        spec(Scheduler::EulerAncestral, 3, 1.0),
        spec(Scheduler::Dpmpp2m, 2, 3.0),
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
