//! LoRA files in all their namings, and rows with different ones in one batch. What diffusers draws
//! with them is compared in `tests/it/pictures.rs`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, safetensors};
use sd_models::{
    AddOns, AssetDir, DeviceName, Error, LoadOptions, LoraUse, Pipeline, Precision, PromptSyntax,
    SafetyMode, Size, Source, Spec,
};

use crate::img2img::{finish, spec as base};
use crate::relative_error;

/// The files that `make_pictures.py` wrote for the built-in model.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/pictures/loras")
}

fn scratch(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("loras-{test}"));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// The built-in model with the LoRAs of a folder, of which few stay in memory.
fn model(directory: PathBuf) -> Pipeline {
    let loras =
        AssetDir { directory: Some(directory), endings: &["safetensors"], ..AssetDir::default() };
    Pipeline::load(&LoadOptions {
        name: None,
        source: Source::Demo,
        unet: None,
        vae: None,
        device: DeviceName::Cpu,
        precision: Precision::F32,
        safety: SafetyMode::Never,
        threads: Some(1),
        add_ons: AddOns { loras, max_lora_bytes: 1 << 26, ..AddOns::default() },
    })
    .unwrap()
}

fn spec(loras: &[(&str, f64)]) -> Spec {
    let loras = loras.iter().map(|(name, scale)| LoraUse::new(*name, *scale)).collect();
    Spec { loras, steps: 3, size: Size::new(64, 64).unwrap(), ..base(None) }
}

fn drawn(model: &Pipeline, spec: &Spec) -> Tensor {
    finish(model, vec![model.begin(spec).unwrap()]).remove(0)
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    safetensors::load(folder().join(format!("{name}.safetensors")), &Device::Cpu).unwrap()
}

/// The names of a file of kohya's scripts with the layers of the original code.
fn original(name: &str) -> String {
    let Some(rest) = name.strip_prefix("lora_unet_") else { return name.to_owned() };
    let (module, end) = rest.split_once('.').unwrap();
    let number = |text: &str| text.parse::<usize>().unwrap();
    let parts: Vec<&str> = module.splitn(5, '_').collect();
    let resnet = |rest: &str| {
        let names = [
            ("norm1", "in_layers_0"),
            ("conv1", "in_layers_2"),
            ("time_emb_proj", "emb_layers_1"),
            ("conv2", "out_layers_3"),
            ("conv_shortcut", "skip_connection"),
        ];
        names.iter().find(|(ours, _)| rest == *ours).unwrap().1.to_owned()
    };
    // The built-in model has one residual block a level going down, and two going up.
    let module = match parts[..] {
        ["down", "blocks", level, kind, rest] => {
            let (index, rest) = rest.split_once('_').unwrap();
            let block = 1 + 2 * number(level) + number(index);
            match kind {
                "resnets" => format!("input_blocks_{block}_0_{}", resnet(rest)),
                "attentions" => format!("input_blocks_{block}_1_{rest}"),
                _ => format!("input_blocks_{}_0_op", 2 * number(level) + 2),
            }
        }
        ["up", "blocks", level, kind, rest] => {
            let (index, rest) = rest.split_once('_').unwrap();
            let block = 2 * number(level) + number(index);
            match kind {
                "resnets" => format!("output_blocks_{block}_0_{}", resnet(rest)),
                "attentions" => format!("output_blocks_{block}_1_{rest}"),
                // Behind the attention, where there is one.
                _ if level == "0" => format!("output_blocks_{}_1_conv", 2 * number(level) + 1),
                _ => format!("output_blocks_{}_2_conv", 2 * number(level) + 1),
            }
        }
        ["mid", "block", "attentions", _, rest] => format!("middle_block_1_{rest}"),
        ["mid", "block", "resnets", index, rest] => {
            format!("middle_block_{}_{}", 2 * number(index), resnet(rest))
        }
        _ => match module {
            "conv_in" => "input_blocks_0_0".into(),
            "conv_out" => "out_2".into(),
            "time_embedding_linear_1" => "time_embed_0".into(),
            "time_embedding_linear_2" => "time_embed_2".into(),
            other => panic!("{other}"),
        },
    };
    format!("lora_unet_{module}.{end}")
}

/// The names that diffusers wrote before there was PEFT.
fn older(name: &str) -> String {
    let name =
        name.replace(".lora_A.weight", ".down.weight").replace(".lora_B.weight", ".up.weight");
    let Some((module, end)) = name.split_once(".down.").or_else(|| name.split_once(".up.")) else {
        return name;
    };
    let way = if name.contains(".down.weight") { "down" } else { "up" };
    let way = if end == "weight" { way } else { return name };
    if let Some((block, part)) = module.split_once(".attn").and_then(|(block, rest)| {
        let (number, part) = rest.split_once('.')?;
        Some((format!("{block}.attn{number}"), part.to_owned()))
    }) {
        let part = part.trim_end_matches(".0");
        return format!("{block}.processor.{part}_lora.{way}.weight");
    }
    match module.starts_with("text_encoder.") {
        true => {
            let module = module.replace("text_encoder.", "text_encoder.text_model.");
            format!("{module}.lora_linear_layer.{way}.weight")
        }
        false => format!("{module}.lora.{way}.weight"),
    }
}

#[test]
fn every_naming_means_the_same() {
    let folder = scratch("names");
    let kohya = tensors("everywhere");
    let renamed: HashMap<String, Tensor> =
        kohya.iter().map(|(name, x)| (original(name), x.clone())).collect();
    safetensors::save(&renamed, folder.join("original.safetensors")).unwrap();
    // Without alpha it is the rank: a half of it is in the up projections here.
    let older: HashMap<String, Tensor> = tensors("everywhere-peft")
        .into_iter()
        .map(|(name, x)| {
            let up = name.contains("lora_B");
            let x = x.to_dtype(DType::F32).unwrap();
            (older(&name), if up { (x * 0.5).unwrap() } else { x })
        })
        .collect();
    assert!(older.keys().any(|name| name.contains(".processor.to_out_lora.up.weight")));
    safetensors::save(&older, folder.join("older.safetensors")).unwrap();
    for name in ["everywhere", "everywhere-peft"] {
        let file = format!("{name}.safetensors");
        std::fs::copy(self::folder().join(&file), folder.join(file)).unwrap();
    }
    let model = model(folder);
    let kohya = drawn(&model, &spec(&[("everywhere", 0.8)]));
    assert!(relative_error(&drawn(&model, &spec(&[])), &kohya) > 0.1);
    for name in ["original", "everywhere-peft", "older"] {
        let error = relative_error(&drawn(&model, &spec(&[(name, 0.8)])), &kohya);
        assert_eq!(error, 0.0, "{name}");
    }
}

#[test]
fn rows_with_different_loras_share_a_batch() {
    let model = model(folder());
    let specs = [
        spec(&[("everywhere", 0.8)]),
        spec(&[]),
        Spec { guidance_scale: 1.0, ..spec(&[("attention", 1.0), ("everywhere", -0.3)]) },
        spec(&[("attention", 1.0)]),
        Spec { seed: 5, ..spec(&[("everywhere", 0.8)]) },
        spec(&[("everywhere", 0.4)]),
    ];
    let batch = specs.iter().map(|spec| model.begin(spec).unwrap()).collect();
    let drawn_together = finish(&model, batch);
    for (k, spec) in specs.iter().enumerate() {
        let alone = drawn(&model, spec);
        assert_eq!(relative_error(&drawn_together[k], &alone), 0.0, "{:?}", spec.loras);
        let others = drawn_together.iter().enumerate().filter(|(other, _)| *other != k);
        for (other, x) in others {
            assert!(relative_error(x, &alone) > 0.01, "{k} {other}");
        }
    }
    let nothing = drawn(&model, &spec(&[("everywhere", 0.0)]));
    assert_eq!(relative_error(&nothing, &drawn_together[1]), 0.0, "a scale of 0 is none");
}

#[test]
fn a_prompt_names_loras_in_the_syntax_of_automatic1111() {
    let model = model(folder());
    let by_field = Spec {
        prompt: "a red house".into(),
        prompt_syntax: PromptSyntax::A1111,
        ..spec(&[("everywhere", 0.8), ("attention", 1.0)])
    };
    let by_prompt = Spec {
        prompt: "a red<lora:everywhere:0.8> house<lora:attention>".into(),
        loras: Vec::new(),
        ..by_field.clone()
    };
    let error = relative_error(&drawn(&model, &by_prompt), &drawn(&model, &by_field));
    assert_eq!(error, 0.0);
    let unknown = Spec { prompt: "<lora:../everywhere:1>".into(), ..by_prompt };
    let error = model.info().check_files(&unknown).unwrap_err();
    assert!(matches!(error, Error::Spec { field: "prompt", .. }), "{error}");
    assert!(error.to_string().contains("attention, everywhere, everywhere-peft"), "{error}");
}

/// LyCORIS' third factor in the middle, against the convolution that the factors make up.
#[test]
fn a_convolution_of_three_factors_is_their_product() {
    let folder = scratch("mid");
    let name = "lora_unet_down_blocks_0_resnets_0_conv1";
    let random = |shape: &[usize]| Tensor::randn(0_f32, 0.3, shape, &Device::Cpu).unwrap();
    let (down, mid, up) = (random(&[5, 64, 1, 1]), random(&[5, 5, 3, 3]), random(&[64, 5, 1, 1]));
    let of = |parts: [(&str, &Tensor); 3]| -> HashMap<String, Tensor> {
        parts.iter().map(|(part, x)| (format!("{name}.{part}"), (*x).clone())).collect()
    };
    let three =
        of([("lora_down.weight", &down), ("lora_mid.weight", &mid), ("lora_up.weight", &up)]);
    // Each of 64 inputs, by itself, through both: an impulse's response is the product's kernel.
    let kernel = |i: usize| {
        let mut impulse = vec![0_f32; 64 * 25];
        impulse[i * 25 + 12] = 1.0;
        let x = Tensor::from_vec(impulse, (1, 64, 5, 5), &Device::Cpu).unwrap();
        let y = x.conv2d(&down, 0, 1, 1, 1).unwrap().conv2d(&mid, 0, 1, 1, 1).unwrap();
        // Turned around, since convolutions here are correlations.
        y.flip(&[2, 3]).unwrap()
    };
    let product = Tensor::cat(&(0..64).map(kernel).collect::<Vec<_>>(), 0).unwrap();
    let product = product.transpose(0, 1).unwrap().contiguous().unwrap();
    let alpha = Tensor::new(5_f32, &Device::Cpu).unwrap();
    let two = of([("lora_down.weight", &product), ("lora_up.weight", &up), ("alpha", &alpha)]);
    safetensors::save(&three, folder.join("three.safetensors")).unwrap();
    safetensors::save(&two, folder.join("two.safetensors")).unwrap();
    let model = model(folder);
    let (three, two) =
        (drawn(&model, &spec(&[("three", 1.0)])), drawn(&model, &spec(&[("two", 1.0)])));
    assert!(relative_error(&three, &two) < 1e-4);
    assert!(relative_error(&drawn(&model, &spec(&[])), &two) > 0.01);
}

#[test]
fn what_cannot_be_applied_is_refused_by_tensor_and_file() {
    let folder = scratch("refused");
    let name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let good = || {
        HashMap::from([
            (format!("{name}.lora_down.weight"), zeros(&[2, 192])),
            (format!("{name}.lora_up.weight"), zeros(&[192, 2])),
        ])
    };
    let with = |key: String, x: Tensor| {
        let mut tensors = good();
        tensors.insert(key, x);
        tensors
    };
    let mut half = good();
    half.remove(&format!("{name}.lora_up.weight"));
    let cases = [
        ("loha", with(format!("{name}.hada_w1_a"), zeros(&[1])), "another method"),
        ("oft", with(format!("{name}.oft_blocks"), zeros(&[1])), "is of OFT"),
        ("norm", with("lora_unet_conv_norm_out.w_norm".into(), zeros(&[1])), "a change of norms"),
        ("dora", with(format!("{name}.dora_scale"), zeros(&[1])), "expected 192 numbers"),
        ("nan", with(format!("{name}.lora_up.weight"), (zeros(&[192, 2]) / 0.0).unwrap()), "NaN"),
        ("alpha", with(format!("{name}.alpha"), zeros(&[2])), "expected one number, found [2]"),
        (
            "xl",
            with("lora_te2_text_model_x.lora_up.weight".into(), zeros(&[1])),
            "Stable Diffusion XL",
        ),
        (
            "shape",
            with(format!("{name}.lora_up.weight"), zeros(&[192, 3])),
            "lora_up.weight: expected shape [192, 2], found [192, 3]",
        ),
        (
            "wide",
            with(format!("{name}.lora_down.weight"), zeros(&[2, 64])),
            "lora_down.weight: expected shape [2, 192], found [2, 64]",
        ),
        ("half", half, "has no up projection beside it"),
        (
            "twice",
            with(
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight".into(),
                zeros(&[2, 192]),
            ),
            "as is",
        ),
        ("empty", HashMap::new(), "holds no LoRA"),
    ];
    for (file, tensors, _) in &cases {
        safetensors::save(tensors, folder.join(format!("{file}.safetensors"))).unwrap();
    }
    std::fs::write(folder.join("text.safetensors"), "no tensors").unwrap();
    let model = model(folder);
    let refused = |file: &str| {
        let spec = spec(&[(file, 1.0)]);
        model.check(&spec).unwrap();
        let error = model.begin(&spec).map(drop).unwrap_err();
        assert!(matches!(error, Error::Spec { field: "loras", .. }), "{file}: {error}");
        error.to_string()
    };
    for (file, _, reason) in &cases {
        let error = refused(file);
        assert!(error.contains(reason) && error.contains(file), "{file}: {error}");
    }
    assert!(refused("text").contains("not a safetensors file"));
    let missing = spec(&[("missing", 1.0)]);
    assert!(refused("missing").contains("is unknown"));
    let missing = model.info().check_files(&missing).unwrap_err().to_string();
    assert!(missing.contains("\"missing\", which is unknown; known are alpha"), "{missing}");
}
