//! The built-in model on a CUDA device against the CPU. Without a device every test here says that
//! it is skipped; `SD_TEST_CUDA=required` makes that a failure.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests fail by it and report")]

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use sd_models::{
    AddOns, AssetDir, DeviceName, LoadOptions, LoraUse, Pipeline, Precision, PromptSyntax, Rgb,
    SafetyMode, Sampler, SamplerOptions, SigmaSchedule, Size, Source, Spec, Trajectory, XlOptions,
};
use serde_json::{Value, json};

fn load(device: DeviceName, precision: Precision) -> Pipeline {
    let source = Source::Demo;
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/pictures/loras");
    let loras =
        AssetDir { directory: Some(directory), endings: &["safetensors"], ..AssetDir::default() };
    let add_ons = AddOns { loras, max_lora_bytes: 1 << 28, ..AddOns::default() };
    Pipeline::load(&LoadOptions {
        name: None,
        source,
        device,
        precision,
        safety: SafetyMode::Never,
        threads: None,
        unet: None,
        vae: None,
        add_ons,
    })
    .unwrap()
}

/// The model on the device, or a message why the test is skipped.
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
        warnings: Vec::new(),
        hires: None,
        controls: Vec::new(),
        tiling: false,
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

/// Stable Diffusion v1.4 in its shapes: configurations, a tokenizer, and f16 files of zeros that
/// take no room on the disk.
fn full_size() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stable-diffusion-v1-4");
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shapes = std::fs::read(here.join("tests/fixtures/stable-diffusion-v1-4.json")).unwrap();
    let shapes: Value = serde_json::from_slice(&shapes).unwrap();
    let create = |name: &str| {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::create(path).unwrap()
    };
    for (name, config) in shapes["files"].as_object().unwrap() {
        serde_json::to_writer(create(name), config).unwrap();
    }
    for name in ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"] {
        let bytes = std::fs::read(here.join("demo/tokenizer").join(name)).unwrap();
        create(&format!("tokenizer/{name}")).write_all(&bytes).unwrap();
    }
    for (name, tensors) in shapes["tensors"].as_object().unwrap() {
        let (mut end, mut header) = (0, serde_json::Map::new());
        for (tensor, shape) in tensors.as_object().unwrap() {
            let begin = end;
            end += 2 * shape.as_array().unwrap().iter().flat_map(Value::as_u64).product::<u64>();
            let entry = json!({"dtype": "F16", "shape": shape, "data_offsets": [begin, end]});
            header.insert(tensor.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        let mut file = create(name);
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.set_len(8 + header.len() as u64 + end).unwrap();
    }
    folder
}

/// A full-size image in so many steps, in a process whose emulator computes nothing.
fn full_size_picture(steps: usize) {
    let source = Source::Directory(full_size());
    let (device, precision) = (DeviceName::Cuda(0), Precision::F16);
    let options = LoadOptions {
        name: None,
        source,
        device,
        precision,
        safety: SafetyMode::Never,
        threads: None,
        unet: None,
        vae: None,
        add_ons: AddOns::default(),
    };
    let pipeline = Pipeline::load(&options).unwrap();
    let size = Size::new(512, 512).unwrap();
    let spec = Spec { size, ..spec(Sampler::Dpmpp2m, 20, 7.5) };
    let mut trajectory = pipeline.begin(&spec).unwrap();
    for _ in 0..steps {
        pipeline.step(&mut [&mut trajectory]).unwrap();
    }
    pipeline.decode(&trajectory).unwrap();
}

/// What the emulator counts while a full-size image takes so many steps.
fn counted(steps: usize) -> Value {
    let report = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{steps}-steps.json"));
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_step_takes_few_launches_and_a_picture_little_memory"])
        .env("SD_TEST_STEPS", steps.to_string())
        .env("EMUCUDA_DRY", "1")
        .env("EMUCUDA_REPORT", &report)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
    serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap()
}

#[test]
fn a_step_takes_few_launches_and_a_picture_little_memory() {
    // The process that `counted` starts.
    if let Ok(steps) = std::env::var("SD_TEST_STEPS") {
        return full_size_picture(steps.parse().unwrap());
    }
    if std::env::var_os("EMUCUDA_OUT").is_none() {
        println!("skipped: only the emulator counts");
        return;
    }
    let (few, more) = (counted(4), counted(6));
    let step = |path: &str| {
        let count = |report: &Value| report.pointer(path).and_then(Value::as_u64).unwrap();
        (count(&more) - count(&few)) / 2
    };
    let peak = |report: &Value| report["bytes"]["peak"].as_u64().unwrap();
    println!("{} launches a step, {} bytes at the most", step("/launches"), peak(&more));
    assert!(step("/launches") <= 450, "{} launches a step", step("/launches"));
    assert!(peak(&more) <= 2_791_728_742, "{} bytes at the most", peak(&more));
    assert_eq!(peak(&few), peak(&more), "memory must not grow with the steps");
    assert_eq!(step("/copied/device_to_host"), 0, "a step must not wait for the device");
    assert_eq!(step("/copied/host_to_device"), 0, "a step needs nothing of the host");
}
