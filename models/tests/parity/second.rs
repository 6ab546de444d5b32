//! Stable Diffusion 2.x as single files: whole pictures against diffusers' pipelines.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use sd_models::{Checkpoint, Img2Img, MaskedStart, Pipeline, Rgb, Source, Spec};

use crate::img2img::{copy, open, spec};
use crate::{fixture, path, relative_error};

const TOLERANCE: f32 = 1e-4;

fn bytes(x: &Tensor) -> Vec<u8> {
    x.to_dtype(DType::U8).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A checkpoint of these UNet tensors and the text encoder, with the original code's configuration
/// beside it if there is one, and of the networks what no shape of such small ones tells.
fn model(name: &str, unet: HashMap<String, Tensor>, unet_config: &str, yaml: &str) -> Pipeline {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("second-{name}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("v2/tokenizer"), &root.join("tokenizer"));
    for (from, to) in [(unet_config, "unet"), ("second/text_encoder/config.json", "text_encoder")] {
        std::fs::create_dir_all(root.join(to)).unwrap();
        std::fs::copy(path(from), root.join(to).join("config.json")).unwrap();
    }
    if !yaml.is_empty() {
        std::fs::write(root.join("model.yaml"), yaml).unwrap();
    }
    let mut tensors = fixture("second/text.safetensors");
    let is_unet = |(name, _): &(String, Tensor)| name.starts_with("model.diffusion_model.");
    tensors.extend(unet.into_iter().filter(is_unet));
    let file = root.join("model.safetensors");
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let checkpoint = |file| Source::Checkpoint(Checkpoint { file, vocabulary: None });
    let vae = checkpoint(path("single/vae.safetensors"));
    open(checkpoint(file), Some(vae)).unwrap()
}

fn check(name: &str, model: &Pipeline, asked: &Spec) {
    let expected = fixture("second/expected.safetensors");
    assert_eq!(model.info().defaults.sampler, asked.sampler, "{name}: the file's own sampler");
    let mut trajectory = model.begin(asked).unwrap();
    while !trajectory.done() {
        model.step(&mut [&mut trajectory]).unwrap();
    }
    let error = relative_error(trajectory.latents(), &expected[&format!("{name}.latent")]);
    println!("{name}: {error:.1e}");
    assert!(error <= TOLERANCE, "{name}: {error:.1e}");
    let drawn = model.decode(&trajectory).unwrap().data;
    // (1, 3, H, W) -> (H, W, 3)
    let picture = expected[&format!("{name}.pt")].squeeze(0).unwrap();
    let picture = bytes(&picture.permute((1, 2, 0)).unwrap().contiguous().unwrap());
    let most = drawn.iter().zip(&picture).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(drawn.len() == picture.len() && most <= 1, "{name}: {most} of 255");
}

#[test]
fn base_and_velocity_are_told_by_the_file_beside_the_checkpoint() {
    let unet = || fixture("single/v2.safetensors");
    let config = "v2/unet/config.json";
    let params = |more: &str| format!("model:\n  params:\n    timesteps: 1000\n{more}");
    let velocity = params("    parameterization: v\n");
    check("base", &model("base", unet(), config, &params("")), &spec(None));
    check("velocity", &model("velocity", unet(), config, &velocity), &spec(None));
    // As diffusers takes a checkpoint of 2.x that says nothing.
    check("velocity", &model("silent", unet(), config, ""), &spec(None));
}

#[test]
fn nine_input_channels_inpaint_by_epsilon() {
    let unet = fixture("second/inpainting.safetensors");
    let model = model("inpainting", unet, "second/unet/config.json", "");
    let shown = fixture("start.safetensors");
    let start = Img2Img {
        picture: Rgb { width: 64, height: 64, data: bytes(&shown["picture"]) },
        strength: 0.8,
        takes_all_steps: false,
        mask: Some(bytes(&shown["mask"])),
        masked_start: MaskedStart::Picture,
    };
    check("inpainting", &model, &spec(Some(start)));
}
