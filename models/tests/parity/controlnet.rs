//! ControlNets with small random weights against diffusers: what they add, and whole runs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use sd_models::files::ControlNetFile;
use sd_models::networks::{
    ControlBatch, ControlNetModel, Residuals, UNet2DConditionModel, UNetConfig,
};
use sd_models::{
    AddOns, AssetDir, Control, ControlMode, ControlPasses, ControlRule, DeviceName, Extension,
    Hires, Img2Img, LoadOptions, MaskedStart, Pipeline, Precision, Preprocessor, Rgb, SafetyMode,
    SamplerName, Size, Source, Spec, Upscaler,
};
use serde::Deserialize;
use serde_json::Value;

use crate::img2img::{copy, finish, spec};
use crate::{fixture, floats, path, read, relative_error};

const TOLERANCE: f32 = 1e-4;
const CPU: &Device = &Device::Cpu;

pub(crate) fn assert_close(what: &str, ours: &Tensor, reference: &Tensor) {
    let error = relative_error(ours, reference);
    println!("{what}: {error:.1e}");
    assert!(error <= TOLERANCE, "{what}: {error:.1e}");
}

pub(crate) fn picture(x: &Tensor) -> Rgb {
    let (height, width, _) = x.dims3().unwrap();
    let data = x.to_dtype(DType::U8).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    Rgb { width, height, data }
}

fn unet(name: &str) -> UNet2DConditionModel {
    let source = Source::Directory(path(&format!("control/{name}")));
    let weights = source.weights("unet", "diffusion_pytorch_model", false).unwrap();
    let config = UNetConfig::read(&source).unwrap();
    UNet2DConditionModel::load(config, &weights, CPU, DType::F32).unwrap()
}

fn net(file: &str, unet: &UNet2DConditionModel) -> sd_models::Result<ControlNetModel> {
    let file = ControlNetFile::Path(path(&format!("control/{file}")));
    ControlNetModel::read(&file, (unet.config(), 8), (CPU, DType::F32), u64::MAX)
}

/// (B, H, W, C) -> (B, C, H, W)
fn channels_first(x: &Tensor) -> Tensor {
    x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap()
}

#[test]
fn a_net_adds_what_it_adds_in_diffusers() {
    let expected = fixture("control/modules.safetensors");
    for (name, model) in [("edges", "v1"), ("poses", "v1"), ("shuffle", "v1"), ("second", "v2")] {
        let unet = unet(model);
        let net = net(&format!("nets/{name}"), &unet).unwrap();
        let timesteps = floats(&expected[&format!("{name}.timesteps")]);
        let timesteps: Vec<f64> = timesteps.into_iter().map(f64::from).collect();
        let row = unet.condition(&expected[&format!("{name}.context")], &[]).unwrap();
        let conditioning = [net.condition(&row).unwrap()];
        let times = net.time_embeddings(&timesteps).unwrap();
        let sizes = if name == "edges" { &["8x8", "5x6"][..] } else { &["5x6"] };
        for size in sizes {
            let case = format!("{name}.{size}");
            let latents = &expected[&format!("{case}.latents")];
            let hint = net.hint(&picture(&expected[&format!("{case}.picture")])).unwrap();
            let hints = hint.repeat((3, 1, 1, 1)).unwrap();
            let count = net.config().residuals();
            let pools = net.config().global_pool_conditions;
            let mut last = Vec::new();
            for mode in ["plain", "guess"] {
                let factor = |i: usize| match mode == "guess" && !pools {
                    true => 0.7 * 10_f64.powf(i as f64 / (count - 1) as f64 - 1.0),
                    false => 0.7,
                };
                let scales: Vec<f64> = (0..count).map(factor).collect();
                let batch = ControlBatch {
                    latents,
                    hints: &hints,
                    time_embeddings: &times,
                    conditioning: &conditioning,
                    scales: &[&scales[..]; 3],
                };
                last = net.forward(&batch).unwrap();
                assert_eq!(last.len(), count);
                for (i, ours) in last.iter().enumerate() {
                    let what = format!("{case}.{mode}.{i}");
                    assert_close(&what, &channels_first(ours), &expected[&what]);
                }
            }
            let rows = (0..3).map(|k| vec![(0, k)]).collect();
            let residuals = Residuals { calls: vec![last], rows };
            let times = unet.time_embeddings(&timesteps, &[]).unwrap();
            let row = std::slice::from_ref(&row);
            let ours = unet.forward_controlled(latents, &times, row, &[], &residuals).unwrap();
            assert_close(&case, &ours, &expected[&format!("{case}.output")]);
        }
    }
}

#[test]
fn files_of_all_names_hold_the_same_net() {
    let unet = unet("v1");
    let hint = |net: &ControlNetModel| {
        let data = (0..64 * 64 * 3).map(|i| (i % 251) as u8).collect();
        floats(&net.hint(&Rgb { width: 64, height: 64, data }).unwrap())
    };
    // Of the way up nothing is used.
    let shape = |net: &ControlNetModel| UNetConfig {
        up_cross_attention: Vec::new(),
        up_depths: Vec::new(),
        sample_size: 0,
        ..net.config().unet.clone()
    };
    let whole = net("nets/edges", &unet).unwrap();
    let original = net("edges-ldm.safetensors", &unet).unwrap();
    assert_eq!(shape(&original), shape(&whole));
    assert_eq!(hint(&original), hint(&whole));
    // diffusers' names without a configuration.
    let folder = tempfile::tempdir().unwrap();
    let from = path("control/nets/edges/diffusion_pytorch_model.safetensors");
    let lone = folder.path().join("edges.safetensors");
    std::fs::copy(from, &lone).unwrap();
    let read = |file: &Path| {
        let file = ControlNetFile::Path(file.to_owned());
        ControlNetModel::read(&file, (unet.config(), 8), (CPU, DType::F32), u64::MAX)
    };
    let lone = read(&lone).unwrap();
    assert_eq!(shape(&lone), shape(&whole));
    assert_eq!(lone.config().hint_channels, whole.config().hint_channels);
    assert!(lone.name() == "edges" && whole.name() == "edges" && original.name() == "edges-ldm");
    // Of another UNet, and no net at all.
    let refusals = [
        // By the configuration beside it.
        (path("v1/vae/diffusion_pytorch_model.safetensors"), "\"AutoencoderKL\" is not supported"),
        (path("single/vae.safetensors"), "this is a VAE"),
        (path("single/v1.safetensors"), "a checkpoint of a whole model"),
        (path("v1/unet/diffusion_pytorch_model.safetensors"), "\"UNet2DConditionModel\" is not"),
    ];
    for (file, words) in refusals {
        let error = read(&file).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(words), "{}: {error}", file.display());
    }
    let wider = UNetConfig::read(&Source::Directory(path("v1"))).unwrap();
    let file = ControlNetFile::Path(path("control/nets/edges"));
    let read = ControlNetModel::read(&file, (&wider, 8), (CPU, DType::F32), u64::MAX);
    let error = read.err().unwrap().to_string();
    assert!(error.contains("block_out_channels is [8, 16], the UNet's [8, 16, 24, 24]"), "{error}");
    let read = ControlNetModel::read(&file, (unet.config(), 8), (CPU, DType::F32), 1000);
    let error = read.err().unwrap().to_string();
    assert!(error.contains("at most 1000 are allowed (--max-controlnet-bytes)"), "{error}");
}

/// A model with nets.
pub(crate) fn with_nets(root: PathBuf, nets: &str) -> Pipeline {
    let controlnets = AssetDir {
        directory: Some(path(nets)),
        endings: &["safetensors"],
        folders: true,
        ..AssetDir::default()
    };
    let add_ons = AddOns { controlnets, max_controlnet_bytes: 1 << 20, ..AddOns::default() };
    Pipeline::load(&LoadOptions {
        name: None,
        source: Source::Directory(root),
        unet: None,
        vae: None,
        device: DeviceName::Cpu,
        precision: Precision::F32,
        safety: SafetyMode::IfPresent,
        threads: Some(1),
        add_ons,
    })
    .unwrap()
}

/// The model of SD 1.x with a UNet that the nets fit, and the nets; each test has its own.
fn model(test: &str, unet: &Path, scheduler: Option<(&str, &str)>) -> Pipeline {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("controlnet-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("v1"), &root);
    std::fs::remove_dir_all(root.join("unet")).unwrap();
    copy(unet, &root.join("unet"));
    if let Some((key, value)) = scheduler {
        let file = root.join("scheduler/scheduler_config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        config[key] = value.into();
        std::fs::write(file, config.to_string()).unwrap();
    }
    with_nets(root, "control/nets")
}

/// The picture that `control_fixtures.py` paints, in whole numbers only.
pub(crate) fn painted(width: usize, height: usize, k: usize) -> Rgb {
    let byte = |i: usize| {
        let (x, y, channel) = (i / 3 % width, i / 3 / width, i % 3);
        let shapes = 255 * x * (k % 3) / width + 255 * y * (2 - k % 3) / height + 85 * channel * k;
        let grain = (x * x * 3 + x * y * 7 + y * y * 5 + 11 * channel) % (1 + 40 * k);
        ((shapes + grain) % 256) as u8
    };
    Rgb { width, height, data: (0..3 * width * height).map(byte).collect() }
}

/// A run of the fixture.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    case: String,
    model: String,
    sampler: String,
    nets: Vec<String>,
    #[serde(default)]
    controlnet_conditioning_scale: Option<OneOrEach>,
    #[serde(default)]
    control_guidance_start: Option<OneOrEach>,
    #[serde(default)]
    control_guidance_end: Option<OneOrEach>,
    #[serde(default)]
    guess_mode: bool,
    #[serde(default)]
    guidance_scale: Option<f64>,
    #[serde(default)]
    strength: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrEach {
    One(f64),
    Each(Vec<f64>),
}

impl OneOrEach {
    pub(crate) fn of(value: &Option<Self>, k: usize, default: f64) -> f64 {
        match value {
            None => default,
            Some(Self::One(value)) => *value,
            Some(Self::Each(values)) => values[k],
        }
    }
}

impl Run {
    /// Text with the net `edges`.
    fn of_edges() -> Self {
        Self {
            case: "text".into(),
            model: "v1".into(),
            sampler: "ddim".into(),
            nets: vec!["edges".into()],
            controlnet_conditioning_scale: None,
            control_guidance_start: None,
            control_guidance_end: None,
            guess_mode: false,
            guidance_scale: None,
            strength: None,
        }
    }

    fn spec(&self, expected: &HashMap<String, Tensor>) -> Spec {
        let control = |(k, model): (usize, &String)| Control {
            model: model.clone(),
            preprocessor: Preprocessor::None,
            picture: Arc::new(painted(64, 64, k + 2)),
            hires_picture: None,
            scale: OneOrEach::of(&self.controlnet_conditioning_scale, k, 1.0),
            start: OneOrEach::of(&self.control_guidance_start, k, 0.0),
            end: OneOrEach::of(&self.control_guidance_end, k, 1.0),
            // Asked for once it holds for all.
            rule: ControlRule::Diffusers { guess: self.guess_mode && k == 0 },
        };
        let kind = self.case.split('.').next().unwrap();
        let has_mask = ["hole", "told"].contains(&kind);
        let mask = || expected["mask"].to_dtype(DType::U8).unwrap().flatten_all().unwrap();
        let start = (kind != "text").then(|| Img2Img {
            picture: picture(&expected["picture"]),
            strength: self.strength.unwrap(),
            mask: has_mask.then(|| mask().to_vec1().unwrap()),
            masked_start: MaskedStart::Picture,
            takes_all_steps: false,
        });
        let SamplerName { sampler, schedule } = self.sampler.parse().unwrap();
        Spec {
            sampler,
            schedule,
            guidance_scale: self.guidance_scale.unwrap_or(3.0),
            controls: self.nets.iter().enumerate().map(control).collect(),
            ..spec(start)
        }
    }
}

#[test]
fn whole_runs_are_those_of_diffusers() {
    let expected = fixture("control/runs.safetensors");
    let runs: Vec<Run> = serde_json::from_slice(&read("control/runs.json")).unwrap();
    let velocity = Some(("prediction_type", "v_prediction"));
    let models = [
        ("v1", model("v1", &path("control/v1/unet"), None)),
        ("v2", model("v2", &path("control/v2/unet"), velocity)),
        ("told", model("told", &path("inpaint/unet"), None)),
    ];
    let mut drawn_runs = 0;
    for (name, model) in &models {
        let is_own = |run: &&Run| match run.case.starts_with("told") {
            true => *name == "told",
            false => *name == run.model,
        };
        let own: Vec<_> = runs.iter().filter(is_own).collect();
        // All of them in one batch, beside images without nets.
        let specs: Vec<_> = own.iter().map(|run| run.spec(&expected)).collect();
        let plain = Spec { controls: Vec::new(), ..specs[0].clone() };
        let mut all = specs.clone();
        all.insert(1, plain.clone());
        all.push(plain.clone());
        let begun = all.iter().map(|spec| model.begin(spec).unwrap()).collect();
        let mut drawn = finish(model, begun);
        let alone = |spec: &Spec| finish(model, vec![model.begin(spec).unwrap()]).remove(0);
        let without = alone(&plain);
        for beside in [drawn.remove(1), drawn.pop().unwrap()] {
            assert_eq!(floats(&beside), floats(&without), "an image without nets, beside others");
        }
        for ((run, spec), latents) in own.iter().zip(&specs).zip(&drawn) {
            assert_close(&run.case, latents, &expected[&run.case]);
            assert_eq!(floats(&alone(spec)), floats(latents), "{} alone", run.case);
            drawn_runs += 1;
        }
        assert!(relative_error(&drawn[0], &without) > 0.01, "{name}: the net steers");
    }
    assert_eq!(drawn_runs, runs.len());
}

#[test]
fn in_images_that_tile_a_nets_own_convolutions_do_not_wrap() {
    let expected = fixture("control/tiling.safetensors");
    let model = model("tiling", &path("control/v1/unet"), None);
    for name in ["ddim", "euler_a"] {
        let run = Run { sampler: name.into(), ..Run::of_edges() };
        let tiled = Spec { tiling: true, ..run.spec(&HashMap::new()) };
        let plain = Spec { tiling: false, ..tiled.clone() };
        let begun = [&tiled, &plain].map(|spec| model.begin(spec).unwrap());
        let drawn = finish(&model, begun.into());
        assert_close(name, &drawn[0], &expected[name]);
        assert!(relative_error(&drawn[0], &drawn[1]) > 1e-2);
    }
}

/// The run of an image with the net `edges` by the extension's rule, and without.
fn extended(model: &Pipeline, rule: Extension, hires: Option<Hires>) -> Tensor {
    let mut spec = Run::of_edges().spec(&HashMap::new());
    spec.controls[0].rule = ControlRule::Extension(rule);
    let large = hires.as_ref().map(|hires| painted(hires.size.width(), hires.size.height(), 2));
    spec.controls[0].hires_picture = large.map(Arc::new);
    spec.hires = hires;
    finish(model, vec![model.begin(&spec).unwrap()]).remove(0)
}

#[test]
fn modes_of_the_extension_are_factors_of_layers_and_rows() {
    let model = model("extension", &path("control/v1/unet"), None);
    let of = |mode| extended(&model, Extension { mode, ..Extension::default() }, None);
    let layers = |layers: Vec<f64>, mode| {
        let rule = Extension { layers: Some(layers), mode, ..Extension::default() };
        extended(&model, rule, None)
    };
    // Of five residuals: three skips of the first level, one of the second, and the middle.
    let soft: Vec<f64> = (0..5).map(|i| 0.825_f64.powi(12 - i)).collect();
    let same = |a: &Tensor, b: &Tensor| assert!(relative_error(a, b) < 1e-5);
    same(&of(ControlMode::Balanced), &layers(vec![1.0; 5], ControlMode::Balanced));
    same(&of(ControlMode::Prompt), &layers(soft.clone(), ControlMode::Balanced));
    same(&of(ControlMode::Control), &layers(soft.clone(), ControlMode::Control));
    let differ = |a: &Tensor, b: &Tensor| assert!(relative_error(a, b) > 1e-4);
    differ(&of(ControlMode::Balanced), &of(ControlMode::Prompt));
    differ(&of(ControlMode::Prompt), &of(ControlMode::Control));
    // In the hires pass, lines of one pixel are softened.
    let size = Size::new(96, 80).unwrap();
    let hires = Hires {
        size,
        steps: 8,
        strength: 0.5,
        upscaler: Upscaler::default(),
        prompt: None,
        negative_prompt: None,
        guidance_scale: None,
        sampler: None,
    };
    let second = |rule: Extension| extended(&model, rule, Some(hires.clone()));
    let base = second(Extension { passes: ControlPasses::Base, ..Extension::default() });
    let both = second(Extension::default());
    let softened = second(Extension { is_soft_in_hires: true, ..Extension::default() });
    let only = second(Extension { passes: ControlPasses::Hires, ..Extension::default() });
    for (a, b) in [(&base, &both), (&both, &softened), (&base, &only), (&both, &only)] {
        differ(a, b);
    }
}

#[test]
fn what_a_net_cannot_do_is_refused_by_name() {
    let model = model("refusals", &path("control/v1/unet"), None);
    let run = |change: &dyn Fn(&mut Control)| {
        let picture = Arc::new(painted(64, 64, 2));
        let mut control = Control {
            model: "edges".into(),
            preprocessor: Preprocessor::None,
            picture,
            hires_picture: None,
            scale: 1.0,
            start: 0.0,
            end: 1.0,
            rule: ControlRule::Diffusers { guess: false },
        };
        change(&mut control);
        let spec = Spec { controls: vec![control], ..spec(None) };
        model.begin(&spec).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(run(&|_| ()), "");
    let small = Arc::new(painted(32, 64, 2));
    type Change<'a> = dyn Fn(&mut Control) + 'a;
    let cases: [(&Change<'_>, &str); 7] = [
        (&|c| c.model = "lines".into(), "known are edges, poses, second, shuffle"),
        (&|c| c.scale = f64::NAN, "a scale from -10 to 10"),
        (&|c| c.start = 1.0, "a start before its end"),
        (&|c| c.end = 1.5, "a start and an end from 0 to 1"),
        (&|c| c.picture = Arc::clone(&small), "must have a picture of 64x64"),
        (&|c| c.hires_picture = Some(Arc::clone(&small)), "must have a picture"),
        (
            &|c| {
                let layers = Some(vec![1.0; 13]);
                c.rule = ControlRule::Extension(Extension { layers, ..Extension::default() });
            },
            "names \"edges\", which takes 5 advanced weights, not 13",
        ),
    ];
    for (change, words) in cases {
        let error = run(change);
        assert!(error.starts_with("controlnets: ") && error.contains(words), "{words}: {error}");
    }
}

/// A spec with the net of the fixtures whose control is changed.
fn changed(change: impl Fn(&mut Control)) -> Spec {
    let mut control = Control {
        model: "edges".into(),
        preprocessor: Preprocessor::None,
        picture: Arc::new(painted(64, 64, 2)),
        hires_picture: None,
        scale: 1.0,
        start: 0.0,
        end: 1.0,
        rule: ControlRule::Extension(Extension::default()),
    };
    change(&mut control);
    Spec { controls: vec![control], ..spec(None) }
}

#[test]
fn a_net_that_acts_at_no_step_is_told() {
    let model = model("idle", &path("control/v1/unet"), None);
    let told = |start| {
        let trajectory = model.begin(&changed(|control| control.start = start)).unwrap();
        trajectory.warnings().iter().any(|warning| warning.contains("\"edges\" has no effect"))
    };
    assert!(told(0.99) && !told(0.0));
}

#[test]
fn an_image_that_overflows_with_a_net_names_it() {
    let model = model("overflow", &path("control/v1/unet"), None);
    let spec = changed(|control| {
        let layers = Some(vec![1e38; 5]);
        control.rule = ControlRule::Extension(Extension { layers, ..Extension::default() });
    });
    let mut trajectory = model.begin(&spec).unwrap();
    while !trajectory.done() {
        model.step(&mut [&mut trajectory]).unwrap();
    }
    let error = model.decode(&trajectory).unwrap_err().to_string();
    assert!(error.starts_with("controlnets: ") && error.contains("edges make NaN"), "{error}");
}
