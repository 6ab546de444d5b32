//! ControlNets of Stable Diffusion XL: whole runs of a small model against diffusers.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use sd_models::files::ControlNetFile;
use sd_models::networks::{ControlNetModel, UNetConfig};
use sd_models::{
    Control, ControlRule, Img2Img, MaskedStart, Preprocessor, Sampler, Source, Spec, XlOptions,
};
use serde::Deserialize;

use crate::controlnet::{OneOrEach, assert_close, painted, picture, with_nets};
use crate::img2img::{finish, spec};
use crate::{fixture, floats, path, read};

/// A run of the fixture.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    case: String,
    nets: Vec<String>,
    #[serde(default)]
    controlnet_conditioning_scale: Option<OneOrEach>,
    #[serde(default)]
    control_guidance_end: Option<OneOrEach>,
    #[serde(default)]
    guess_mode: bool,
    #[serde(default)]
    negative_prompt: String,
    #[serde(default)]
    original_size: Option<[usize; 2]>,
    #[serde(default)]
    crops_coords_top_left: [usize; 2],
    #[serde(default)]
    strength: Option<f64>,
}

impl Run {
    fn spec(&self, expected: &HashMap<String, Tensor>) -> Spec {
        let control = |(k, model): (usize, &String)| Control {
            model: model.clone(),
            preprocessor: Preprocessor::None,
            picture: Arc::new(painted(64, 64, k + 2)),
            hires_picture: None,
            scale: OneOrEach::of(&self.controlnet_conditioning_scale, k, 1.0),
            start: 0.0,
            end: OneOrEach::of(&self.control_guidance_end, k, 1.0),
            rule: ControlRule::Diffusers { guess: self.guess_mode },
        };
        let mask = || picture_bytes(&expected["mask"]);
        let start = self.strength.map(|strength| Img2Img {
            picture: picture(&expected["picture"]),
            strength,
            mask: self.case.starts_with("hole").then(mask),
            masked_start: MaskedStart::Picture,
            takes_all_steps: false,
        });
        Spec {
            steps: 5,
            sampler: Sampler::Euler,
            negative_prompt: self.negative_prompt.clone(),
            xl: XlOptions {
                original_size: self.original_size,
                crop: self.crops_coords_top_left,
                ..XlOptions::default()
            },
            controls: self.nets.iter().enumerate().map(control).collect(),
            ..spec(start)
        }
    }
}

fn picture_bytes(x: &Tensor) -> Vec<u8> {
    x.to_dtype(DType::U8).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn whole_runs_of_xl_are_those_of_diffusers() {
    let expected = fixture("control/runs-xl.safetensors");
    let runs: Vec<Run> = serde_json::from_slice(&read("control/runs-xl.json")).unwrap();
    let model = with_nets(path("xl"), "control/nets-xl");
    let specs: Vec<_> = runs.iter().map(|run| run.spec(&expected)).collect();
    let plain = Spec { controls: Vec::new(), ..specs[0].clone() };
    let mut all = specs.clone();
    all.insert(1, plain.clone());
    let begun = all.iter().map(|spec| model.begin(spec).unwrap()).collect();
    let mut drawn = finish(&model, begun);
    let alone = |spec: &Spec| finish(&model, vec![model.begin(spec).unwrap()]).remove(0);
    assert_eq!(floats(&drawn.remove(1)), floats(&alone(&plain)), "an image without nets");
    for ((run, spec), latents) in runs.iter().zip(&specs).zip(&drawn) {
        assert_close(&run.case, latents, &expected[&run.case]);
        assert_eq!(floats(&alone(spec)), floats(latents), "{} alone", run.case);
    }
}

#[test]
fn nets_of_xl_and_of_others_are_told_apart() {
    let unet = |root: &str| UNetConfig::read(&Source::Directory(path(root))).unwrap();
    let read = |file: &str, unet: &UNetConfig| {
        let file = ControlNetFile::Path(path(file));
        ControlNetModel::read(&file, (unet, 8), (&Device::Cpu, DType::F32), u64::MAX)
    };
    let xl = unet("xl");
    for name in ["full", "small"] {
        let whole = read(&format!("control/nets-xl/{name}"), &xl).unwrap();
        // Without its configuration.
        let folder = tempfile::tempdir().unwrap();
        let lone = folder.path().join("net.safetensors");
        let weights = format!("control/nets-xl/{name}/diffusion_pytorch_model.safetensors");
        std::fs::copy(path(&weights), &lone).unwrap();
        let file = ControlNetFile::Path(lone);
        let place = (&Device::Cpu, DType::F32);
        let lone = ControlNetModel::read(&file, (&xl, 8), place, u64::MAX).unwrap();
        let shape = |net: &ControlNetModel| UNetConfig {
            up_cross_attention: Vec::new(),
            up_depths: Vec::new(),
            sample_size: 0,
            // Of transformers, which the small one has none of.
            mid_depth: 1,
            use_linear_projection: true,
            ..net.config().unet.clone()
        };
        assert_eq!(shape(&lone), shape(&whole), "{name}");
    }
    let mut like = xl.clone();
    like.added = None;
    let error = read("control/nets-xl/full", &like).err().unwrap().to_string();
    assert!(error.contains("pooled prompts and sizes of Stable Diffusion XL"), "{error}");
}
