//! Files of other forms than the usual ones: each is read as diffusers or transformers reads it, or
//! refused in a sentence that says what it is.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use sd_models::networks::{ClipTextConfig, UNet2DConditionModel, UNetConfig, VaeConfig};
use sd_models::text::ClipTokenizer;
use sd_models::{Checkpoint, Pipeline, Source};
use serde_json::{Value, json};

use crate::img2img::{copy, finish, load, open, spec};
use crate::{fixture, floats, path, read, relative_error};

/// A directory of a test.
fn folder(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("forms-{name}"));
    let _ = std::fs::remove_dir_all(&root);
    std::fs::create_dir_all(&root).unwrap();
    root
}

fn checkpoint(file: PathBuf) -> Source {
    Source::Checkpoint(Checkpoint { file, vocabulary: None })
}

type Tensors = HashMap<String, Tensor>;

/// A whole model of SD 1.x as the tensors of one file.
fn whole() -> Tensors {
    let vae = fixture("single/vae.safetensors").into_iter();
    let vae = vae.map(|(name, tensor)| (format!("first_stage_model.{name}"), tensor));
    fixture("single/v1.safetensors").into_iter().chain(vae).collect()
}

/// The bytes of a safetensors file.
fn bytes(tensors: &Tensors) -> Vec<u8> {
    let data: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| {
            let numbers: Vec<u8> = floats(tensor).iter().flat_map(|v| v.to_le_bytes()).collect();
            (name, tensor.dims().to_vec(), numbers)
        })
        .collect();
    let views = data.iter().map(|(name, shape, numbers)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), numbers).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// A file in a directory with the vocabulary, and what no shape of these small networks tells: the
/// number of heads.
fn place(test: &str, name: &str, content: &[u8]) -> PathBuf {
    let root = folder(test);
    copy(&path("v1/tokenizer"), &root.join("tokenizer"));
    for config in ["unet/config.json", "text_encoder/config.json"] {
        std::fs::create_dir_all(root.join(config).parent().unwrap()).unwrap();
        std::fs::copy(path("v1").join(config), root.join(config)).unwrap();
    }
    std::fs::write(root.join(name), content).unwrap();
    root.join(name)
}

fn latents(model: &Pipeline) -> Vec<f32> {
    floats(&finish(model, vec![model.begin(&spec(None)).unwrap()])[0])
}

fn refusal(source: Source) -> String {
    let error = open(source, None).map(drop).unwrap_err().to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

/// A configuration that is inferred from a file.
fn described(source: &Source, name: &str) -> Value {
    serde_json::from_slice(&source.read(name).unwrap().unwrap()).unwrap()
}

#[test]
fn special_tokens_are_those_of_transformers() {
    #[derive(serde::Deserialize)]
    struct Row {
        name: String,
        files: HashMap<String, Value>,
        prompts: Vec<String>,
        ids: Vec<Vec<u32>>,
    }
    let rows: Vec<Row> = serde_json::from_slice(&read("forms/tokenizers.json")).unwrap();
    for Row { name, files, prompts, ids } in rows {
        let root = folder(&format!("tokens-{name}"));
        copy(&path("tokenizer"), &root.join("tokenizer"));
        for (file, content) in files {
            std::fs::write(root.join("tokenizer").join(file), content.to_string()).unwrap();
        }
        let tokenizer = ClipTokenizer::load(&Source::Directory(root), 77).unwrap();
        for (prompt, ids) in prompts.iter().zip(ids) {
            assert_eq!(tokenizer.encode(prompt).unwrap().ids, ids, "{name}: {prompt}");
        }
    }
}

#[test]
fn a_unet_may_have_no_middle_block() {
    let source = Source::Directory(path("forms"));
    let config = UNetConfig::read(&source).unwrap();
    assert_eq!(config.mid_block, sd_models::networks::MidBlock::Absent);
    let weights = source.weights("unet", "diffusion_pytorch_model", false).unwrap();
    let unet = UNet2DConditionModel::load(config, &weights, &Device::Cpu, DType::F32).unwrap();
    let expected = fixture("forms/unet/expected.safetensors");
    let timesteps: Vec<f64> = floats(&expected["timesteps"]).into_iter().map(f64::from).collect();
    let times = unet.time_embeddings(&timesteps, &[]).unwrap();
    let conditioning = unet.condition(&expected["context"], &[]).unwrap();
    let output = unet.forward(&expected["6x8.latents"], &times, &[conditioning], &[]).unwrap();
    let error = relative_error(&output, &expected["6x8.output"]);
    assert!(error < 1e-4, "{error:e}");
}

#[test]
fn a_file_is_read_for_what_it_is() {
    let reference = latents(&load(path("v1")));
    let tensors = whole();
    let sound = bytes(&tensors);
    // Under another ending; with what is of no use behind it.
    let longer = [&sound[..], b"behind"].concat();
    // The names that converters leave, and linear layers as such.
    let converted = tensors.iter().map(|(name, tensor)| {
        let Some((start, end)) = name.split_once("mid.attn_1.") else {
            return (name.clone(), tensor.clone());
        };
        let (layer, kind) = end.rsplit_once('.').unwrap();
        let layer = match layer {
            "q" => "to_q",
            "k" => "to_k",
            "v" => "to_v",
            "proj_out" => "to_out.0",
            other => other,
        };
        let matrix = tensor.dims().len() == 4;
        let tensor = if matrix { tensor.flatten_from(1).unwrap() } else { tensor.clone() };
        (format!("{start}mid.attn_1.{layer}.{kind}"), tensor)
    });
    let converted = bytes(&converted.collect());
    for (test, name, content) in [
        ("ending", "a.ckpt", &sound),
        ("behind", "a.safetensors", &longer),
        ("names", "a.safetensors", &converted),
    ] {
        let model = open(checkpoint(place(test, name, content)), None).unwrap();
        assert_eq!(latents(&model), reference, "{test}");
        let warnings = &model.info().warnings;
        let wanted = ["a.safetensors: 6 bytes behind its tensors are not used"];
        assert_eq!(*warnings, wanted[..usize::from(test == "behind")], "{test}");
    }
}

#[test]
fn what_no_part_asks_for_is_named_and_not_used() {
    let reference = latents(&load(path("v1")));
    let root = folder("stray");
    copy(&path("v1"), &root);
    let file = root.join("unet/diffusion_pytorch_model.safetensors");
    let mut tensors = fixture("v1/unet/diffusion_pytorch_model.safetensors");
    tensors.insert("stray.weight".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    std::fs::write(&file, bytes(&tensors)).unwrap();
    let model = load(root);
    assert_eq!(latents(&model), reference);
    let warning = "unet/diffusion_pytorch_model.safetensors: tensor stray.weight is of no part of \
                   the network, and not used";
    assert_eq!(model.info().warnings, [warning]);
}

#[test]
fn the_prediction_is_decided_without_a_configuration() {
    let velocity_bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias";
    let bias = |deviation: f32| Tensor::new(&[-deviation, deviation], &Device::Cpu).unwrap();
    let yaml = |what: &str| format!("model:\n  params:\n    {what}\n    timesteps: 1000\n");
    let velocity = ("v_prediction", 96);
    let noise = ("epsilon", 64);
    let inputs = |tensors: &mut Tensors, inputs: usize| {
        let first = "model.diffusion_model.input_blocks.0.0.weight".to_owned();
        let tensor = Tensor::zeros((8, inputs, 3, 3), DType::F32, &Device::Cpu).unwrap();
        tensors.insert(first, tensor);
    };
    // File, deviation of the bias, input channels, configuration; prediction and latent pixels.
    type Case<'a> = (&'a str, Option<f32>, usize, Option<&'a str>, (&'a str, u64));
    let cases: [Case<'_>; 10] = [
        ("v2", None, 4, None, velocity),
        ("v2", Some(0.1), 4, None, velocity),
        ("v2", Some(0.08), 4, None, noise),
        ("v2", None, 9, None, noise),
        ("v2", Some(0.1), 4, Some("target: x"), noise),
        ("v2", Some(0.08), 4, Some("parameterization: \"v\""), velocity),
        ("v2", None, 9, Some("parameterization: v"), velocity),
        ("v1", None, 4, None, noise),
        ("v1", Some(0.1), 4, None, noise),
        ("v1", None, 4, Some("parameterization: v"), ("v_prediction", 64)),
    ];
    for (i, (file, deviation, channels, config, (prediction, side))) in
        cases.into_iter().enumerate()
    {
        let mut tensors = fixture(&format!("single/{file}.safetensors"));
        inputs(&mut tensors, channels);
        if let Some(deviation) = deviation {
            tensors.insert(velocity_bias.into(), bias(deviation));
        }
        let root = folder(&format!("prediction-{i}"));
        let name = root.join("model-1.5.safetensors");
        std::fs::write(&name, bytes(&tensors)).unwrap();
        if let Some(config) = config {
            std::fs::write(root.join("model-1.5.yaml"), yaml(config)).unwrap();
        }
        let source = checkpoint(name);
        let found = described(&source, "scheduler/scheduler_config.json");
        assert_eq!(found["prediction_type"], prediction, "case {i}");
        assert_eq!(described(&source, "unet/config.json")["sample_size"], side, "case {i}");
    }
}

#[test]
fn the_unet_tells_the_family_whatever_the_text_encoder_is_called() {
    let mut tensors = fixture("single/v2.safetensors");
    tensors.retain(|name, _| !name.starts_with("cond_stage_model."));
    let tower = fixture("v2/text_encoder/model.safetensors");
    for (name, tensor) in tower {
        tensors.insert(format!("cond_stage_model.transformer.{name}"), tensor);
    }
    let root = folder("tower");
    std::fs::write(root.join("a.safetensors"), bytes(&tensors)).unwrap();
    let source = checkpoint(root.join("a.safetensors"));
    let text = ClipTextConfig::read(&source).unwrap();
    assert_eq!(text.transformer.num_hidden_layers, 3);
    assert_eq!(described(&source, "text_encoder/config.json")["hidden_act"], "gelu");
    assert_eq!(described(&source, "tokenizer/special_tokens_map.json"), json!({"pad_token": "!"}));
    assert_eq!(source.weights("text_encoder", "", false).unwrap().warnings(), [""; 0]);
}

#[test]
fn only_the_last_layer_of_a_whole_open_clip_is_left_out() {
    let prefix = "cond_stage_model.model.transformer.resblocks.";
    for (layers, used) in [(23, 23), (24, 23)] {
        let mut tensors = fixture("single/v2.safetensors");
        let first = format!("{prefix}0.mlp.c_fc.weight");
        let weight = tensors[&first].clone();
        for i in 0..layers {
            tensors.insert(format!("{prefix}{i}.mlp.c_fc.weight"), weight.clone());
        }
        let root = folder(&format!("layers-{layers}"));
        std::fs::write(root.join("a.safetensors"), bytes(&tensors)).unwrap();
        let config = ClipTextConfig::read(&checkpoint(root.join("a.safetensors"))).unwrap();
        assert_eq!(config.transformer.num_hidden_layers, used, "of {layers}");
    }
}

#[test]
fn a_vae_may_be_bare_or_have_the_names_of_the_other_format() {
    let model =
        || open(checkpoint(place("vae", "a.safetensors", &read("single/v1.safetensors"))), None);
    let missing = model().map(drop).unwrap_err().to_string();
    assert!(missing.contains("no VAE") && missing.contains("--vae"), "{missing}");
    let reference = latents(&load(path("v1")));
    let root = folder("bare-vae");
    copy(&path("v1/vae"), &root);
    let file = root.join("other.safetensors");
    std::fs::copy(root.join("diffusion_pytorch_model.safetensors"), &file).unwrap();
    // A file does not say for which size it was trained.
    let VaeConfig { sample_size, .. } = VaeConfig::read(&checkpoint(file.clone())).unwrap();
    assert_eq!(sample_size, 512);
    assert_eq!(
        VaeConfig::read(&checkpoint(file.clone())).unwrap(),
        VaeConfig { sample_size, ..VaeConfig::read(&Source::Directory(path("v1"))).unwrap() }
    );
    for vae in [Source::Network(root), checkpoint(file)] {
        let source = checkpoint(place("vae", "a.safetensors", &read("single/v1.safetensors")));
        let model = open(source, Some(vae)).unwrap();
        assert_eq!(latents(&model), reference);
    }
}

#[test]
fn pickles_stand_in_for_safetensors() {
    let root = folder("pickled");
    copy(&path("v1"), &root);
    std::fs::remove_file(root.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    let missing = refusal(Source::Directory(root.clone()));
    assert!(missing.contains("diffusion_pytorch_model.bin"), "{missing}");
    // A file is read for what it is: safetensors in a pickle's place too.
    let unet = read("v1/unet/diffusion_pytorch_model.safetensors");
    std::fs::write(root.join("unet/diffusion_pytorch_model.bin"), unet).unwrap();
    assert_eq!(latents(&load(root)), latents(&load(path("v1"))));
}

#[test]
fn damaged_files_are_refused_by_what_is_wrong_with_them() {
    let tensors = whole();
    let sound = bytes(&tensors);
    let mut odd = tensors.clone();
    let name = "model.diffusion_model.out.2.bias";
    odd.insert(name.into(), Tensor::new(&[0.0, f32::NAN, 0.0, 0.0], &Device::Cpu).unwrap());
    let half = sound.len() / 2;
    let pickle = read("single/inpaint.ckpt");
    let cut = format!("{half} bytes of {}", sound.len());
    let cases: [(&str, Cow<'_, [u8]>, &str); 7] = [
        ("half.safetensors", sound[..half].into(), &cut),
        ("head.safetensors", sound[..100].into(), "cut short"),
        ("half.ckpt", pickle[..pickle.len() / 2].into(), "cut short"),
        ("empty.safetensors", (&b""[..]).into(), "is empty"),
        ("page.safetensors", (&b"<!DOCTYPE html>"[..]).into(), "web page"),
        ("pointer.ckpt", (&b"version https://git-lfs.github.com/spec/v1"[..]).into(), "git-LFS"),
        ("nan.safetensors", bytes(&odd).into(), "NaN"),
    ];
    for (name, content, words) in cases {
        let error = refusal(checkpoint(place("damaged", name, &content)));
        assert!(error.contains(words) && error.contains(name), "{error}");
    }
}

#[test]
fn files_of_other_families_are_named() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let with = |changes: &[(&str, &[usize])]| {
        let mut tensors = whole();
        for (name, shape) in changes {
            tensors.insert((*name).into(), zeros(shape));
        }
        tensors
    };
    let alone = |name: &str| Tensors::from([(name.to_owned(), zeros(&[2, 2]))]);
    let first = "model.diffusion_model.input_blocks.0.0.weight";
    let label = "model.diffusion_model.label_emb.0.0.weight";
    let cases = [
        (with(&[(first, &[8, 8, 3, 3])]), "InstructPix2Pix"),
        (with(&[(first, &[8, 5, 3, 3])]), "depth"),
        (with(&[(first, &[8, 7, 3, 3])]), "upscaler"),
        (with(&[(label, &[8, 2816])]), "Stable Diffusion XL"),
        (with(&[(label, &[8, 2560])]), "refiner"),
        (with(&[(label, &[8, 1536])]), "unCLIP"),
        (with(&[("conditioner.embedders.1.model.token_embedding.weight", &[4, 4])]), "XL"),
        (
            with(&[("cond_stage_model.1.transformer.text_model.text_projection", &[4, 4])]),
            "names of stable-diffusion.cpp",
        ),
        (with(&[("control_model.time_embed.0.weight", &[4, 4])]), "ControlNet"),
        (alone("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Diffusion 3"),
        (alone("double_blocks.0.img_attn.norm.key_norm.scale"), "Flux"),
        (alone("down_blocks.1.0.channelwise.0.weight"), "Cascade"),
        (alone("lora_unet_x.lora_down.weight"), "LoRA"),
        (alone("emb_params"), "textual inversion"),
        (alone("decoder.conv_in.weight"), "VAE"),
        (alone("input_blocks.0.0.weight"), "UNet alone"),
        (alone("text_model.embeddings.token_embedding.weight"), "text encoder"),
        (alone("a.b"), "a.b"),
    ];
    for (tensors, words) in cases {
        let file = place("family", "a.safetensors", &bytes(&tensors));
        let error = Checkpoint { file, vocabulary: None }.check().unwrap_err().to_string();
        let wanted = "a model must be a checkpoint of Stable Diffusion 1.x, 2.x or XL";
        assert!(error.starts_with("a.safetensors: this is ") && error.ends_with(wanted), "{error}");
        assert!(error.contains(words), "{words}: {error}");
    }
}
