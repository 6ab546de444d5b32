//! Upscalers of the ESRGAN family against PyTorch, and hires passes of pictures against diffusers.

use std::path::PathBuf;

use candle_core::{DType, Device};
use sd_models::networks::UpscalerNetwork;

use crate::{fixture, path, read, relative_error};

const TOLERANCE: f32 = 1e-5;

/// The files of the fixture.
fn files() -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(path("upscalers")).unwrap().map(|entry| entry.unwrap().path());
    let stem = |file: PathBuf| (file.file_stem().unwrap().to_str().unwrap().to_owned(), file);
    entries.map(stem).filter(|(name, _)| name.contains('-')).collect()
}

fn open(file: &std::path::Path) -> sd_models::Result<UpscalerNetwork> {
    UpscalerNetwork::read(file, &Device::Cpu, DType::F32)
}

#[test]
fn networks_are_told_from_their_files_and_agree_with_torch() {
    let expected = fixture("upscalers/expected.safetensors");
    let files = files();
    assert_eq!(files.len(), 10);
    for (name, file) in files {
        let network = open(&file).unwrap();
        let scale = name.split('-').find_map(|part| part.strip_suffix('x')?.parse().ok());
        assert_eq!(Some(network.scale()), scale, "{name}");
        let ours = network.forward(&expected[&format!("{name}.input")]).unwrap();
        let error = relative_error(&ours, &expected[&format!("{name}.output")]);
        println!("{name}: {error:.1e}");
        assert!(error <= TOLERANCE, "{name}: {error:.1e}");
    }
}

#[test]
fn other_files_are_refused_by_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |file: &std::path::Path| open(file).err().map(|error| error.to_string()).unwrap();
    for (file, what) in [
        ("single/v1.safetensors", "a checkpoint of Stable Diffusion"),
        ("single/vae.safetensors", "a VAE"),
        ("lora/full.safetensors", "a LoRA"),
        ("noise.safetensors", "the first \"mixed.0\""),
    ] {
        let reason = refused(&path(file));
        assert!(reason.contains(what) && reason.contains("ESRGAN family"), "{file}: {reason}");
    }
    // A file that is cut short, one without a layer, and one with a layer too many.
    let whole = read("upscalers/trunk-4x.safetensors");
    let cut = folder.path().join("cut.safetensors");
    std::fs::write(&cut, &whole[..whole.len() - 100]).unwrap();
    assert!(refused(&cut).contains("cut short"), "{}", refused(&cut));
    let tensors = fixture("upscalers/trunk-4x.safetensors");
    for (name, change) in [("HRconv.bias", false), ("upconv9.weight", true)] {
        let mut tensors = tensors.clone();
        match change {
            true => tensors.insert(name.into(), tensors["upconv1.weight"].clone()),
            false => tensors.remove(name),
        };
        let file = folder.path().join("changed.safetensors");
        candle_core::safetensors::save(&tensors, &file).unwrap();
        assert!(refused(&file).contains(name), "{}", refused(&file));
    }
}
