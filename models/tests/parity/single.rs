//! Single-file checkpoints: they draw to the byte what the same networks draw as a directory.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use sd_models::networks::{
    ClipTextConfig, ClipTextModel, UNet2DConditionModel, UNetConfig, VaeConfig,
};
use sd_models::{Checkpoint, LoraStack, Pipeline, Source};

use crate::img2img::{copy, finish, inpainting_model, load, open, spec};
use crate::{fixture, floats, path, relative_error};

fn checkpoint(file: PathBuf) -> Source {
    Source::Checkpoint(Checkpoint { file, vocabulary: None })
}

/// A checkpoint with a directory's vocabulary beside it, and what no shape of these small networks
/// tells: the number of heads.
fn beside(file: &str, model: &Path) -> Source {
    placed(&file.replace('.', "-"), file, model)
}

/// The same in a folder of this name.
fn placed(name: &str, file: &str, model: &Path) -> Source {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("single-{name}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("v1/tokenizer"), &root.join("tokenizer"));
    for config in ["unet/config.json", "text_encoder/config.json"] {
        std::fs::create_dir_all(root.join(config).parent().unwrap()).unwrap();
        std::fs::copy(model.join(config), root.join(config)).unwrap();
    }
    std::fs::copy(path("single").join(file), root.join(file)).unwrap();
    checkpoint(root.join(file))
}

fn assert_equal(single: &Pipeline, directory: &Pipeline) {
    let draw = |model: &Pipeline| {
        let mut trajectory = model.begin(&spec(None)).unwrap();
        while !trajectory.done() {
            model.step(&mut [&mut trajectory]).unwrap();
        }
        model.decode(&trajectory).unwrap()
    };
    assert!(draw(single) == draw(directory));
    let latents = |model: &Pipeline| finish(model, vec![model.begin(&spec(None)).unwrap()]);
    assert_eq!(floats(&latents(single)[0]), floats(&latents(directory)[0]));
}

#[test]
fn a_file_without_a_vae_draws_with_another() {
    let source = beside("v1.safetensors", &path("v1"));
    let vae = || Some(checkpoint(path("single/vae.safetensors")));
    let single = open(source.clone(), vae()).unwrap();
    assert_eq!(single.info().name, "v1");
    assert_equal(&single, &load(path("v1")));
    let error = open(source, None).map(drop).unwrap_err().to_string();
    assert!(error.contains("decoder.conv_in.weight") && error.contains("missing"), "{error}");
    let other = Some(Source::Directory(path("v1")));
    assert_equal(&open(beside("v1.safetensors", &path("v1")), other).unwrap(), &single);
}

#[test]
fn a_pickle_is_read_as_data() {
    let directory = inpainting_model("pickle");
    let single = open(beside("inpaint.ckpt", &directory), None).unwrap();
    assert_equal(&single, &load(directory));
}

#[test]
fn what_shapes_tell_is_inferred() {
    for (file, directory) in [("v1.safetensors", "v1"), ("v2.safetensors", "v2")] {
        let single = checkpoint(path("single").join(file));
        let directory = Source::Directory(path(directory));
        let (ours, theirs) =
            (UNetConfig::read(&single).unwrap(), UNetConfig::read(&directory).unwrap());
        let (heads, sample_size) = (ours.heads.clone(), ours.sample_size);
        assert_eq!(ours, UNetConfig { heads, sample_size, ..theirs });
        let ours = ClipTextConfig::read(&single).unwrap();
        let mut theirs = ClipTextConfig::read(&directory).unwrap();
        theirs.transformer.num_attention_heads = ours.transformer.num_attention_heads;
        assert_eq!(ours, theirs);
    }
    let vae = VaeConfig::read(&checkpoint(path("single/vae.safetensors"))).unwrap();
    // The size of the training is not in the shapes.
    let theirs = VaeConfig::read(&Source::Directory(path("v1"))).unwrap();
    assert_eq!(vae, VaeConfig { sample_size: 512, ..theirs });
    let inpainting = UNetConfig::read(&checkpoint(path("single/inpaint.ckpt"))).unwrap();
    assert_eq!(inpainting.in_channels, 9);
}

#[test]
fn networks_of_sd_2_are_found_under_their_names() {
    let (single, directory) =
        (checkpoint(path("single/v2.safetensors")), Source::Directory(path("v2")));
    let open = |folder| single.weights(folder, "", false).unwrap();
    let (cpu, f32) = (&Device::Cpu, DType::F32);
    let config = ClipTextConfig::read(&directory).unwrap();
    let text = ClipTextModel::load(config, &open("text_encoder"), cpu, f32).unwrap();
    let expected = fixture("v2/text_encoder/expected.safetensors");
    let ids = expected["ids"].to_dtype(DType::U32).unwrap().to_vec2().unwrap();
    let states = text.forward(&ids, &LoraStack::default()).unwrap();
    assert!(relative_error(&states, &expected["last_hidden_state"]) < 1e-4);

    let config = UNetConfig::read(&directory).unwrap();
    let unet = UNet2DConditionModel::load(config, &open("unet"), cpu, f32).unwrap();
    let expected = fixture("v2/unet/expected.safetensors");
    let timesteps: Vec<f64> = floats(&expected["timesteps"]).into_iter().map(f64::from).collect();
    let times = unet.time_embeddings(&timesteps, &[]).unwrap();
    let conditioning = unet.condition(&expected["context"], &[]).unwrap();
    let output = unet.forward(&expected["8x8.latents"], &times, &[conditioning], &[]).unwrap();
    assert!(relative_error(&output, &expected["8x8.output"]) < 1e-4);
}

#[test]
fn tensors_of_no_part_of_a_model_are_told_of() {
    let vae = || Some(checkpoint(path("single/vae.safetensors")));
    let source = placed("strays", "v1.safetensors", &path("v1"));
    // It holds what training leaves: a table of the noise, and a number of the averaged weights.
    assert_eq!(open(source.clone(), vae()).unwrap().info().warnings, [""; 0]);
    let Source::Checkpoint(Checkpoint { file, .. }) = &source else { unreachable!() };
    let mut tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let one = tensors.values().next().unwrap().clone();
    tensors.insert("safety_checker.weight".into(), one.clone());
    tensors.insert("x.weight".into(), one);
    candle_core::safetensors::save(&tensors, file).unwrap();
    let warnings = open(source.clone(), vae()).unwrap().info().warnings.clone();
    let words = "safety_checker.weight and 1 more: of no part of the model, and not used";
    assert!(warnings.len() == 1 && warnings[0].contains(words), "{warnings:?}");
    let wrapped = tensors.into_iter().map(|(name, tensor)| (format!("module.{name}"), tensor));
    let wrapped = wrapped.collect::<std::collections::HashMap<_, _>>();
    candle_core::safetensors::save(&wrapped, file).unwrap();
    let error = Checkpoint { file: file.clone(), vocabulary: None }.check().unwrap_err();
    assert!(error.to_string().contains("other names, such as \"module."), "{error}");
}

#[test]
fn files_that_are_no_checkpoints_are_refused_by_name() {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("broken");
    std::fs::create_dir_all(&root).unwrap();
    let pickle = std::fs::read(path("single/inpaint.ckpt")).unwrap();
    let files: [(&str, &[u8]); 5] = [
        ("empty.ckpt", b""),
        ("text.ckpt", b"this is no checkpoint"),
        ("cut.ckpt", &pickle[..pickle.len() / 2]),
        ("text.safetensors", b"this is no checkpoint"),
        ("vae.safetensors", &std::fs::read(path("single/vae.safetensors")).unwrap()),
    ];
    for (name, bytes) in files {
        std::fs::write(root.join(name), bytes).unwrap();
        let error = open(checkpoint(root.join(name)), None).map(drop).unwrap_err().to_string();
        assert!(error.contains(name), "{name}: {error}");
    }
}
