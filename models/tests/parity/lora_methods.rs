//! LoRAs of every method against LyCORIS and PEFT, whose merged weights `make_fixtures.py` has drawn
//! with; and what of a file is left out.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor, safetensors};
use sd_models::{
    AddOns, AssetDir, DeviceName, LoadOptions, LoraUse, Pipeline, Precision, SafetyMode, Sampler,
    Size, Source, Spec,
};

use crate::img2img::{copy as copy_files, finish, spec as base};
use crate::{fixture, path, relative_error};

const SCALE: f64 = 0.8;

/// The small model with LoRAs of a folder and further ones.
fn model(directory: PathBuf, files: Vec<PathBuf>) -> Pipeline {
    open(path("v1"), directory, files)
}

fn open(model: PathBuf, directory: PathBuf, files: Vec<PathBuf>) -> Pipeline {
    limited(model, directory, files, 1 << 24)
}

/// As `open`, with so many bytes for LoRAs.
pub(crate) fn limited(
    model: PathBuf,
    directory: PathBuf,
    files: Vec<PathBuf>,
    max_lora_bytes: u64,
) -> Pipeline {
    let endings = &["safetensors"];
    let loras = AssetDir { directory: Some(directory), files, endings, ..AssetDir::default() };
    Pipeline::load(&LoadOptions {
        name: None,
        source: Source::Directory(model),
        unet: None,
        vae: None,
        device: DeviceName::Cpu,
        precision: Precision::F32,
        safety: SafetyMode::Never,
        threads: Some(1),
        add_ons: AddOns { loras, max_lora_bytes, ..AddOns::default() },
    })
    .unwrap()
}

fn spec(loras: &[(&str, f64)]) -> Spec {
    Spec {
        prompt: "a red house".into(),
        loras: loras.iter().map(|(name, scale)| LoraUse::new(*name, *scale)).collect(),
        size: Size::new(64, 64).unwrap(),
        steps: 2,
        guidance_scale: 3.0,
        seed: 11,
        sampler: Sampler::Ddim,
        ..base(None)
    }
}

fn drawn(model: &Pipeline, spec: &Spec) -> Tensor {
    finish(model, vec![model.begin(spec).unwrap()]).remove(0)
}

#[test]
fn every_method_draws_what_its_library_does() {
    let expected = fixture("lora/expected.safetensors");
    let own = model(path("lora"), Vec::new());
    let plain = drawn(&own, &spec(&[]));
    assert!(relative_error(&plain, &expected["none"]) < 1e-4);
    let mut methods: Vec<_> = expected.keys().filter(|name| *name != "none").collect();
    methods.sort_unstable();
    assert_eq!(methods.len(), 17);
    let mut wrong = Vec::new();
    for method in methods {
        let ours = match method.starts_with("peft") {
            false => drawn(&own, &spec(&[(method, SCALE)])),
            true => {
                let file = path(&format!("lora/{method}/adapter_model.safetensors"));
                let peft = model(path("lora"), vec![file]);
                drawn(&peft, &spec(&[("adapter_model", 1.0)]))
            }
        };
        let error = relative_error(&ours, &expected[method]);
        let change = relative_error(&expected[method], &plain);
        println!("{method}: {error:.1e} of a change of {change:.1e}");
        if error > 1e-4 || change < 0.05 || error.is_nan() {
            wrong.push(method);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// A regular expression chooses other alphas for some weights.
#[test]
fn settings_of_peft_are_followed() {
    let expected = fixture("peft/expected.safetensors");
    let plain = drawn(&model(path("lora"), Vec::new()), &spec(&[]));
    for method in ["loha", "lokr"] {
        let file = path(&format!("peft/{method}/adapter_model.safetensors"));
        let begun = model(path("lora"), vec![file.clone()]).begin(&spec(&[("adapter_model", 1.0)]));
        assert_eq!(begun.unwrap().warnings(), [""; 0], "{method}");
        let ours = drawn(&model(path("lora"), vec![file]), &spec(&[("adapter_model", 1.0)]));
        let error = relative_error(&ours, &expected[method]);
        let change = relative_error(&expected[method], &plain);
        assert!(error < 1e-4 && change > 0.05, "{method}: {error:.1e} of {change:.1e}");
    }
}

#[test]
fn settings_of_peft_are_read_anew_and_refused_if_they_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    copy_files(&path("peft/loha"), folder.path());
    let model = model(folder.path().to_owned(), Vec::new());
    let settings = folder.path().join("adapter_config.json");
    let spec = spec(&[("adapter_model", 1.0)]);
    let whole = drawn(&model, &spec);
    std::fs::write(&settings, r#"{"peft_type": "LOHA", "alpha": 0.5, "r": 2}"#).unwrap();
    assert!(relative_error(&drawn(&model, &spec), &whole) > 0.01, "it is part of the version");
    for (text, words) in [
        (r#"{"peft_type": "VERA"}"#.to_owned(), "peft_type: \"VERA\" is not supported"),
        (format!("{{}}{}", " ".repeat(5 << 20)), "is larger than"),
        ("[]".into(), "is not a JSON object"),
        ("{\"r\": }".into(), "is not JSON, from line 1, column 7 on"),
    ] {
        std::fs::write(&settings, text).unwrap();
        let error = model.begin(&spec).map(drop).unwrap_err().to_string();
        assert!(error.contains("adapter_config.json: ") && error.contains(words), "{error}");
    }
    std::fs::remove_file(&settings).unwrap();
    std::fs::create_dir(&settings).unwrap();
    let error = model.begin(&spec).map(drop).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json: "), "{error}");
    std::fs::remove_dir(&settings).unwrap();
    let begun = model.begin(&spec).unwrap();
    assert!(begun.warnings()[0].contains("without PEFT's adapter_config.json"));
}

#[test]
fn a_bias_alone_is_added_without_a_weight() {
    let folder = tempfile::tempdir().unwrap();
    let unet = fixture("v1/unet/diffusion_pytorch_model.safetensors");
    let (mut alone, mut beside) = (HashMap::new(), HashMap::new());
    for name in ["conv_in", "down_blocks.0.downsamplers.0.conv", "time_embedding.linear_2"] {
        let weight = &unet[&format!("{name}.weight")];
        let bias = Tensor::full(0.3_f32, weight.dims()[0], &Device::Cpu).unwrap();
        let key = format!("lora_unet_{}", name.replace('.', "_"));
        alone.insert(format!("{key}.diff_b"), bias.clone());
        beside.insert(format!("{key}.diff_b"), bias);
        beside.insert(format!("{key}.diff"), weight.zeros_like().unwrap());
    }
    safetensors::save(&alone, folder.path().join("alone.safetensors")).unwrap();
    safetensors::save(&beside, folder.path().join("beside.safetensors")).unwrap();
    // Some hundred numbers each: the weights would not fit.
    let tight = limited(path("v1"), folder.path().to_owned(), Vec::new(), 2048);
    let ours = drawn(&tight, &spec(&[("alone", SCALE)]));
    let roomy = model(folder.path().to_owned(), Vec::new());
    assert!(relative_error(&ours, &drawn(&roomy, &spec(&[("beside", SCALE)]))) < 1e-5);
    assert!(relative_error(&ours, &drawn(&roomy, &spec(&[]))) > 0.01);
    let both = drawn(&roomy, &spec(&[("beside", 0.5), ("alone", 0.3)]));
    assert!(relative_error(&both, &ours) < 1e-5);
}

#[test]
fn rows_with_different_methods_share_a_batch() {
    let model = model(path("lora"), Vec::new());
    let specs = [
        spec(&[("dora", 1.0), ("lokr-full", 0.5)]),
        spec(&[]),
        spec(&[("full", 1.0)]),
        spec(&[("loha", 1.0), ("full", -0.5)]),
        Spec { seed: 3, ..spec(&[("full", 1.0)]) },
    ];
    let batch = specs.iter().map(|spec| model.begin(spec).unwrap()).collect();
    for (k, together) in finish(&model, batch).iter().enumerate() {
        assert_eq!(relative_error(together, &drawn(&model, &specs[k])), 0.0, "{k}");
    }
    let nothing = drawn(&model, &spec(&[("full", 0.0), ("dora", 0.0)]));
    assert_eq!(relative_error(&nothing, &drawn(&model, &spec(&[]))), 0.0, "a scale of 0 is none");
}

#[test]
fn each_network_has_its_scale() {
    let model = model(path("lora"), Vec::new());
    let tensors = safetensors::load(path("lora/loha.safetensors"), &Device::Cpu).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let unet = tensors.into_iter().filter(|(name, _)| name.starts_with("lora_unet_"));
    let unet: HashMap<String, Tensor> = unet.collect();
    safetensors::save(&unet, folder.path().join("unet.safetensors")).unwrap();
    let alone = self::model(folder.path().to_owned(), Vec::new());
    let without_text = LoraUse { text_encoder_scale: 0.0, ..LoraUse::new("loha", SCALE) };
    let ours = drawn(&model, &Spec { loras: vec![without_text], ..spec(&[]) });
    let error = relative_error(&ours, &drawn(&alone, &spec(&[("unet", SCALE)])));
    assert_eq!(error, 0.0);
    assert!(relative_error(&ours, &drawn(&model, &spec(&[("loha", SCALE)]))) > 0.01);
}

#[test]
fn what_matches_nothing_is_left_out_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let save = |name: &str, tensors: &[(&str, Tensor)]| {
        let tensors = tensors.iter().map(|(name, x)| ((*name).to_owned(), x.clone()));
        let file = folder.path().join(name).with_extension("safetensors");
        safetensors::save(&tensors.collect::<HashMap<_, _>>(), file).unwrap();
    };
    let half = Tensor::new(4_i64, &Device::Cpu).unwrap();
    save(
        "some",
        &[
            ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", zeros(&[2, 32])),
            ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", zeros(&[64, 2])),
            ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", half),
            ("lora_te1_text_model_encoder_layers_9_mlp_fc1.lora_up.weight", zeros(&[64, 2])),
            ("lora_unet_elsewhere.lora_up.weight", zeros(&[64, 2])),
        ],
    );
    save("flux", &[("lora_unet_double_blocks_0_img_attn_proj.lora_up.weight", zeros(&[4, 2]))]);
    save("sd3", &[("transformer.transformer_blocks.1.attn.to_q.lora_A.weight", zeros(&[2, 4]))]);
    save("vae", &[("decoder.conv_in.weight", zeros(&[4, 2]))]);
    save("other", &[("some.weight", zeros(&[4, 2]))]);
    let model = model(folder.path().to_owned(), Vec::new());
    let begun = model.begin(&spec(&[("some", 1.0)])).unwrap();
    let warning = "the LoRA \"some\" has 2 tensors that match no weight of this model, left out: \
                   \"lora_te1_text_model_encoder_layers_9_mlp_fc1.lora_up.weight\" and others";
    assert!(
        begun.warnings().iter().any(|text| text.starts_with(warning)),
        "{:?}",
        begun.warnings()
    );
    for (name, words) in [
        ("flux", "it seems to be for Flux"),
        ("sd3", "it seems to be for a diffusion transformer such as Flux"),
        ("vae", "is no LoRA: this is a VAE, which is a part of a model: --vae takes it"),
        ("other", "holds no LoRA but 1 other tensors, the first \"some.weight\""),
    ] {
        let error = model.begin(&spec(&[(name, 1.0)])).map(drop).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(words), "{error}");
    }
}

/// DoRA needs the model's weights, which are read again from its files.
#[test]
fn a_model_whose_files_have_changed_is_named() {
    let copy = tempfile::tempdir().unwrap();
    copy_files(&path("v1"), copy.path());
    let model = open(copy.path().to_owned(), path("lora"), Vec::new());
    let file = copy.path().join("unet/diffusion_pytorch_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, bytes).unwrap();
    let error = model.begin(&spec(&[("dora", 1.0)])).map(drop).unwrap_err().to_string();
    assert!(error.contains("has changed since the model was loaded"), "{error}");
    assert!(model.begin(&spec(&[("loha", 1.0)])).is_ok(), "this one needs none of it");
}
