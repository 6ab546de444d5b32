//! IP-Adapters with small random weights against diffusers: the tokens of pictures, and whole runs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use sd_models::files::IpAdapterFile;
use sd_models::networks::{EncoderFolder, ImageEncoder, IpAdapterModel, UNetConfig};
use sd_models::{
    AddOns, AssetDir, BlockScale, Control, ControlPasses, ControlRule, Hires, Img2Img, IpAdapter,
    IpScale, MaskedStart, Pipeline, Preprocessor, Rgb, Sampler, Source, Spec, UNetPart, Upscaler,
};
use serde::Deserialize;
use serde_json::Value;

use crate::controlnet::{assert_close, painted, picture};
use crate::img2img::{bytes, copy, finish, spec, with_add_ons};
use crate::{fixture, floats, path, read, relative_error};

const CPU: &Device = &Device::Cpu;

/// The pictures of `ip_fixtures.py`: width, height and what makes them different.
const PICTURES: [(usize, usize, usize); 3] = [(96, 60, 1), (40, 72, 2), (64, 64, 4)];

fn shown(k: usize) -> Rgb {
    let (width, height, k) = PICTURES[k];
    painted(width, height, k)
}

fn unet(folder: &str) -> UNetConfig {
    UNetConfig::read(&Source::Directory(path(folder))).unwrap()
}

/// Pixels of the pictures of a file, along one side, and its adapter.
fn open(path: PathBuf, unet: &UNetConfig) -> sd_models::Result<(usize, IpAdapterModel)> {
    let file = IpAdapterFile { path };
    let folder = EncoderFolder::find(&file)?;
    let encoder = Arc::new(ImageEncoder::read(&folder, (CPU, DType::F32), u64::MAX)?);
    Ok((folder.side(), IpAdapterModel::read(&file, encoder, unet, (CPU, DType::F32))?))
}

#[test]
fn pictures_become_the_tokens_of_diffusers() {
    let expected = fixture("ip/tokens.safetensors");
    let mut found = 0;
    for name in [
        "models/ip-adapter_sd15",
        "models/ip-adapter-plus_sd15",
        "models/ip-adapter-full-face_sd15",
        "sdxl_models/ip-adapter_sdxl",
        "sdxl_models/ip-adapter_sdxl_vit-h",
        "sdxl_models/ip-adapter-plus_sdxl_vit-h",
    ] {
        let unet = unet(if name.contains("xl") { "xl" } else { "control/v1" });
        let (side, adapter) = open(path(&format!("ip/{name}.safetensors")), &unet).unwrap();
        let mut check = |what: &str, tokens: &Tensor| {
            let case = format!("{name}.{what}");
            assert_close(&case, tokens, &expected[&case]);
            found += 1;
        };
        for k in 0..PICTURES.len() {
            let seen = IpAdapterModel::picture(&shown(k), side);
            check(&k.to_string(), &adapter.tokens(Some(&seen)).unwrap());
        }
        check("none", &adapter.tokens(None).unwrap());
    }
    assert_eq!(found, expected.len());
}

#[test]
fn a_pickle_holds_the_same_adapter() {
    let unet = unet("control/v1");
    let tokens = |name: &str| {
        let (side, adapter) = open(path(&format!("ip/models/{name}")), &unet).unwrap();
        let seen = IpAdapterModel::picture(&shown(0), side);
        floats(&adapter.tokens(Some(&seen)).unwrap())
    };
    assert_eq!(tokens("ip-adapter_sd15_pickled.bin"), tokens("ip-adapter_sd15.safetensors"));
}

/// A run of the fixture.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    case: String,
    adapters: Vec<String>,
    pictures: Vec<Vec<usize>>,
    #[serde(default)]
    scale: Option<Value>,
    #[serde(default)]
    net: Option<String>,
    #[serde(default)]
    guess_mode: bool,
    #[serde(default)]
    negative_prompt: String,
    #[serde(default)]
    guidance_scale: Option<f64>,
    #[serde(default)]
    strength: Option<f64>,
}

fn numbers(value: &Value) -> Vec<f64> {
    let list = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
    list.iter().map(|number| number.as_f64().unwrap()).collect()
}

/// A number or a dictionary of diffusers.
fn scale(value: &Value) -> IpScale {
    let Some(parts) = value.as_object() else { return value.as_f64().unwrap().into() };
    let mut blocks = Vec::new();
    for (name, value) in parts {
        let part = match name.as_str() {
            "down" => UNetPart::Down,
            "mid" => UNetPart::Middle,
            _ => UNetPart::Up,
        };
        match value.as_object() {
            None => blocks.push(BlockScale { part, block: None, scales: numbers(value) }),
            Some(own) => blocks.extend(own.iter().map(|(name, value)| {
                let block = name.strip_prefix("block_").unwrap().parse().ok();
                BlockScale { part, block, scales: numbers(value) }
            })),
        }
    }
    IpScale::Blocks(blocks)
}

/// Pixels of an adapter's pictures, along one side.
fn side(name: &str) -> usize {
    let file = IpAdapterFile { path: path(&format!("ip/{name}.safetensors")) };
    IpAdapterModel::side(&file).unwrap()
}

impl Run {
    fn spec(&self, expected: &HashMap<String, Tensor>) -> Spec {
        let adapter = |(k, name): (usize, &String)| IpAdapter {
            model: name.rsplit('/').next().unwrap().to_owned(),
            pictures: self.pictures[k]
                .iter()
                .map(|picture| Arc::new(IpAdapterModel::picture(&shown(*picture), side(name))))
                .collect(),
            scale: match &self.scale {
                None => 1.0.into(),
                Some(Value::Array(each)) => scale(&each[k]),
                Some(one) => scale(one),
            },
            start: 0.0,
            end: 1.0,
            unit: None,
        };
        let control = |model: &String| Control {
            model: model.clone(),
            preprocessor: Preprocessor::None,
            picture: Arc::new(painted(64, 64, 2)),
            hires_picture: None,
            scale: 1.0,
            start: 0.0,
            end: 1.0,
            rule: ControlRule::Diffusers { guess: self.guess_mode },
        };
        let start = self.strength.map(|strength| Img2Img {
            picture: picture(&expected["picture"]),
            strength,
            mask: self.case.starts_with("hole").then(|| bytes(&expected["mask"])),
            masked_start: MaskedStart::Picture,
            takes_all_steps: false,
        });
        Spec {
            steps: 6,
            negative_prompt: self.negative_prompt.clone(),
            guidance_scale: self.guidance_scale.unwrap_or(3.0),
            controls: self.net.iter().map(control).collect(),
            ip_adapters: self.adapters.iter().enumerate().map(adapter).collect(),
            ..spec(start)
        }
    }
}

/// A model with adapters; each test has its own.
fn with_adapters(root: PathBuf) -> Pipeline {
    let ip_adapters = AssetDir {
        directory: Some(path("ip")),
        endings: &["safetensors", "bin"],
        skipped: IpAdapterFile::ENCODER_FOLDERS,
        ..AssetDir::default()
    };
    let controlnets =
        AssetDir { directory: Some(path("control/nets")), folders: true, ..AssetDir::default() };
    with_add_ons(
        root,
        AddOns {
            ip_adapters,
            max_ip_adapter_bytes: 1 << 20,
            controlnets,
            max_controlnet_bytes: 1 << 20,
            ..AddOns::default()
        },
    )
}

fn v1(test: &str) -> Pipeline {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ip-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("v1"), &root);
    std::fs::remove_dir_all(root.join("unet")).unwrap();
    copy(&path("control/v1/unet"), &root.join("unet"));
    with_adapters(root)
}

fn runs(name: &str) -> (Vec<Run>, HashMap<String, Tensor>) {
    let runs = serde_json::from_slice(&read(&format!("ip/runs-{name}.json"))).unwrap();
    (runs, fixture(&format!("ip/runs-{name}.safetensors")))
}

fn alone(model: &Pipeline, spec: &Spec) -> Tensor {
    finish(model, vec![model.begin(spec).unwrap()]).remove(0)
}

/// All runs in one batch, beside images without adapters, and each alone.
fn check(model: &Pipeline, name: &str, of_model: &dyn Fn(Spec) -> Spec) {
    let (runs, expected) = runs(name);
    let specs: Vec<_> = runs.iter().map(|run| of_model(run.spec(&expected))).collect();
    let plain = Spec { ip_adapters: Vec::new(), ..specs[0].clone() };
    let mut all = specs.clone();
    all.insert(1, plain.clone());
    all.push(plain.clone());
    let begun = all.iter().map(|spec| model.begin(spec).unwrap()).collect();
    let mut drawn = finish(model, begun);
    let without = alone(model, &plain);
    for beside in [drawn.remove(1), drawn.pop().unwrap()] {
        assert_eq!(floats(&beside), floats(&without), "an image without adapters, beside others");
    }
    for ((run, spec), latents) in runs.iter().zip(&specs).zip(&drawn) {
        assert_close(&run.case, latents, &expected[&run.case]);
        assert_eq!(floats(&alone(model, spec)), floats(latents), "{} alone", run.case);
        let is_zero = run.case.ends_with(".zero");
        let differs = relative_error(latents, &without) > 1e-3;
        assert_eq!(differs, !is_zero, "{}: the picture counts", run.case);
        assert!(!is_zero || floats(latents) == floats(&without), "of no scale it is not there");
    }
}

#[test]
fn whole_runs_are_those_of_diffusers() {
    check(&v1("runs"), "v1", &|spec| spec);
}

#[test]
fn whole_runs_of_xl_are_those_of_diffusers() {
    let model = with_adapters(path("xl"));
    check(&model, "xl", &|spec| Spec { sampler: Sampler::Euler, ..spec });
}

/// The spec of a run with its adapter changed.
fn changed(case: &str, change: &dyn Fn(&mut IpAdapter)) -> Spec {
    let (runs, expected) = runs("v1");
    let run = runs.iter().find(|run| run.case == case).unwrap();
    let mut spec = run.spec(&expected);
    change(&mut spec.ip_adapters[0]);
    spec
}

#[test]
fn an_adapter_acts_in_its_share_of_the_steps_and_in_its_passes() {
    let model = v1("shares");
    let of = |start, end, unit| {
        let change = move |own: &mut IpAdapter| (own.start, own.end, own.unit) = (start, end, unit);
        changed("text.plus", &change)
    };
    let all = alone(&model, &of(0.0, 1.0, None));
    let late = alone(&model, &of(0.5, 1.0, None));
    let none = alone(&model, &Spec { ip_adapters: Vec::new(), ..of(0.0, 1.0, None) });
    assert!(relative_error(&late, &all) > 1e-3 && relative_error(&late, &none) > 1e-4);
    let idle = model.begin(&of(0.99, 1.0, None)).unwrap();
    let told =
        idle.warnings().iter().any(|told| told.contains("plus_sd15\" has no effect: no step"));
    assert!(told, "{:?}", idle.warnings());
    // In the hires pass it stays, unless a unit is of the base pass alone.
    let hires = Hires {
        size: sd_models::Size::new(96, 80).unwrap(),
        steps: 6,
        strength: 0.5,
        upscaler: Upscaler::default(),
        prompt: None,
        negative_prompt: None,
        guidance_scale: None,
        sampler: None,
    };
    let second = |unit| {
        let spec = Spec { hires: Some(hires.clone()), ..of(0.0, 1.0, unit) };
        alone(&model, &spec)
    };
    let (both, base) = (second(None), second(Some(ControlPasses::Base)));
    let last = second(Some(ControlPasses::Hires));
    assert!(relative_error(&both, &base) > 1e-3 && relative_error(&both, &last) > 1e-3);
    assert_eq!(floats(&both), floats(&second(Some(ControlPasses::Both))));
}

#[test]
fn what_an_adapter_cannot_do_is_refused_by_name() {
    let model = v1("refusals");
    let refusal = |change: &dyn Fn(&mut IpAdapter)| {
        let begun = model.begin(&changed("text.plain", change));
        begun.err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(refusal(&|_| ()), "");
    let blocks = |part, block, scales: &[f64]| {
        IpScale::Blocks(vec![BlockScale { part, block, scales: scales.to_vec() }])
    };
    type Change<'a> = dyn Fn(&mut IpAdapter) + 'a;
    let cases: [(&Change<'_>, &str); 9] = [
        (
            &|a| a.model = "other".into(),
            "known are ip-adapter-full-face_sd15, ip-adapter-plus_sd15",
        ),
        (
            &|a| a.model = "ip-adapter_sdxl".into(),
            "for prompts of 40 channels, the model's have 32",
        ),
        (&|a| a.scale = f64::NAN.into(), "a scale from -10 to 10"),
        (&|a| a.start = 1.0, "a start before its end"),
        (&|a| a.end = 1.5, "a start and an end from 0 to 1"),
        (&|a| a.pictures.clear(), "must have a picture"),
        (&|a| a.pictures = vec![Arc::new(painted(24, 24, 1))], "must have a picture of 28x28"),
        (
            &|a| a.scale = blocks(UNetPart::Up, Some(1), &[1.0; 3]),
            "has 3 scales of up.block_1, which has 2 transformers",
        ),
        (
            &|a| a.scale = blocks(UNetPart::Down, Some(1), &[1.0]),
            "a scale of down.block_1, which is no part",
        ),
    ];
    for (change, words) in cases {
        let error = refusal(change);
        assert!(error.starts_with("ip_adapter: ") && error.contains(words), "{words}: {error}");
    }
}

#[test]
fn files_of_other_kinds_and_encoders_that_do_not_fit_are_refused_by_name() {
    let unet = unet("control/v1");
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("adapters");
    std::fs::create_dir(&folder).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F16, CPU).unwrap();
    let write = |name: &str, tensors: &[(&str, Tensor)]| {
        let file = folder.join(name);
        let tensors = tensors.iter().cloned().collect::<HashMap<_, _>>();
        candle_core::safetensors::save(&tensors, &file).unwrap();
        file
    };
    let keys = ("ip_adapter.1.to_k_ip.weight", zeros(&[8, 32]));
    let plain = [("image_proj.proj.weight", zeros(&[128, 20])), keys.clone()];
    let face_id = [("image_proj.norm.weight", zeros(&[32])), keys.clone()];
    let instant = [("image_proj.proj_in.weight", zeros(&[8, 512])), keys.clone()];
    let odd = [("image_proj.queries", zeros(&[8])), keys];
    for (file, words) in [
        (path("single/vae.safetensors"), "this is a VAE"),
        (path("v1/unet/diffusion_pytorch_model.safetensors"), "this is a UNet alone"),
        (path("control/edges-ldm.safetensors"), "this is a ControlNet; what is wanted is"),
        (write("face.safetensors", &face_id), "this is an IP-Adapter FaceID, which takes"),
        (write("instant.safetensors", &instant), "this is InstantID"),
        (write("odd.safetensors", &odd), "of a kind that is not known"),
        (
            write("lone.safetensors", &plain),
            "needs an image encoder with embeddings of 20 channels",
        ),
    ] {
        let error = open(file.clone(), &unet).err().map(|error| error.to_string());
        let error = error.unwrap_or_default();
        assert!(error.contains(words) && error.lines().count() == 1, "{}: {error}", file.display());
    }
    // One that is there and does not fit is named.
    copy(&path("ip/sdxl_models/image_encoder"), &folder.join("image_encoder"));
    let error = open(folder.join("lone.safetensors"), &unet).err().unwrap().to_string();
    assert!(error.contains("has embeddings of 28 and hidden states of 32"), "{error}");
}
