//! Models whose weights are in GGUF's blocks or in fp8 draw to the byte what they draw with the
//! values of these, and UNets alone in their files what they draw in their model.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor, safetensors};
use sd_models::networks::{ClipTextConfig, ClipTextModel};
use sd_models::{
    AddOns, Checkpoint, DeviceName, LoadOptions, LoraStack, Pipeline, Precision, SafetyMode, Source,
};

use crate::img2img::{copy, finish, spec};
use crate::{path, relative_error};

type Tensors = HashMap<String, Tensor>;

/// A folder with the vocabulary of the small model, and what no shape of its networks tells.
fn folder(test: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("quantized-{test}"));
    let _ = std::fs::remove_dir_all(&root);
    copy(&path("v1/tokenizer"), &root.join("tokenizer"));
    for config in ["unet/config.json", "text_encoder/config.json"] {
        std::fs::create_dir_all(root.join(config).parent().unwrap()).unwrap();
        std::fs::copy(path("v1").join(config), root.join(config)).unwrap();
    }
    root
}

fn load(source: Source, unet: Option<Source>) -> sd_models::Result<Pipeline> {
    let vae =
        Source::Checkpoint(Checkpoint { file: path("single/vae.safetensors"), vocabulary: None });
    Pipeline::load(&LoadOptions {
        name: None,
        source,
        unet,
        vae: Some(vae),
        device: DeviceName::Cpu,
        precision: Precision::F32,
        safety: SafetyMode::Never,
        threads: Some(1),
        add_ons: AddOns::default(),
    })
}

fn checkpoint(file: PathBuf) -> Source {
    Source::Checkpoint(Checkpoint { file, vocabulary: None })
}

fn drawn(model: &Pipeline) -> Tensor {
    finish(model, vec![model.begin(&spec(None)).unwrap()]).remove(0)
}

fn whole() -> Tensors {
    safetensors::load(path("single/v1.safetensors"), &Device::Cpu).unwrap()
}

/// Writes tensors as stable-diffusion.cpp does, in blocks where the rows are whole ones, and the
/// same values as safetensors.
fn write_gguf(tensors: &Tensors, file: &Path) {
    let quantize = |x: &Tensor| {
        let blocks = x.rank() == 2 && x.dims()[1].is_multiple_of(32);
        let x = x.to_dtype(DType::F32).unwrap();
        let kind = if blocks { GgmlDType::Q5_0 } else { GgmlDType::F16 };
        QTensor::quantize(&x, if x.rank() == 1 { GgmlDType::F32 } else { kind }).unwrap()
    };
    let quantized: Vec<_> = tensors.iter().map(|(name, x)| (name.as_str(), quantize(x))).collect();
    let parts: Vec<_> = quantized.iter().map(|(name, x)| (*name, x)).collect();
    gguf_file::write(&mut File::create(file).unwrap(), &[], &parts).unwrap();
    let values = quantized
        .iter()
        .map(|(name, x)| ((*name).to_owned(), x.dequantize(&Device::Cpu).unwrap()))
        .collect::<Tensors>();
    safetensors::save(&values, file.with_extension("safetensors")).unwrap();
}

#[test]
fn a_checkpoint_of_stable_diffusion_cpp_is_its_values() {
    let root = folder("whole");
    let tensors: Tensors =
        whole().into_iter().filter(|(_, x)| x.rank() > 0 && !x.dtype().is_int()).collect();
    write_gguf(&tensors, &root.join("whole.gguf"));
    let ours = drawn(&load(checkpoint(root.join("whole.gguf")), None).unwrap());
    let values = drawn(&load(checkpoint(root.join("whole.safetensors")), None).unwrap());
    assert_eq!(relative_error(&ours, &values), 0.0);
    let exact = drawn(&load(Source::Directory(path("v1")), None).unwrap());
    let error = relative_error(&ours, &exact);
    assert!(error > 1e-4 && error < 0.3, "{error:.1e}");
}

#[test]
fn a_unet_alone_replaces_that_of_the_model() {
    let root = folder("unet");
    let tensors: Tensors = whole()
        .into_iter()
        .filter_map(|(name, x)| Some((name.strip_prefix("model.diffusion_model.")?.to_owned(), x)))
        .collect();
    write_gguf(&tensors, &root.join("bare.gguf"));
    let base = || Source::Directory(path("v1"));
    let with = |file: &str| drawn(&load(base(), Some(Source::UNet(root.join(file)))).unwrap());
    let ours = with("bare.gguf");
    assert_eq!(relative_error(&ours, &with("bare.safetensors")), 0.0);
    let exact = drawn(&load(base(), None).unwrap());
    assert!(relative_error(&ours, &exact) > 1e-4);
    // What no shape tells is the number of heads.
    std::fs::copy(path("v1/unet/config.json"), root.join("config.json")).unwrap();
    // Alone in diffusers' names, and in a whole checkpoint of which nothing else is used.
    let renamed = path("v1/unet/diffusion_pytorch_model.safetensors");
    std::fs::copy(renamed, root.join("diffusers.safetensors")).unwrap();
    std::fs::copy(path("single/v1.safetensors"), root.join("v1.safetensors")).unwrap();
    for file in ["diffusers.safetensors", "v1.safetensors"] {
        assert_eq!(relative_error(&with(file), &exact), 0.0, "{file}");
    }
    let flux = Tensors::from([(
        "double_blocks.0.img_attn.proj.weight".into(),
        Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap(),
    )]);
    write_gguf(&flux, &root.join("flux.gguf"));
    let error = load(base(), Some(Source::UNet(root.join("flux.gguf")))).map(drop);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("flux.gguf: this is Flux; --unet takes a UNet"), "{error}");
}

#[test]
fn fp8_is_widened_with_its_scales() {
    let root = folder("fp8");
    let (mut stored, mut values) = (Tensors::new(), Tensors::new());
    for (name, x) in whole() {
        let scaled = name.strip_suffix(".weight").filter(|_| x.rank() > 1);
        let Some(layer) = scaled.filter(|layer| layer.starts_with("model.diffusion_model.")) else {
            stored.insert(name.clone(), x.clone());
            values.insert(name, x);
            continue;
        };
        let fp8 = (x.to_dtype(DType::F32).unwrap() * 4.0).unwrap().to_dtype(DType::F8E4M3).unwrap();
        let quarter = Tensor::new(0.25_f32, &Device::Cpu).unwrap();
        stored.insert(format!("{layer}.scale_weight"), quarter);
        values.insert(name.clone(), (fp8.to_dtype(DType::F32).unwrap() * 0.25).unwrap());
        stored.insert(name, fp8);
    }
    let mark = Tensor::zeros(2, DType::F8E4M3, &Device::Cpu).unwrap();
    stored.insert("model.diffusion_model.scaled_fp8".into(), mark);
    safetensors::save(&stored, root.join("fp8.safetensors")).unwrap();
    safetensors::save(&values, root.join("values.safetensors")).unwrap();
    let model = load(checkpoint(root.join("fp8.safetensors")), None).unwrap();
    let values = drawn(&load(checkpoint(root.join("values.safetensors")), None).unwrap());
    assert_eq!(relative_error(&drawn(&model), &values), 0.0);
    assert!(model.info().warnings.is_empty(), "{:?}", model.info().warnings);
}

/// The name that stable-diffusion.cpp gives a tensor of SD 2.x's text encoder.
fn as_cpp(name: &str) -> Option<String> {
    let rest = name.strip_prefix("cond_stage_model.model.")?;
    let tables = [
        ("transformer.resblocks.", "encoder.layers."),
        ("attn.in_proj_", "self_attn.in_proj."),
        ("attn.out_proj", "self_attn.out_proj"),
        ("ln_final", "final_layer_norm"),
        ("ln_", "layer_norm"),
        ("c_fc", "fc1"),
        ("c_proj", "fc2"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("token_embedding", "embeddings.token_embedding"),
    ];
    let renamed = tables.iter().fold(rest.to_owned(), |name, (a, b)| name.replace(a, b));
    Some(format!("cond_stage_model.transformer.text_model.{renamed}"))
}

#[test]
fn a_text_encoder_of_sd_2_is_read_in_either_library_s_names() {
    let root = tempfile::tempdir().unwrap();
    let tensors = safetensors::load(path("single/v2.safetensors"), &Device::Cpu).unwrap();
    let renamed =
        tensors.into_iter().filter(|(name, x)| !name.ends_with("logit_scale") && x.rank() > 0);
    let renamed = renamed.map(|(name, x)| (as_cpp(&name).unwrap_or(name), x));
    let file = root.path().join("second.safetensors");
    safetensors::save(&renamed.collect::<Tensors>(), &file).unwrap();
    let (cpp, original) = (checkpoint(file), checkpoint(path("single/v2.safetensors")));
    let config = ClipTextConfig::read(&original).unwrap();
    // Of a whole tower the last layer is one too many; of this one nothing tells.
    let mut ours = ClipTextConfig::read(&cpp).unwrap();
    ours.transformer.num_hidden_layers -= 1;
    assert_eq!(ours, config);
    let states = |source: &Source| {
        let weights = source.weights("text_encoder", "", false).unwrap();
        let text = ClipTextModel::load(config.clone(), &weights, &Device::Cpu, DType::F32).unwrap();
        text.forward(&[vec![1, 2, 3]], &LoraStack::default()).unwrap()
    };
    assert_eq!(relative_error(&states(&cpp), &states(&original)), 0.0);
}
