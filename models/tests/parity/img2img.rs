//! Image-to-image and inpainting against diffusers' img2img and inpainting pipelines.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use sd_models::{
    AddOns, DeviceName, Error, Img2Img, LoadOptions, MaskedStart, Pipeline, Precision,
    PromptSyntax, Rgb, SafetyMode, Sampler, SamplerName, SamplerOptions, SigmaSchedule, Size,
    Source, Span, Spec, Trajectory, XlOptions,
};

use crate::{fixture, path, relative_error};

const TOLERANCE: f32 = 1e-4;
/// As among the samplers: the times of a Brownian motion have six decimals.
const BROWNIAN: (&str, f32) = ("dpmpp_sde", 2e-2);

pub(crate) fn load(root: PathBuf) -> Pipeline {
    open(Source::Directory(root), None).unwrap()
}

/// The model in a directory, with what requests can add to it.
pub(crate) fn with_add_ons(root: PathBuf, add_ons: AddOns) -> Pipeline {
    Pipeline::load(&LoadOptions { add_ons, ..options(Source::Directory(root)) }).unwrap()
}

pub(crate) fn open(source: Source, vae: Option<Source>) -> sd_models::Result<Pipeline> {
    Pipeline::load(&LoadOptions { vae, ..options(source) })
}

pub(crate) fn options(source: Source) -> LoadOptions {
    LoadOptions {
        name: None,
        source,
        unet: None,
        vae: None,
        device: DeviceName::Cpu,
        precision: Precision::F32,
        safety: SafetyMode::IfPresent,
        threads: Some(1),
        add_ons: AddOns::default(),
    }
}

pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// The model of SD 1.x with another UNet, which was trained for inpainting; each test has its own.
pub(crate) fn inpainting_model(test: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("inpainting-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("v1"), &root);
    std::fs::remove_dir_all(root.join("unet")).unwrap();
    copy(&path("inpaint"), &root);
    root
}

pub(crate) fn bytes(x: &Tensor) -> Vec<u8> {
    x.to_dtype(DType::U8).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn spec(start: Option<Img2Img>) -> Spec {
    Spec {
        prompt: "a red house".into(),
        prompt_syntax: PromptSyntax::Plain,
        negative_prompt: String::new(),
        loras: Vec::new(),
        size: Size::new(64, 64).unwrap(),
        steps: 10,
        guidance_scale: 3.0,
        seed: 11,
        sampler: Sampler::Ddim,
        schedule: SigmaSchedule::Model,
        sampler_options: SamplerOptions::default(),
        img2img: start.map(Arc::new),
        embeds_guidance: false,
        clip_skip: 0,
        guidance_rescale: 0.0,
        variation: None,
        eta_noise_seed_delta: 0,
        xl: XlOptions::default(),
        span: Span::default(),
        refiner: None,
        warnings: Vec::new(),
        hires: None,
        controls: Vec::new(),
        tiling: false,
        vae_tiling: None,
        ip_adapters: Vec::new(),
        enlarge: None,
    }
}

pub(crate) fn finish(model: &Pipeline, mut batch: Vec<Trajectory>) -> Vec<Tensor> {
    while batch.iter().any(|trajectory| !trajectory.done()) {
        model.step(&mut batch.iter_mut().collect::<Vec<_>>()).unwrap();
    }
    batch.iter().map(|trajectory| trajectory.latents().clone()).collect()
}

/// Every case of a fixture whose name begins so, and all of them in one batch.
fn check(file: &str, kind: &str, model: &Pipeline) {
    let (shown, expected) = (fixture("start.safetensors"), fixture(file));
    let picture = || Rgb { width: 64, height: 64, data: bytes(&shown["picture"]) };
    let mask = || ["hole", "told"].contains(&kind).then(|| bytes(&shown["mask"]));
    let mut cases: Vec<_> = expected.keys().filter(|k| k.starts_with(kind)).collect();
    cases.sort_unstable();
    assert!(cases.len() >= 8);
    let specs: Vec<Spec> = cases
        .iter()
        .map(|case| {
            let parts: Vec<_> = case.splitn(3, '.').collect();
            // Some have the number of steps between sampler and strength.
            let (steps, strength) = match parts[2].split_once('.').unwrap() {
                ("0" | "1", _) => (10, parts[2]),
                (steps, strength) => (steps.parse().unwrap(), strength),
            };
            let strength = strength.parse().unwrap();
            let SamplerName { sampler, schedule } = parts[1].parse().unwrap();
            let start = Img2Img {
                picture: picture(),
                strength,
                takes_all_steps: model.info().takes_all_steps(sampler, mask().is_some()),
                mask: mask(),
                masked_start: MaskedStart::Picture,
            };
            let embeds_guidance = model.info().embeds_guidance;
            Spec { sampler, schedule, steps, embeds_guidance, ..spec(Some(start)) }
        })
        .collect();
    let begun = specs.iter().map(|spec| model.begin(spec).unwrap()).collect();
    let drawn = finish(model, begun);
    let mut failures = Vec::new();
    for (case, latents) in cases.iter().zip(&drawn) {
        let error = relative_error(latents, &expected[*case]);
        println!("{case}: {error:.1e}");
        let most = if case.contains(BROWNIAN.0) { BROWNIAN.1 } else { TOLERANCE };
        if error.is_nan() || error > most {
            failures.push(format!("{case}: {error:.1e}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    let alone = finish(model, vec![model.begin(&specs[1]).unwrap()]);
    assert_eq!(relative_error(&alone[0], &drawn[1]), 0.0, "{} alone", cases[1]);
}

#[test]
fn a_picture_begins_as_another_picture() {
    let model = load(path("v1"));
    check("start.safetensors", "image", &model);
    check("start_2.safetensors", "image", &model);
}

#[test]
fn a_part_of_a_picture_is_painted_anew() {
    check("start.safetensors", "hole", &load(path("v1")));
}

#[test]
fn the_pipeline_of_consistency_models_takes_all_steps_at_any_strength() {
    let model = load(crate::lcm::model("img2img"));
    check("start_2.safetensors", "lcm", &model);
    check("start_2.safetensors", "hole", &model);
    let picture = Rgb { width: 64, height: 64, data: vec![0; 64 * 64 * 3] };
    let start = |strength| Img2Img {
        picture: picture.clone(),
        strength,
        takes_all_steps: true,
        mask: None,
        masked_start: MaskedStart::Picture,
    };
    let asked = |steps| Spec { steps, sampler: Sampler::Lcm, ..spec(Some(start(0.1))) };
    assert!(model.check(&asked(5)).is_ok());
    let error = model.check(&asked(6)).unwrap_err().to_string();
    assert_eq!(error, "strength: of 0.1 has room for 5 steps, not for 6");
}

#[test]
fn a_unet_for_inpainting_is_told_what_to_paint() {
    let model = load(inpainting_model("told"));
    check("start.safetensors", "told", &model);
    // Without an input image everything is inpainted.
    let (white, all) = (vec![255; 64 * 64 * 3], Some(vec![255; 64 * 64]));
    let picture = Rgb { width: 64, height: 64, data: white };
    let start = Img2Img {
        picture,
        strength: 1.0,
        takes_all_steps: false,
        mask: all,
        masked_start: MaskedStart::Picture,
    };
    let all = finish(&model, vec![model.begin(&spec(Some(start))).unwrap()]);
    let none = finish(&model, vec![model.begin(&spec(None)).unwrap()]);
    assert_eq!(relative_error(&none[0], &all[0]), 0.0);
}

#[test]
fn what_is_kept_stays_as_it_was() {
    let model = load(path("v1"));
    let picture = |value| Rgb { width: 64, height: 64, data: vec![value; 64 * 64 * 3] };
    let mask = (0..64 * 64).map(|i| if i % 64 < 32 { 255 } else { 0 }).collect();
    let start = Img2Img {
        picture: picture(200),
        strength: 0.8,
        takes_all_steps: false,
        mask: Some(mask),
        masked_start: MaskedStart::Picture,
    };
    let drawn = finish(&model, vec![model.begin(&spec(Some(start.clone()))).unwrap()]);
    let another = Spec { prompt: "a boat".into(), ..spec(Some(start)) };
    let another = finish(&model, vec![model.begin(&another).unwrap()]);
    let half = |x: &Tensor, from| x.narrow(3, from, 4).unwrap();
    assert_eq!(relative_error(&half(&drawn[0], 4), &half(&another[0], 4)), 0.0);
    assert!(relative_error(&half(&drawn[0], 0), &half(&another[0], 0)) > 0.0);
}

#[test]
fn a_start_that_does_not_fit_is_refused_by_name() {
    let model = load(path("v1"));
    let picture = |side| Rgb { width: side, height: side, data: vec![0; side * side * 3] };
    let start = Img2Img {
        picture: picture(64),
        strength: 0.5,
        takes_all_steps: false,
        mask: None,
        masked_start: MaskedStart::Picture,
    };
    let refused = [
        ("image", Img2Img { picture: picture(32), ..start.clone() }),
        ("mask", Img2Img { mask: Some(vec![0; 3]), ..start.clone() }),
        ("strength", Img2Img { strength: f64::NAN, ..start.clone() }),
        ("strength", Img2Img { strength: 0.05, ..start }),
    ];
    for (wrong, start) in refused {
        let error = model.check(&spec(Some(start))).unwrap_err();
        assert!(matches!(error, Error::Spec { field, .. } if field == wrong), "{error}");
    }
}
