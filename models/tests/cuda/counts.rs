//! What pictures of full-size models take: counted by the emulator, which computes nothing.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use sd_models::{
    AddOns, AssetDir, Control, ControlRule, DeviceName, LoadOptions, Pipeline, Precision,
    Preprocessor, Rgb, SamplerName, Size, Source, Spec,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{fixture, options, spec};

/// A model in its shapes: configurations, tokenizers, and f16 files of zeros that take no room on the
/// disk. Of its own for each process, since several may count at a time.
fn full_size(name: &str) -> TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let shapes = std::fs::read(fixture(&format!("{name}.json"))).unwrap();
    let shapes: Value = serde_json::from_slice(&shapes).unwrap();
    let create = |name: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::create(path).unwrap()
    };
    for (name, config) in shapes["files"].as_object().unwrap() {
        serde_json::to_writer(create(name), config).unwrap();
    }
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/tokenizer");
    for name in ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"] {
        let bytes = std::fs::read(demo.join(name)).unwrap();
        for tokenizer in ["tokenizer", "tokenizer_2"] {
            create(&format!("{tokenizer}/{name}")).write_all(&bytes).unwrap();
        }
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

/// A picture with guidance: "MODEL SIDE SAMPLER STEPS", and a folder of ControlNets whose net it has.
fn draw(picture: &str) {
    let words: Vec<_> = picture.split(' ').collect();
    let [model, side, sampler, steps, ..] = words[..] else { panic!("{picture}") };
    let side = side.parse().unwrap();
    let nets = words.get(4).map(|name| full_size(name));
    let model = full_size(model);
    let source = Source::Directory(model.path().to_owned());
    let controlnets = AssetDir {
        directory: nets.as_ref().map(|folder| folder.path().to_owned()),
        endings: &["safetensors"],
        folders: true,
        ..AssetDir::default()
    };
    let add_ons = AddOns { controlnets, max_controlnet_bytes: 1 << 32, ..AddOns::default() };
    let options = LoadOptions { add_ons, ..options(source, DeviceName::Cuda(0), Precision::F16) };
    let pipeline = Pipeline::load(&options).unwrap();
    let SamplerName { sampler, .. } = sampler.parse().unwrap();
    let picture = Rgb { width: side, height: side, data: vec![0; 3 * side * side] };
    let control = nets.as_ref().map(|_| Control {
        model: "controlnet".into(),
        preprocessor: Preprocessor::None,
        picture: Arc::new(picture),
        hires_picture: None,
        scale: 1.0,
        start: 0.0,
        end: 1.0,
        rule: ControlRule::Diffusers { guess: false },
    });
    let size = Size::new(side, side).unwrap();
    let controls = control.into_iter().collect();
    let spec = Spec { size, controls, ..spec(sampler, 20, 7.5) };
    let mut trajectory = pipeline.begin(&spec).unwrap();
    pipeline.synchronize().unwrap();
    for _ in 0..steps.parse().unwrap() {
        pipeline.step(&mut [&mut trajectory]).unwrap();
    }
    pipeline.decode(&trajectory).unwrap();
}

/// What the emulator counts while a picture takes so many steps.
fn counted(test: &str, (model, more): (&str, &str), steps: usize) -> Value {
    let picture = format!("{model} {steps} {more}");
    let name = format!("{}.json", picture.trim().replace(' ', "-"));
    let report = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("counts::{test}"), "--nocapture"])
        .env("SD_TEST_PICTURE", picture.trim())
        .env("EMUCUDA_DRY", "1")
        .env("EMUCUDA_REPORT", &report)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap()
}

fn count(report: &Value, path: &str) -> u64 {
    report.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} in {report}"))
}

/// Whether a test has something to count: there is an emulator, and this is not the process that
/// `counted` starts, which draws a picture here.
fn counts() -> bool {
    let picture = std::env::var("SD_TEST_PICTURE");
    if let Ok(picture) = &picture {
        draw(picture);
    }
    let emulated = std::env::var_os("EMUCUDA_OUT").is_some();
    if !emulated {
        println!("skipped: only the emulator counts");
    }
    emulated && picture.is_err()
}

/// A picture's launches a step and bytes at the most are below a limit, and its steps need nothing of
/// the host.
fn assert_counts(test: &str, picture: (&str, &str), limit: (u64, u64)) {
    let (few, more) = (counted(test, picture, 3), counted(test, picture, 5));
    let step = |path: &str| (count(&more, path) - count(&few, path)) / 2;
    let (launches, peak) = (step("/launches"), count(&more, "/bytes/peak"));
    println!("{} {}: {launches} launches a step, {peak} bytes at the most", picture.0, picture.1);
    assert!(launches <= limit.0, "{launches} launches a step");
    assert!(peak <= limit.1, "{peak} bytes at the most");
    assert_eq!(count(&few, "/bytes/peak"), peak, "memory must not grow with the steps");
    assert_eq!(step("/copied/device_to_host"), 0, "a step must not wait for the device");
    assert_eq!(step("/copied/host_to_device"), 0, "a step needs nothing of the host");
    // The host runs ahead by one step, and the pool keeps its memory when the host waits.
    let ahead = count(&more, "/ahead");
    assert_eq!(count(&few, "/ahead"), ahead, "the more steps, the more is queued");
    assert!(ahead <= 2 * launches + 8, "{ahead} launches at once");
    assert_eq!(step("/bytes/released"), 0, "the pool keeps what is freed");
    assert_eq!(count(&more, "/copied/unsynchronized"), 0);
    // candle's kernels would have to be compiled when a server starts.
    let own = ["attention_", "channels_", "convert_", "embed_", "group_norm_", "layer_norm_"];
    let own = [&own[..], &["lerp_", "linear_combination_", "product_", "scaled_sum_"]].concat();
    let kernels = more["kernels"].as_object().unwrap().keys();
    let theirs: Vec<_> = kernels.filter(|name| !own.iter().any(|o| name.starts_with(o))).collect();
    println!("    not our own: {theirs:?}");
    if picture.0.starts_with("stable-diffusion-v1") {
        assert!(theirs.is_empty(), "{theirs:?}");
    }
}

#[test]
fn a_step_takes_few_launches_and_a_picture_little_memory() {
    let test = "a_step_takes_few_launches_and_a_picture_little_memory";
    let limit = (450, 2_791_728_742);
    if !counts() {
        return;
    }
    for sampler in ["dpmpp_2m", "euler_a", "dpmpp_sde"] {
        let picture = format!("stable-diffusion-v1-4 512 {sampler}");
        assert_counts(test, (&picture, ""), limit);
    }
}

#[test]
fn a_step_of_xl_takes_few_launches_and_a_picture_little_memory() {
    let test = "a_step_of_xl_takes_few_launches_and_a_picture_little_memory";
    if counts() {
        assert_counts(test, ("stable-diffusion-xl 1024 dpmpp_2m", ""), (930, 9 << 30));
    }
}

#[test]
fn a_step_with_a_controlnet_takes_half_as_many_launches_again() {
    let test = "a_step_with_a_controlnet_takes_half_as_many_launches_again";
    let picture = ("stable-diffusion-v1-4 512 dpmpp_2m", "stable-diffusion-xl");
    if counts() {
        assert_counts(test, picture, (680, 4 << 30));
    }
}
