//! Text encoders, UNets and VAEs with small random weights against transformers and diffusers.

use candle_core::{DType, Device, Tensor};
use sd_models::networks::{
    ClipTextConfig, ClipTextModel, Decoder, Encoder, UNet2DConditionModel, UNetConfig, VaeConfig,
};
use sd_models::{LoraStack, Source};

use crate::{fixture, floats, path, relative_error};

const TOLERANCE: f32 = 1e-4;
const CPU: &Device = &Device::Cpu;

fn assert_close(what: &str, ours: &Tensor, reference: &Tensor) {
    let error = relative_error(ours, reference);
    println!("{what}: {error:.1e}");
    assert!(error <= TOLERANCE, "{what}: {error:.1e}");
}

fn text_encoder(name: &str) {
    let source = Source::Directory(path(name));
    let weights = source.weights("text_encoder", "model", false).unwrap();
    let config = ClipTextConfig::read(&source).unwrap();
    let model = ClipTextModel::load(config, &weights, CPU, DType::F32).unwrap();
    let expected = fixture(&format!("{name}/text_encoder/expected.safetensors"));
    let ids = expected["ids"].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
    let ours = model.forward(&ids, &LoraStack::default()).unwrap();
    assert_close(&format!("text encoder {name}"), &ours, &expected["last_hidden_state"]);
}

#[test]
fn text_encoder_of_sd_1() {
    text_encoder("v1");
}

#[test]
fn text_encoder_of_sd_2() {
    text_encoder("v2");
}

/// The UNet's error for each size of latents, three rows with their own timesteps and contexts.
fn unet(name: &str, half: bool) {
    let source = Source::Directory(path(name));
    let weights = source.weights("unet", "diffusion_pytorch_model", half).unwrap();
    let config = UNetConfig::read(&source).unwrap();
    let model = UNet2DConditionModel::load(config, &weights, CPU, DType::F32).unwrap();
    let expected = fixture(&format!("{name}/unet/expected.safetensors"));
    let timesteps: Vec<f64> = floats(&expected["timesteps"]).into_iter().map(f64::from).collect();
    let mut cases: Vec<_> = expected
        .keys()
        .filter_map(|key| key.strip_suffix(".output"))
        .filter(|case| case.ends_with(".half") == half)
        .collect();
    cases.sort_unstable();
    assert!(!cases.is_empty());
    for case in cases {
        let latents = &expected[&format!("{}.latents", case.trim_end_matches(".half"))];
        let conditioning = model.condition(&expected["context"], &[]).unwrap();
        let times = model.time_embeddings(&timesteps, &[]).unwrap();
        let ours = model.forward(latents, &times, &[conditioning], &[]).unwrap();
        let reference = &expected[&format!("{case}.output")];
        assert_close(&format!("unet {name} {case}"), &ours, reference);
        for row in 0..timesteps.len() {
            let one = |x: &Tensor| x.narrow(0, row, 1).unwrap();
            let (latents, context, time) = (one(latents), one(&expected["context"]), one(&times));
            let conditioning = model.condition(&context, &[]).unwrap();
            let alone = model.forward(&latents, &time, &[conditioning], &[]).unwrap();
            assert_close(&format!("unet {name} {case} row {row}"), &alone, &one(reference));
        }
    }
}

#[test]
fn unet_of_sd_1() {
    unet("v1", false);
}

#[test]
fn unet_of_sd_2_in_shards() {
    unet("v2", false);
}

#[test]
fn unet_of_three_unequal_levels() {
    unet("narrow", false);
}

#[test]
fn unet_from_its_half_precision_file() {
    unet("narrow", true);
}

fn vae(name: &str) {
    let source = Source::Directory(path(name));
    let weights = source.weights("vae", "diffusion_pytorch_model", false).unwrap();
    let config = || VaeConfig::read(&source).unwrap();
    let decoder = Decoder::load(config(), &weights, CPU, DType::F32).unwrap();
    let weights = source.weights("vae", "diffusion_pytorch_model", false).unwrap();
    let encoder = Encoder::load(config(), &weights, CPU, DType::F32).unwrap();
    let expected = fixture(&format!("{name}/vae/expected.safetensors"));
    for case in ["4x4", "3x5"] {
        let of = |what: &str| &expected[&format!("{case}.{what}")];
        let decoded = decoder.forward(of("latents")).unwrap().permute((0, 3, 1, 2)).unwrap();
        assert_close(&format!("vae {name} {case} decoded"), &decoded, of("decoded"));
        let picture = of("picture").permute((0, 2, 3, 1)).unwrap();
        let (mean, log_variance) = encoder.forward(&picture).unwrap();
        assert_close(&format!("vae {name} {case} mean"), &mean, of("mean"));
        // diffusers clamps its logvar.
        let log_variance = log_variance.clamp(-30_f32, 20_f32).unwrap();
        assert_close(&format!("vae {name} {case} logvar"), &log_variance, of("logvar"));
    }
}

#[test]
fn vae_with_the_names_of_sd_1() {
    vae("v1");
}

#[test]
fn vae_without_quantising_convolutions_and_attention() {
    vae("narrow");
}

/// What rounding the weights to bf16 costs: at most what the other engines' bf16 does.
#[test]
fn bf16_weights_stay_close_to_f32() {
    let source = Source::Demo;
    let config = UNetConfig::read(&source).unwrap();
    let weights = source.weights("unet", "diffusion_pytorch_model", false).unwrap();
    let load = |dtype| UNet2DConditionModel::load(config.clone(), &weights, CPU, dtype).unwrap();
    // Numbers without a pattern, with a variance of one.
    let noise = |shape: &[usize]| {
        let at = Tensor::arange(0f32, shape.iter().product::<usize>() as f32, CPU).unwrap();
        let waves = (at.affine(12.9898, 0.7).unwrap().sin().unwrap() * 2f64.sqrt()).unwrap();
        waves.reshape(shape).unwrap()
    };
    let context = noise(&[2, 77, config.cross_attention_dim]);
    let latents = noise(&[2, config.in_channels, 16, 16]);
    let run = |model: &UNet2DConditionModel| {
        let conditioning = model.condition(&context, &[]).unwrap();
        model
            .forward(
                &latents,
                &model.time_embeddings(&[900.0, 300.0], &[]).unwrap(),
                &[conditioning],
                &[],
            )
            .unwrap()
    };
    let (f32, bf16) = (run(&load(DType::F32)), run(&load(DType::BF16)));
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let error = norm(&(bf16 - &f32).unwrap()) / norm(&f32);
    println!("bf16 beside f32: relative L2 {error:.1e}");
    assert!(error > 0.0 && error <= 2.5e-2, "relative L2 {error:.1e}");
}
